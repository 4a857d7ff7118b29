"""What comes before distillation: a job is checked, its samples are looked at, its methods learn from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from caprese.data_gen import ELSEWHERE, Sample, Source
from caprese.distill import Alignment, Branches, Layerwise, make_batches
from caprese.distill.checkpoints import Checkpoints, Kept
from caprese.distill.sensitivity import LEVELS, Sensitivity, allocate_sparsity, select_layers
from caprese.distill.sequential import check_sequential
from caprese.efficient_methods import (
    Method,
    Prefill,
    Sparse,
    calibrate,
    compose,
    describe_methods,
    facts_of,
    idle_branches,
    make_method,
    methods_by_layer,
    needs_calibration,
)
from caprese.errors import CapreseError
from caprese.models import find_ffns
from caprese.models.residency import Residency
from caprese.progress import say
from caprese.recipes import Recipe


def check_job(
    model: nn.Module, methods: Sequence[Method], branches: Branches, layerwise: Layerwise, sources: Sequence[Source]
) -> dict[int, list[Method]]:
    """What acts on each layer; before any work, what this model cannot be given is refused.

    Raises:
        CapreseError: something a method needs is not installed or among the sources of prompts, layers out of range, a
            rank above the hidden size D, or a layer-wise fit that the family does not allow.
    """
    for method in methods:
        method.check()
        if (kind := method.measured_on) and not any(one.source.partition(":")[0] == kind for one in sources):
            raise CapreseError(
                f"{method.name} is to be measured on {kind}, which is none of `prompts`; give some of it, such as "
                f"gym:gsm_symbolic=0.9,{kind}:distil=0.1"
            )
    sites = find_ffns(model)
    layers = methods_by_layer(methods, len(sites))
    if not idle_branches(methods):
        branches.check(sites[0].ffn.hidden_size)
    if layerwise.how == "sequential":
        check_sequential(model)
    return layers


def check_residency(kind: Residency, recipe: Recipe) -> None:
    """Refuse what a base cannot be given whose decoder layers are not in memory.

    Args:
        kind: where they are.

    Raises:
        CapreseError: several methods to time, reselection, rank auto, or Adam by layer; with a streamed base also
            methods that make weights of its own, or end_to_end.epochs above 0.
    """
    if kind == "whole":
        return
    if recipe.alternatives:
        raise CapreseError(f"the fastest of several methods is found on a whole base, and this is {kind}; name one")
    if recipe.reselect_every is not None:
        raise CapreseError(f"reselect_every wants the base whole, and it is {kind}; leave it out (null)")
    if recipe.rank == "auto":  # it compares all layers' whole solutions
        raise CapreseError(f"rank auto wants the base whole, and it is {kind}; give a number")
    if recipe.layerwise.how == "adam":
        raise CapreseError(f"layerwise.how=adam wants the base whole, and it is {kind}; use layerwise.how=closed")
    if kind == "sharded":
        return
    reader = next((method for method in recipe.methods if method.reads_weights or method.trains), None)
    if reader is not None:
        raise CapreseError(
            f"{reader.name} makes weights of the base's, which is streamed from disk; use griffin or cats, or "
            "residency=sharded in several processes"
        )
    if recipe.end_to_end.epochs:  # for the way back, all layers would be kept
        raise CapreseError(
            "a streamed base is trained layer by layer alone; use end_to_end.epochs=0, or residency=sharded in several "
            "processes"
        )


def check_samples(samples: Mapping[str, Sequence[Sample]]) -> None:
    """Refuse samples from which nothing can be learned.

    Raises:
        CapreseError: a split whose answers are all empty or one token, or training samples that all say the same.
    """
    why = "usually the chat template or the end of text is not the model's; look at the shards in samples/"
    for split, rows in samples.items():
        if split != ELSEWHERE and not any(len(each.completion_ids) > 1 for each in rows):
            raise CapreseError(
                f"nothing can be learned: no {split} sample is longer than one token: {why}, or give more or other "
                "prompts"
            )
    train = samples["train"]
    if len(train) > 1 and all(each.completion_ids == train[0].completion_ids for each in train):
        raise CapreseError(f"nothing can be learned: all {len(train)} training samples say the same: {why}")


@dataclass(frozen=True)
class Calibrating:
    """How methods learn from samples: the part of a recipe that `choose` takes."""

    samples: int
    """Of the training samples."""
    batch_size: int
    cache_gigabytes: float
    target_kl: float | None = None
    """Allocate sparsity to layers until KL(dense || efficient) reaches this."""
    target_active: float | None = None
    """Allocate sparsity to layers until this fraction of the active parameters is left."""
    prefill: Prefill = "dense"
    """How prompts will run."""

    @property
    def allocates(self) -> bool:
        return self.target_kl is not None or self.target_active is not None


def choose(
    model: nn.Module,
    methods: tuple[Method, ...],
    samples: Mapping[str, Sequence[Sample]],
    config: Calibrating,
    alignment: Alignment,
    run: Checkpoints,
) -> tuple[tuple[Method, ...], dict[str, torch.Tensor] | None]:
    """What the methods learn from samples: how much each layer gets where that is asked for, which layers they act on
    where that is to be measured, and their calibration.

    Returns: the methods, settled, and what `apply` takes as calibration.
    """
    if not (config.allocates or needs_calibration(methods) or any(each.undecided for each in methods)):
        return methods, None
    train, validation = samples["train"][: config.samples], samples["validation"]

    def make() -> Kept:
        chosen = tuple(
            _decide(model, each, train, validation, config, alignment, run) if each.undecided else each
            for each in methods
        )
        rows = make_batches(train, config.batch_size)
        if config.allocates:
            (one,) = chosen
            assert isinstance(one, Sparse)
            held_out = make_batches(validation, config.batch_size, first=config.prefill != "dense")
            sensitivity = Sensitivity(model, one, rows, held_out, config.cache_gigabytes, config.prefill)
            with run.bar("sensitivity", len(LEVELS) * len(sensitivity.sites), "layers") as advance:
                target = {"target_kl": config.target_kl, "target_active": config.target_active}
                chosen = (allocate_sparsity(sensitivity, advance=advance, **target),)
        calibration: dict[str, torch.Tensor] = {}
        # sorted by length; the first, a method may look at closely
        ordered = [*rows[len(rows) // 2 :], *rows[: len(rows) // 2]]
        if needs_calibration(chosen):
            learners = sum("samples" in m.learns for m in chosen)
            with run.bar("calibration", learners * len(ordered), "batches") as advance:
                calibration = calibrate(model, chosen, [batch.whole(config.prefill) for batch in ordered], advance)
        return calibration, {"methods": [facts_of(method) for method in chosen]}

    with run.stage("calibration") as stage:
        calibration, facts = run.once("methods", make)
        methods = compose([make_method(each) for each in facts["methods"]])
        stage.update(note=describe_methods(methods))
    return methods, calibration or None


def _decide(
    model: nn.Module,
    method: Method,
    train: Sequence[Sample],
    validation: Sequence[Sample],
    config: Calibrating,
    alignment: Alignment,
    run: Checkpoints,
) -> Method:
    """The method on the layers that are best, by what its trials cost."""
    if kind := method.measured_on:
        validation = [sample for sample in validation if sample.source.partition(":")[0] == kind]
        if not validation:
            raise CapreseError(
                f"{method.name} is to be measured on {kind}, of which no held-out sample is; raise `samples.validation`"
            )
    rows = make_batches(train, alignment.micro_batch)
    held_out = make_batches(validation, alignment.micro_batch, first=not method.dense_prompts)
    decided, cost = select_layers(model, method, rows, held_out, alignment, config.cache_gigabytes, run)
    say(f"KL of {method.trains}, by layer: " + ", ".join(f"{name} {kl:.4f}" for name, kl in cost.items()))
    return decided
