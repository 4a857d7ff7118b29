"""Fidelity and time of methods that take fewer neurons, fewer bits, or both, before and after recovery.

KL(dense || efficient) in float32, on the run's own test prompts and on those from elsewhere; time to
next token of one fused step with a branch in bfloat16, as `caprese bench` measures it, beside dense.

Settings of a cell: model; samples, a directory with a run's shards; method; calibration, samples for methods that learn
from them; rank (0: times, and no adapter; else no times); batch; rate; epochs; new_tokens, that are timed, 0 for
none; prefill, how prompts run; train, so many of the training samples; layerwise, how branches are fitted first;
attention_rank, of a second branch beside the attention's output projection, from its own input: 0 for none.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

import caprese
from caprese.distill import Branches, EndToEnd, HeldOut, Layerwise, Teacher, make_batches
from caprese.distill.fit import fit_end_to_end, fit_layers
from caprese.distill.precision import quick_products
from caprese.efficient_methods import calibrate, needs_calibration
from caprese.evaluation import environment, fidelity
from caprese.models import find_ffns, unwrap
from caprese.studies.bench import bench
from measures.recovery import read_samples


class Slot(nn.Module):
    """x L R, named as PEFT's LoRA and starting at zero as it does, so that it is trained with the others."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.lora_A = nn.ModuleDict({"default": nn.Linear(linear.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, linear.out_features, bias=False)})
        nn.init.zeros_(self.lora_B["default"].weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.lora_B["default"](self.lora_A["default"](x))
        return y


@contextmanager
def beside_attention(model: nn.Module, rank: int) -> Iterator[None]:
    """Inside, generated tokens have a branch beside each rounded output projection; nothing at rank 0."""
    outputs: list[Any] = [site.attention_linears()[-1] for site in find_ffns(model)] if rank else []
    torch.manual_seed(0)
    for linear in outputs:
        linear.recovery = Slot(linear, rank).requires_grad_(False)
        linear.few_bits = functools.partial(_with_slot, linear, linear.few_bits)
    try:
        yield
    finally:
        for linear in outputs:
            del linear.recovery, linear.few_bits


def _with_slot(linear: Any, plain: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return plain(x) + linear.recovery(x)


class Measure:
    """Holds one model and its samples."""

    def __init__(self) -> None:
        self.model: Any = None
        self.samples: dict[str, Any] = {}

    def environment(self) -> dict[str, Any]:
        return environment(self.model)

    def __call__(self, cell: dict[str, Any]) -> dict[str, Any]:
        if self.model is None:
            self.model, _ = caprese.load_base(cell["model"], dtype="float32")
            splits = "train", "validation", "test", "elsewhere"
            self.samples = {split: read_samples(cell["samples"], split) for split in splits}
        methods = caprese.resolve_recipe(method=cell["method"]).methods
        calibration = None
        if needs_calibration(methods):
            seen = make_batches(self.samples["train"][: cell["calibration"]], 8)
            calibration = calibrate(self.model, methods, [batch.whole() for batch in seen])
        prefill = cell["prefill"]
        applied: Any = caprese.apply(self.model, methods, calibration=calibration, prefill=prefill)
        row: dict[str, Any] = {}
        try:
            row["efficient"] = self._fidelity(applied)
            if cell["rank"]:
                with ExitStack() as beside:
                    with quick_products(applied, True):
                        applied = self._distil(applied, cell, beside)
                    row["recovered"] = self._fidelity(applied)
        finally:
            caprese.remove(applied)
        return row if cell["rank"] or not cell["new_tokens"] else {**row, **self._times(cell, methods)}

    def _fidelity(self, model: nn.Module) -> dict[str, Any]:
        return {
            split: fidelity(model, make_batches(self.samples[split], 8), ("recovered",))["recovered"]
            for split in ("test", "elsewhere")
        }

    def _distil(self, model: Any, cell: dict[str, Any], beside: ExitStack) -> Any:
        batch = cell["batch"]
        held_out = HeldOut(model, make_batches(self.samples["validation"], batch), 1.0)
        teacher = Teacher(model, make_batches(self.samples["train"][: cell["train"]], batch), 3.0)
        first = Layerwise(batch_size=batch, how=cell["layerwise"])
        model, facts = fit_layers(model, teacher, held_out, Branches(cell["rank"]), first)
        beside.enter_context(beside_attention(unwrap(model), cell["attention_rank"]))
        best = min(facts["kl"].values())
        how = EndToEnd(learning_rate=cell["rate"], epochs=cell["epochs"], batch_size=batch, micro_batch=batch)
        fit_end_to_end(model, teacher, held_out, how, best)
        return model

    def _times(self, cell: dict[str, Any], methods: Any) -> dict[str, Any]:
        model, _ = caprese.load_base(cell["model"], dtype="bfloat16")
        found = bench(model, methods, rank=32, rows=["dense", "fused"], new_tokens=cell["new_tokens"])
        rows = {each["name"]: each for each in found["rows"]}
        return {name: {key: each[key] for key in ("ttnt_ms", "spread_ms")} for name, each in rows.items()}
