"""How much each layer minds being made cheaper: how much sparsity each should get, and which are left out.

One layer at a time is made sparse at a few levels, and KL to the dense model measured on held-out samples. Along each
layer's lower convex hull of KL over weights saved, the cheapest steps of all layers are taken first, until the model
reads few enough weights, or until the KL measured with all of them together reaches the target.

Of a method that trains stand-ins, those of all layers are aligned a little, each alone, where that matters; KL is
measured in what the method calls trials, and the method says which layers are then best.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

from torch import nn

from caprese.distill.align import Alignment, align, prepare
from caprese.distill.batches import Batch
from caprese.distill.checkpoints import Checkpoints
from caprese.distill.teacher import HeldOut
from caprese.efficient_methods import (
    Method,
    Prefill,
    Sparse,
    apply,
    calibrate,
    needs_calibration,
    only,
    remove,
    weights_saved,
)
from caprese.errors import CapreseError
from caprese.models import active_parameters, find_ffns

LEVELS = (0.2, 0.35, 0.5, 0.65, 0.8, 0.9)
# Optimiser steps of alignment before layers are compared.
ALIGNED = 100
Advance = Callable[[int], None]


@dataclass(frozen=True)
class Step:
    """Raise one layer to one sparsity: what it saves in weights, and what it adds in KL if layers add up."""

    layer: int
    sparsity: float
    saved: float
    kl: float


class Sensitivity:
    """A method on a model, with samples to calibrate and to measure on.

    Args:
        rows: samples for methods that learn from samples.
        held_out: samples that KL is measured on.
        prefill: how prompts will run.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Sparse,
        rows: Sequence[Batch],
        held_out: Sequence[Batch],
        cache_gigabytes: float,
        prefill: Prefill = "dense",
    ) -> None:
        self.model, self.method, self.prefill = model, method, prefill
        self.rows, self.held_out, self.limit = rows, held_out, cache_gigabytes
        sites = find_ffns(model)
        self.sites = [sites[i] for i in method.layer_indices(len(sites))]

    def _with(self, method: Sparse) -> HeldOut:
        """Apply `method`, calibrated if it must be; the caller removes it."""
        tokens = [batch.whole(self.prefill) for batch in self.rows]
        calibration = calibrate(self.model, method, tokens) if needs_calibration(method) else None
        apply(self.model, method, calibration=calibration, prefill=self.prefill)
        return HeldOut(self.model, self.held_out, self.limit)

    def kl(self, method: Sparse) -> float:
        """KL(dense || efficient) with `method` on all its layers."""
        held_out = self._with(method)
        try:
            return held_out.kl()
        finally:
            remove(self.model)

    def steps(self, advance: Advance | None = None) -> list[Step]:
        """Every step along every layer's hull, cheapest first; `advance` is called once for each layer and level."""
        points: list[list[tuple[float, float, float]]] = [[(0.0, 0.0, 0.0)] for _ in self.sites]
        for level in LEVELS:
            uniform = self.method.model_copy(update={"sparsity": level, "layers": [s.index for s in self.sites]})
            held_out = self._with(uniform)
            try:
                for site, known in zip(self.sites, points, strict=True):
                    with only(self.model, {site.index}):
                        known.append((float(weights_saved(site, [uniform])), held_out.kl(), level))
                    if advance is not None:
                        advance(1)
            finally:
                remove(self.model)
        steps = []
        for site, known in zip(self.sites, points, strict=True):
            here = known[0]
            while ahead := [p for p in known if p[0] > here[0]]:
                there = min(ahead, key=lambda p: ((p[1] - here[1]) / (p[0] - here[0]), -p[0]))
                steps.append(Step(site.index, there[2], there[0] - here[0], max(0.0, there[1] - here[1])))
                here = there
        return sorted(steps, key=lambda step: step.kl / step.saved)

    def at(self, steps: Sequence[Step]) -> Sparse:
        """The method after `steps`: layers without one are left dense."""
        levels: dict[int, float] = {}
        for step in steps:
            levels[step.layer] = max(step.sparsity, levels.get(step.layer, 0.0))
        layers = sorted(levels)
        return self.method.model_copy(update={"layers": layers, "sparsity": [levels[i] for i in layers]})


def allocate_sparsity(
    sensitivity: Sensitivity,
    *,
    target_kl: float | None = None,
    target_active: float | None = None,
    advance: Advance | None = None,
) -> Sparse:
    """The method with a sparsity for each layer.

    Args:
        target_kl: the largest KL(dense || efficient) per token, before recovery; as much is removed as it allows.
        target_active: the fraction of the dense model's active parameters that may still be read.

    Raises:
        CapreseError: the target cannot be reached, or the method saves nothing.
    """
    steps = sensitivity.steps(advance)
    if not steps:
        raise CapreseError(
            f"{sensitivity.method.name} saves no weights on these layers: nothing to allocate; give `sparsity` a number"
        )
    if target_active is not None:
        dense = active_parameters(sensitivity.model)
        left, count = float(dense), 0
        while left > target_active * dense and count < len(steps):
            left -= steps[count].saved
            count += 1
        if left > target_active * dense:
            raise CapreseError(
                f"{sensitivity.method.name} on these layers leaves {left / dense:.3f} of the active parameters at its "
                f"most; `target_active={target_active:g}` is out of reach"
            )
        if not count:
            raise CapreseError(f"`target_active={target_active:g}` removes nothing; choose a smaller fraction")
        return sensitivity.at(steps[:count])
    assert target_kl is not None
    low, high = 0, len(steps)
    while low < high:  # the most steps whose KL, measured with all of them, is within the target
        middle = (low + high + 1) // 2
        if sensitivity.kl(sensitivity.at(steps[:middle])) <= target_kl:
            low = middle
        else:
            high = middle - 1
    if not low:
        raise CapreseError(
            f"one layer at sparsity {steps[0].sparsity:g} alone costs more than `target_kl={target_kl:g}`; allow more"
        )
    return sensitivity.at(steps[:low])


def select_layers(
    model: nn.Module,
    method: Method,
    rows: Sequence[Batch],
    held_out: Sequence[Batch],
    config: Alignment,
    cache_gigabytes: float,
    run: Checkpoints | None = None,
) -> tuple[Method, dict[Hashable, float]]:
    """A method that is still undecided, on the layers that are best; and the KL of each of its trials.

    Args:
        model: without a method.
        rows: micro-batches that stand-ins are aligned on, for `ALIGNED` steps of `config`.
        held_out: samples that KL is measured on.
        run: the alignment is kept there as "sensitivity".

    Raises:
        CapreseError: no rows.
    """
    run = run or Checkpoints()
    if not rows:
        raise CapreseError("no sample has more than one token; give prompts that the model answers")
    candidates = method.candidates()
    count = len(find_ffns(model))
    need = ALIGNED * (config.batch_size // config.micro_batch)
    again = (list(rows) * -(-need // len(rows)))[:need]  # one long epoch: held-out samples are looked at once
    apply(model, candidates)
    try:
        prepare(model, [candidates], rows)
        if method.candidates_learn:
            for objective in candidates.objectives(config.model_copy(update={"epochs": 1, "hidden_epochs": 0})):
                align(model, replace(objective, name="sensitivity"), again, held_out, config, run)
        measured = HeldOut(model, held_out, cache_gigabytes)
        cost: dict[Hashable, float] = {}
        trials = list(method.trials(model))
        with run.bar("sensitivity", len(trials), "trials") as advance:
            for name, how in trials:
                with how:
                    cost[name] = measured.kl()
                advance(1)
    finally:
        remove(model)
    return method.decided(cost, count), cost
