"""Gradient descent that survives a kill: branches and stand-ins of a model, by any loss and any check.

Batches are always the same, in an order that the seed and the epoch give, and state is kept every few steps, so a run
that was killed ends with the same adapter as one that was not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple, Self

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, reduce
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import nn
from transformers import get_linear_schedule_with_warmup

from caprese.adapters import branch_parameters, get_branches, set_branches
from caprese.distill.batches import Batch
from caprese.distill.checkpoints import Checkpoints, shared
from caprese.efficient_methods import stand_ins
from caprese.errors import CapreseError
from caprese.limits import Amount, Count, Rate, Some
from caprese.models import device_of
from caprese.models.residency import dealt


class Descent(BaseModel):
    """How parameters are trained by gradient descent."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    epochs: Some = 3
    """Passes over the samples; 0 skips the stage."""
    learning_rate: Rate = 2e-4
    """Peak of a linear schedule with 2% warm-up; smaller for larger models."""
    batch_size: Count = 16
    """Sequences in one optimiser step; a multiple of micro_batch."""
    micro_batch: Count = 8
    """Sequences in one forward pass; gradients accumulate up to batch_size."""
    weight_decay: Amount = 0.0
    clip: Annotated[Amount, Field(gt=0)] = 1.0
    """Largest gradient norm."""
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.02
    """Fraction of the steps in which the rate rises."""
    checkpoint_every: Count = 5
    """Optimiser steps between two saved states: what a kill can cost."""

    @model_validator(mode="after")
    def _whole_micro_batches(self) -> Self:
        if self.batch_size % self.micro_batch:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch {self.micro_batch}; change one of them"
            )
        return self


class Course(NamedTuple):
    """What came of a descent."""

    best: float
    """The least that the check said, at the start or after an epoch."""
    curve: list[dict[str, float]]
    """By optimiser step: "step", "epoch", "loss" (per token), "lr"."""
    checks: list[dict[str, float]]
    """By epoch: "step", "kl" (what the check said)."""


def descend(
    model: nn.Module,
    batches: Sequence[Batch],
    loss_of: Callable[[int], torch.Tensor],
    check: Callable[[], float],
    config: Descent,
    start: float,
    run: Checkpoints | None = None,
    name: str = "descent",
) -> Course:
    """Train branches and stand-ins of `model` in place; they end as the best checkpoint by `check`, or as they began.

    Args:
        batches: micro-batches of the training samples.
        loss_of: the loss of one of them by number, a scalar, summed over its completion tokens.
        check: asked after every epoch on what is held out; less is better.
        start: what `check` says at the beginning.
        run: its seed gives the order; the state is kept there under `name`, and gone on from. None: seed 0, not kept.

    Raises:
        CapreseError: the loss is not finite, or the state is damaged or belongs to something else.
    """
    world, run = PartialState(), run or Checkpoints()
    parameters = branch_parameters(model)
    for parameter in parameters:
        parameter.requires_grad_(True)
    accumulate = config.batch_size // config.micro_batch
    steps_per_epoch = -(-len(batches) // accumulate)
    total = steps_per_epoch * config.epochs
    optimizer = torch.optim.AdamW(_by_rate(model, parameters, config.learning_rate), weight_decay=config.weight_decay)
    schedule = get_linear_schedule_with_warmup(optimizer, round(config.warmup * total), total)
    least, best = start, get_branches(model)
    curve: list[dict[str, float]] = []
    checks: list[dict[str, float]] = []
    done = 0
    if (found := run.load(name)) is not None:
        tensors, facts = found
        done, least, curve, checks = facts["step"], facts["best_kl"], facts["curve"], facts["validation"]
        set_branches(model, _under("now.", tensors))
        best = _under("best.", tensors)
        for i, parameter in enumerate(parameters):
            if f"exp_avg.{i}" in tensors:
                optimizer.state[parameter] = {
                    "step": torch.tensor(float(done)),
                    "exp_avg": tensors[f"exp_avg.{i}"].to(parameter),
                    "exp_avg_sq": tensors[f"exp_avg_sq.{i}"].to(parameter),
                }
        for _ in range(done):  # replayed, because a scheduler's own state is a pickle
            optimizer._opt_called = True  # type: ignore[attr-defined]
            schedule.step()

    def keep(step: int) -> None:
        tensors = {f"now.{k}": v for k, v in get_branches(model).items()} | {f"best.{k}": v for k, v in best.items()}
        for i, parameter in enumerate(parameters):
            moments = optimizer.state.get(parameter, {})
            tensors |= {f"{k}.{i}": moments[k] for k in ("exp_avg", "exp_avg_sq") if k in moments}
        facts: dict[str, Any] = {"step": step, "best_kl": least, "curve": curve, "validation": checks}
        run.save(name, tensors, facts)

    with run.bar(name, total, "steps", done) as advance:
        for step in range(done, total):
            epoch, within = divmod(step, steps_per_epoch)
            order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(run.seed * 1_000_003 + epoch))
            chosen = order[within * accumulate : (within + 1) * accumulate].tolist()
            tokens = sum(batches[i].tokens for i in chosen)
            summed = torch.zeros((), device=device_of(model))
            for index, counts in dealt(model, chosen):
                loss = counts * loss_of(index) / tokens
                loss.backward()
                summed += loss.detach()
            if world.num_processes > 1:
                summed = reduce(summed, "sum")
                _add_up(parameters, summed.device)
            norm = nn.utils.clip_grad_norm_(parameters, config.clip)
            check_finite(f"step {step + 1} of {name.replace('_', ' ')}", config.learning_rate, summed, norm)
            rate = max(schedule.get_last_lr())
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            curve.append({"step": step + 1, "epoch": (step + 1) / steps_per_epoch, "loss": float(summed), "lr": rate})
            if within == steps_per_epoch - 1:
                now = shared(check())  # all keep the same checkpoint
                checks.append({"step": step + 1, "kl": now})
                if now < least:
                    least, best = now, get_branches(model)
            if (step + 1) % config.checkpoint_every == 0 or step + 1 == total:
                keep(step + 1)
            advance(1)
    set_branches(model, best)
    for parameter in parameters:
        parameter.requires_grad_(False)
        broadcast(parameter.data)
    return Course(least, curve, checks)


def check_finite(where: str, rate: float, loss: torch.Tensor, norm: torch.Tensor) -> None:
    """Refuse a step whose loss or gradient is no number, before anything of it is kept.

    Args:
        where: the step, as the line says it.
        rate: the learning rate.
        loss: a scalar.
        norm: of the gradient, a scalar.

    Raises:
        CapreseError: one of them is NaN or infinite.
    """
    for what, value in (("loss", loss), ("gradient's norm", norm)):
        if not torch.isfinite(value):
            raise CapreseError(f"the {what} is {float(value)} at {where}; lower its learning_rate (now {rate:g})")


def _by_rate(model: nn.Module, parameters: Sequence[nn.Parameter], rate: float) -> list[dict[str, Any]]:
    """Those that learn at a fraction of the rate apart from the others."""
    known = {id(p): at.rate_of(name) for at in stand_ins(model) for name, p in at.trained.named_parameters()}
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault(known.get(id(parameter), 1.0), []).append(parameter)
    return [{"params": group, "lr": relative * rate} for relative, group in groups.items()]


def _add_up(parameters: Sequence[nn.Parameter], device: torch.device) -> None:
    """Sum gradients over processes; layers that do not act have none anywhere."""
    known = reduce(torch.tensor([float(p.grad is not None) for p in parameters]).to(device), "sum")
    for parameter, any_has in zip(parameters, known.tolist(), strict=True):
        if any_has:
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = reduce(grad, "sum")


def _under(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
