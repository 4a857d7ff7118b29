"""Where one fused decode step on a CPU spends its time, part by part, and at what bandwidth weights are read.

The kernels are compiled with marks (`CAPRESE_TIMES`, codes.h): seconds that the first thread spends in each part while
whole models decode, waiting for the others apart. What is not in C is Python, transformers and torch. The floor is all
the bytes at the bandwidth of the product that reaches most of it.

Settings of a cell: model, or a known shape, with random weights; method; rank; batch; prompt_tokens; new_tokens.
"""

from __future__ import annotations

import ctypes
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import caprese
from caprese.adapters import attach_adapter
from caprese.efficient_methods import applied_ffns, settle
from caprese.evaluation import environment
from caprese.inference import fuse
from caprese.inference.generate import generate
from caprese.kernels import QuantizedRows
from caprese.kernels.quantized import native
from caprese.models import random_model, shape_config

#: as codes.h counts them
PARTS = "norm", "qkv", "turn", "attend", "out", "gate_up", "act", "down", "branch", "reduce", "wait"


def nbytes(weight: Any) -> int:
    """Of a linear layer, or of a weight."""
    weight = getattr(weight, "rounded", None) or getattr(weight, "weight", weight)
    return weight.codes.nbytes + weight.scales.nbytes if isinstance(weight, QuantizedRows) else weight.nbytes


class Measure:
    """Compiles the kernels once more."""

    def __init__(self) -> None:
        os.environ["CC"] = f"{os.environ.get('CC', 'cc')} -DCAPRESE_TIMES"
        native.library.cache_clear()
        if native.library() is None:
            raise SystemExit("this measures compiled C: it needs a C compiler, cc or another named by CC")
        self.marks = (ctypes.c_double * len(PARTS)).in_dll(native.library(), "caprese_times")

    def environment(self) -> dict[str, Any]:
        return environment(self.model)

    def __call__(self, cell: dict[str, Any]) -> dict[str, Any]:
        self.model = model = self._fused(cell)
        size, vocabulary = (cell["batch"], cell["prompt_tokens"]), model.config.vocab_size
        prompts = torch.randint(5, vocabulary, size, generator=torch.Generator().manual_seed(0)).tolist()
        calls: dict[str, float] = {}
        run: Callable[..., None] = native.call

        def timed(name: str, *arguments: Any) -> None:
            begin = time.perf_counter()
            run(name, *arguments)
            calls[name] = calls.get(name, 0.0) + time.perf_counter() - begin

        tokens = generate(model, prompts, cell["new_tokens"] + 5)
        steps = []
        rows: list[dict[str, float]] = []
        native.call = timed
        try:
            for _ in range(5):  # the prompt, the choice, and what is compiled
                next(tokens)
            needed = self._bytes(model)
            for _ in range(cell["new_tokens"]):
                self.marks[:] = [0.0] * len(PARTS)
                calls.clear()
                begin = time.perf_counter()
                if next(tokens, None) is None:
                    break
                steps.append(time.perf_counter() - begin)
                layers, head = calls.get("caprese_layers", 0.0), calls.get("caprese_products", 0.0)
                marks = dict(zip(PARTS, self.marks, strict=True))
                rows.append({**marks, "head": head, "outside": steps[-1] - layers - head})
        finally:
            native.call = run
        step = 1000 * statistics.median(steps)
        parts: dict[str, dict[str, float]] = {}
        for name in rows[0]:
            ms = 1000 * statistics.median(row[name] for row in rows)
            parts[name] = {"ms": ms, "of_step": ms / step}
            if name in needed:
                parts[name] |= {"bytes": needed[name], "gbps": needed[name] / ms / 1e6}
        total = sum(needed.values())
        most = max(part["gbps"] for part in parts.values() if part.get("bytes", 0) > total / 10)
        return {
            "step_ms": step,
            "bytes": total,
            "gbps": total / step / 1e6,
            "of_floor": total / most / 1e6 / step,
            "parts": parts,
        }

    def _fused(self, cell: dict[str, Any]) -> Any:
        if cell["shape"]:
            model: Any = random_model(shape_config(cell["shape"]), torch.bfloat16, "cpu")
        else:
            model, _ = caprese.load_base(cell["model"], dtype="bfloat16")
        model = caprese.apply(model, caprese.resolve_recipe(method=cell["method"]).methods)
        settle(model)
        model = attach_adapter(model, cell["rank"])
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.data = parameter.data.to(torch.bfloat16)
        fuse(model.eval())
        return model

    def _bytes(self, model: Any) -> dict[str, int]:
        """Of weights that a step reads, by part."""
        found = {"head": nbytes(model.get_output_embeddings())}
        for wrapper in applied_ffns(model).values():
            attention, step = wrapper.site.layer.self_attn, wrapper.fused
            own = {
                "qkv": [attention.q_proj, attention.k_proj, attention.v_proj],
                "out": [attention.o_proj],
                "gate_up": [step.first],
                "down": [step.second],
                "branch": [step.left, step.right],
            }
            for name, weights in own.items():
                found[name] = found.get(name, 0) + sum(map(nbytes, weights))
        return found
