"""A recovery adapter from samples: stand-ins aligned, branches fitted by layer, then all of it trained end to end.

`recover` runs this between samples and evaluation; alone it is for whoever has an applied model and samples. A part
that does not help on held-out samples is not kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from peft import PeftModel
from torch import nn

from caprese.adapters import attach_adapter, empty_slots, get_branches, set_branch, set_branches
from caprese.data_gen import Sample
from caprese.distill.adam import fit_adam
from caprese.distill.align import Alignment, align, prepare
from caprese.distill.batches import make_batches
from caprese.distill.checkpoints import Checkpoints, Kept, shared
from caprese.distill.descend import Course
from caprese.distill.end_to_end import EndToEnd, train
from caprese.distill.layerwise import Fit, Layerwise, Moments, adding_to, allocate_ranks, fit_layer, new_moments
from caprese.distill.losses import kl_divergence
from caprese.distill.sequential import fit_sequential
from caprese.distill.streamed import moments_by_layer
from caprese.distill.teacher import HeldOut, Teacher
from caprese.efficient_methods import applied_ffns, idle_branches, only, phases_of, settle, stand_ins
from caprese.errors import CapreseError
from caprese.models import count_parameters
from caprese.models.residency import residency_of
from caprese.progress import say


@dataclass(frozen=True)
class Branches:
    """The size of the branches."""

    rank: int | Literal["auto"] = 256
    """Of each, 1 to D; auto spreads `budget` over the layers by their measured error curves."""
    budget: float = 0.01
    """rank auto: adapter parameters as a fraction of the base."""
    bias: bool = False
    """Also learn a bias [D] on each."""

    def check(self, hidden: int) -> None:
        """Refuse a rank that a hidden size D does not have.

        Raises:
            CapreseError: below 1 or above D.
        """
        if self.rank != "auto" and not 1 <= self.rank <= hidden:
            how = "exceeds" if self.rank > hidden else "is too small for"
            raise CapreseError(f"rank {self.rank} {how} the hidden size {hidden}; choose 1 to {hidden}, or auto")


@dataclass(frozen=True)
class Fitted:
    """What `fit` made, and how it went."""

    model: PeftModel
    """The applied model with its adapter."""
    ranks: list[int]
    """By applied layer."""
    kl: dict[str, float]
    """KL(dense || student) per token on validation samples: "efficient", "layerwise", and "end_to_end", the best."""
    curves: dict[str, Any]
    """Training and validation curves, as report.json has them."""


@dataclass(frozen=True)
class Distillation:
    """The settings of `fit`: a section for each of its parts."""

    branches: Branches = Branches()
    alignment: Alignment = field(default_factory=Alignment)
    layerwise: Layerwise = field(default_factory=Layerwise)
    end_to_end: EndToEnd = field(default_factory=EndToEnd)


def fit(
    model: nn.Module,
    train: Sequence[Sample],
    validation: Sequence[Sample],
    config: Distillation | None = None,
    run: Checkpoints | None = None,
) -> Fitted:
    """Distil what an applied model needs, in place: what stands in for parts of it, and a recovery adapter.

    Args:
        model: from `apply`, without an adapter.
        train: the dense model's own completions, to learn from.
        validation: others, which choose ridge and checkpoints.
        config: as in a recipe; None the defaults.
        run: its seed is used, and what it has is gone on from. None: seed 0, and nothing is kept.

    Raises:
        CapreseError: no method applied, a rank outside 1 to D, or a loss that is not finite; the model is then as
            `apply` left it, but for stand-ins.
    """
    config, run = config or Distillation(), run or Checkpoints()
    first, throughout = not phases_of(model).dense_prompts, phases_of(model).prefill == "efficient"
    try:
        aligned = _align(model, train, validation, config.alignment, run)
        size, room = config.layerwise.batch_size, config.end_to_end.cache_gigabytes
        if residency_of(model) == "sharded":  # all pass through it together, so none may remember what others do not
            room = 0
        held_out = HeldOut(model, make_batches(validation, size, first), room)
        teacher = Teacher(model, make_batches(train, size, first, throughout), room)
        with run.stage("layerwise") as stage:
            adapted, facts = fit_layers(model, teacher, held_out, config.branches, config.layerwise, run)
            kl = facts["kl"]
            stage.update(
                kept=kl["layerwise"] < kl["efficient"],
                note=f"held-out KL {kl['efficient']:.4f} -> {kl['layerwise']:.4f}",
            )
        start = min(kl.values())
        with run.stage("end_to_end") as stage:
            if config.end_to_end.micro_batch != size:  # else it remembers what the layers were fitted to
                batches = make_batches(train, config.end_to_end.micro_batch, first, throughout)
                teacher = Teacher(model, batches, room)
            last, by_kl = config.end_to_end, config.end_to_end.divergence is kl_divergence
            before = start if by_kl else shared(held_out.mean(last.divergence))
            course = fit_end_to_end(adapted, teacher, held_out, last, before, run)
            kl["end_to_end"] = course.best if by_kl else shared(held_out.kl())
            note = f"held-out KL {start:.4f} -> {kl['end_to_end']:.4f}"
            if not by_kl:
                note += f", {last.objective} at temperature {last.temperature:g} {before:.4f} -> {course.best:.4f}"
            stage.update(kept=course.best < before, note=note)
        settle(adapted)  # what is evaluated is what is saved
    except BaseException:
        empty_slots(model)
        raise
    curves = {
        **aligned,
        "end_to_end": course.curve,
        "validation": [
            {"stage": "aligned" if aligned else "efficient", "step": 0, "kl": kl["efficient"]},
            {"stage": "layerwise", "step": 0, "kl": kl["layerwise"]},
            *({"stage": "end_to_end", **point} for point in course.checks if by_kl),
        ],
        "rank_error": facts["rank_error"],
    }
    return Fitted(adapted, facts["ranks"], kl, curves)


def _align(
    model: nn.Module, train: Sequence[Sample], validation: Sequence[Sample], config: Alignment, run: Checkpoints
) -> dict[str, list[dict[str, float]]]:
    """Stand-ins learn what their methods ask of them; the training curves."""
    curves = {}
    methods = phases_of(model).methods
    batches, held_out = (make_batches(samples, config.micro_batch) for samples in (train, validation))
    prepare(model, methods, batches)
    for objective in (each for method in methods for each in method.objectives(config)):
        with run.stage(objective.name) as stage:
            before, after, curves[objective.name] = align(model, objective, batches, held_out, config, run)
            stage.update(kept=after < before, note=f"held-out error of {objective.what} {before:.4f} -> {after:.4f}")
    return curves


def fit_layers(
    model: nn.Module,
    train: Teacher,
    held_out: HeldOut,
    branches: Branches,
    config: Layerwise,
    run: Checkpoints | None = None,
) -> tuple[PeftModel, dict[str, Any]]:
    """Attach the adapter and fit each branch to its own layer; they end at zero if that does not lessen held-out KL.

    Returns: the model with its adapter, and {"ranks" by layer, "kl": {"efficient", "layerwise"}, "rank_error": mean
        relative FFN error on validation samples by rank}.
    """
    run = run or Checkpoints()
    count, hidden = len(applied_ffns(model)), next(iter(applied_ffns(model).values())).view.hidden_size
    if idle_branches(phases_of(model).methods):  # the smallest branch there is, at zero
        config, branches = config.model_copy(update={"how": "none"}), Branches(1, bias=branches.bias)
    branches.check(hidden)
    made: list[PeftModel] = []

    def make() -> Kept:
        budget = max(count, int(branches.budget * count_parameters(model) / (2 * hidden)))
        rank = branches.rank if branches.rank != "auto" else max(1, min(hidden, budget // count))
        ranks, fits = [rank] * count, list[Fit]()
        rank_error: dict[str, list[float]] = {"ranks": [], "error": []}
        if config.how == "closed" or branches.rank == "auto":
            if residency_of(model) != "whole":  # else every process would hold all layers' sums
                pairs = moments_by_layer(model, train.batches, held_out.batches)
            else:
                every = max(1, config.checkpoint_every // config.batch_size)
                sums = _moments(model, {"train": train, "validation": held_out}, every, run)
                pairs = zip(sums["train"], sums["validation"], strict=True)
            with run.bar("layerwise: solve", count, "layers") as advance:
                for fitted_on, held in pairs:
                    fit = fit_layer(fitted_on, held, rank, config.ridge, branches.bias)
                    fits.append(fit if branches.rank == "auto" else fit.cut(rank))
                    advance(1)
            rank_error = _rank_error([each.curve.clamp_min(0).sqrt() for each in fits])
            if branches.rank == "auto":
                ranks = shared(allocate_ranks([each.curve for each in fits], budget))
        made.append(_attach(model, ranks, branches.bias, run.seed))
        (adapted,) = made
        zero, kl = get_branches(adapted), {"efficient": held_out.kl()}
        if config.how == "closed":
            for wrapper, each, rank in zip(applied_ffns(adapted).values(), fits, ranks, strict=True):
                set_branch(wrapper.recovery, *each.at(rank))
        elif config.how == "sequential":
            with run.bar("layerwise: sequential", count, "layers") as advance:
                pair = train.batches, held_out.batches
                fit_sequential(adapted, *pair, ranks, config.ridge, branches.bias, advance)
        elif config.how == "adam":
            with run.bar("layerwise: Adam", config.epochs, "epochs") as advance:
                fit_adam(adapted, train.batches, config, run.seed, advance)
        kl["layerwise"] = held_out.kl() if config.how != "none" else kl["efficient"]
        tensors = get_branches(adapted) if kl["layerwise"] < kl["efficient"] else zero
        return tensors, {"ranks": ranks, "kl": kl, "rank_error": rank_error}

    tensors, facts = run.once("layerwise", make)
    adapted = made[0] if made else _attach(model, facts["ranks"], branches.bias, run.seed)
    set_branches(adapted, tensors)
    return adapted, facts


def _attach(model: nn.Module, ranks: list[int], bias: bool, seed: int) -> PeftModel:
    """The adapter at zero; its random half is the seed's."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted = attach_adapter(model, ranks, bias)
    return adapted.requires_grad_(False)


def _moments(
    model: nn.Module, teachers: Mapping[str, Teacher], every: int, run: Checkpoints
) -> dict[str, list[Moments]]:
    """One pass over train and validation samples, kept every few batches."""
    world = PartialState()
    sums = {split: new_moments(model) for split in teachers}
    work = [(split, index) for split, teacher in teachers.items() for index in range(len(teacher.batches))]
    done = 0
    if (found := run.load("moments")) is not None:
        tensors, facts = found
        done = facts["done"]
        for name, tensor in _named(sums).items():
            tensor.copy_(tensors[name])
    with run.bar("layerwise", len(work), "batches", done) as advance:
        while done < len(work):
            part = work[done : done + every]
            fresh = {split: new_moments(model) for split in teachers} if world.num_processes > 1 else sums
            for split, index in part[world.process_index :: world.num_processes]:
                teachers[split].observe(index, adding_to(model, fresh[split]))
                advance(world.num_processes)
            if world.num_processes > 1:
                totals = _named(sums)
                for name, new in _named(fresh).items():
                    totals[name].add_(reduce(new, "sum"))
            done += len(part)
            run.save("moments", _named(sums), {"done": done})
    return sums


def _named(sums: Mapping[str, list[Moments]]) -> dict[str, torch.Tensor]:
    return {
        f"{split}.{i}.{field}": tensor
        for split, group in sums.items()
        for i, moments in enumerate(group)
        for field, tensor in moments.tensors().items()
    }


def _rank_error(curves: list[torch.Tensor]) -> dict[str, list[float]]:
    """The mean relative FFN error on validation samples at ranks 0, 1, 2, 4, ..."""
    top = len(curves[0]) - 1
    ranks = [0, *(1 << i for i in range(top.bit_length()) if 1 << i <= top)]
    return {
        "ranks": [float(r) for r in ranks],
        "error": [float(torch.stack([c[r] for c in curves]).mean()) for r in ranks],
    }


def fit_end_to_end(
    adapted: nn.Module,
    teacher: Teacher,
    held_out: HeldOut,
    config: EndToEnd,
    start: float,
    run: Checkpoints | None = None,
) -> Course:
    """Train branches and stand-ins together, in rounds if asked; they end as they began if that does not lessen
    held-out KL.

    Args:
        start: what `held_out` says now of `config.divergence`.

    Returns: the best that it says, and the curves of the last round.
    """
    run = run or Checkpoints()
    if config.epochs == 0:
        return Course(start, [], [])
    before = get_branches(adapted)
    every = {w.layer for w in applied_ffns(adapted).values()}
    joining = [at.layer for at in stand_ins(adapted)] or sorted(every)
    names = [*(f"round-{number}" for number in range(1, config.rounds)), "end_to_end"]
    done = max((i for i, name in enumerate(names[1:], 1) if run.load(name) is not None), default=0)
    for number, name in enumerate(names[done:-1], done + 1):
        with only(adapted, every - set(joining) | joined(joining, number / config.rounds)):
            now = shared(held_out.mean(config.divergence))
            after = train(adapted, teacher, held_out, config, now, run, name).best
        say(
            f"round {number} of {config.rounds}: held-out {config.objective} of the layers so far "
            f"{now:.4f} -> {after:.4f}"
        )
    last = start if config.rounds == 1 else shared(held_out.mean(config.divergence))
    course = train(adapted, teacher, held_out, config, last, run, names[-1])
    if not course.best < start:
        set_branches(adapted, before)
    return course._replace(best=min(course.best, start))


def joined(layers: list[int], fraction: float) -> set[int]:
    """The first so many of `layers` in an order that is spread evenly from the beginning, so that each round's hold
    those of the round before."""
    bits = (len(layers) - 1).bit_length()
    order = sorted(range(len(layers)), key=lambda i: int(f"{i:0{bits}b}"[::-1], 2))
    return {layers[i] for i in order[: max(1, round(fraction * len(layers)))]}
