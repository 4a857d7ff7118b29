"""What engines serve: the dense model, an exported adapter, GRIFFIN through the plugin, each in an engine's own server.

Eight texts one by one and all at once. Each text is then given to the same weights in transformers, in float32, which
say of every token how far it is below their likeliest: a text without such a token is theirs, and a small distance is a
tie that rounding decided.

Settings of a cell: model; engine, llama.cpp or vllm; adapter, null for the dense model, a directory of `recover --for
export`, which is exported, or of a GRIFFIN run, which is served by the plugin; outtype; prompts, as a recipe names
them, null for everyday language; count, of prompts; new_tokens; quick, without vLLM's compiler.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import caprese
from caprese.adapters import Adapter
from caprese.inference.generate import ends_of, generate
from caprese.studies.prompts import some_prompts
from measures import speculation
from measures.served import serve

_TIMES = 3


class Measure(speculation.Measure):
    """Keeps the dense model, and what it was written as."""

    def __call__(self, cell: dict[str, Any]) -> dict[str, Any]:
        if self.model is None:
            self.model, self.tokenizer = caprese.load_base(cell["model"], dtype="float32")
        tokens = cell["new_tokens"]
        prompts = some_prompts(cell["prompts"], cell["count"], self.model, self.tokenizer, tokens)
        path, plugin = self._served(cell)
        flags = _flags(cell["adapter"]) if plugin else ()
        with serve(cell["engine"], path, quick=cell["quick"], slots=len(prompts), more=flags) as server:
            server.write(prompts[0], tokens)
            texts = [server.write(prompt, tokens) for prompt in prompts]
            seconds = statistics.median(server.write_all(prompts, tokens) for _ in range(_TIMES))
        # told to go on after an end, llama.cpp never says one
        never = sorted(ends_of(self.model, self.tokenizer)) if cell["engine"] == "llama.cpp" else []
        with self._reference(cell, path) as model:
            gaps = [max(_gaps(model, prompt, text.ids, never)) for prompt, text in zip(prompts, texts, strict=True)]
        files = [*path.glob("*.safetensors")] if path.is_dir() else [path]
        files += [Path(cell["adapter"]) / "adapter_model.safetensors"] if plugin else []
        return {
            "identical": gaps.count(0.0),
            "gap": max(gaps),
            "ms": statistics.median(text.ms_per_token for text in texts),
            "tokens_per_second": len(prompts) * tokens / seconds,
            "bytes": sum(file.stat().st_size for file in files),
        }

    def _served(self, cell: dict[str, Any]) -> tuple[Path, bool]:
        """What the engine is given, and whether the plugin is to add the adapter."""
        adapter = cell["adapter"]
        if adapter is None:
            return self.dense(cell["engine"], cell["outtype"]), False
        if any(facts["name"] == "griffin" for facts in Adapter.open(adapter).sidecar.methods):
            return self.dense(cell["engine"], cell["outtype"]), True
        return self.exported(cell["engine"], adapter, cell["outtype"]), False

    @contextmanager
    def _reference(self, cell: dict[str, Any], path: Path) -> Iterator[nn.Module]:
        """The same weights in transformers, in float32: where they are in 16 bits, before they were exported."""
        if cell["adapter"] is not None and cell["outtype"] in ("bfloat16", "f16"):
            model = caprese.load(self.model, cell["adapter"])
            try:
                yield model
            finally:
                caprese.remove(model)
            return
        place, how = path, dict[str, Any]()
        if not path.is_dir():  # its reader takes no biases of an FFN, where a branch is, unless a config has them
            place, how = path.parent, {"gguf_file": path.name}
            how["config"] = AutoConfig.from_pretrained(place, **how, mlp_bias=cell["adapter"] is not None)
        yield AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, **how).eval()


def _flags(adapter: str) -> list[str]:
    overrides = {"architectures": ["CapreseLlamaForCausalLM"], "caprese_adapter": str(Path(adapter).absolute())}
    return ["--worker-cls", "caprese.serving.vllm.Worker", "--hf-overrides", json.dumps(overrides)]


def _gaps(model: nn.Module, prompt: list[int], text: list[int], never: list[int]) -> list[float]:
    """Of each token of a text, how far its logit is below the largest but for those that are never said, in nats."""
    gaps: list[float] = []

    def given(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        token = text[len(gaps)]
        scores = logits[0].float()
        scores[never] = -torch.inf
        gaps.append(float(scores.max() - scores[token]))
        return torch.tensor([token])

    for _ in generate(model, [prompt], len(text), given):
        pass
    return gaps
