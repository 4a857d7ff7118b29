"""Stage 3: all branches together, against the dense model's own output.

Prompt tokens dense, completion tokens efficient; base weights frozen. The teacher is the same model with transforms
off. Batches are always the same, in an order that the seed and the epoch give, and state is written every few steps,
so a run that was killed ends with the same adapter as one that was not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, broadcast_object_list, reduce
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import nn
from transformers import get_linear_schedule_with_warmup

from caprese.adapters import branch_parameters, get_branches, set_branches
from caprese.distill.batches import Batch, Context, completion_hidden, lm_logits, prefill
from caprese.distill.losses import CHUNK, hidden_kl, hidden_mse, kl_divergence
from caprese.efficient_methods import dense
from caprese.errors import CapreseError
from caprese.files import read_tensors, write_tensors
from caprese.models import device_of
from caprese.progress import bar


class Descent(BaseModel):
    """How parameters are trained by gradient descent."""

    model_config = ConfigDict(extra="forbid")

    epochs: Annotated[int, Field(ge=0)] = 3
    """Passes over the samples; 0 skips the stage."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    """Peak of a linear schedule with 2% warm-up; smaller for larger models."""
    batch_size: Annotated[int, Field(ge=1)] = 16
    """Sequences in one optimiser step; a multiple of micro_batch."""
    micro_batch: Annotated[int, Field(ge=1)] = 8
    """Sequences in one forward pass; gradients accumulate up to batch_size."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip: Annotated[float, Field(gt=0)] = 1.0
    """Largest gradient norm."""
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.02
    """Fraction of the steps in which the rate rises."""
    checkpoint_every: Annotated[int, Field(ge=1)] = 5
    """Optimiser steps between two saved states: what a kill can cost."""

    @model_validator(mode="after")
    def _whole_micro_batches(self) -> Self:
        if self.batch_size % self.micro_batch:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch {self.micro_batch}; change one of them"
            )
        return self


class EndToEnd(Descent):
    """Stage 3: how branches and mixers are trained together."""

    objective: Literal["kl", "hidden"] = "kl"
    """kl: KL(dense || student) of the next-token distributions. hidden: the paper's squared error of final hidden
    states."""
    rounds: Annotated[int, Field(ge=1)] = 1
    """Rounds of `epochs` each, in which ever more layers act, the last with all of them (stepwise replacement,
    arXiv 2408.15237, section 4.1)."""
    cache_gigabytes: Annotated[float, Field(ge=0)] = 3.0
    """Memory for what does not change between epochs: prompt KV caches and the teacher's hidden states."""


class _Teacher:
    """Prompt caches and teacher states by batch, remembered up to a limit; the same whether remembered or not."""

    def __init__(self, model: nn.Module, batches: Sequence[Batch], limit: float) -> None:
        self.model, self.batches, self.left = model, batches, limit * 1e9
        self.known: dict[int, tuple[Batch, Context, torch.Tensor]] = {}

    @torch.no_grad()
    def __getitem__(self, index: int) -> tuple[Batch, Context, torch.Tensor]:
        """The batch on its device, what comes before its completion, and the teacher's completion states [n, D]."""
        if index in self.known:
            return self.known[index]
        batch = self.batches[index].to(device_of(self.model))
        context = prefill(self.model, batch)
        with dense(self.model):
            hidden = completion_hidden(self.model, batch, context)
        item = (batch, context, hidden)
        size = hidden.nbytes + context.nbytes
        if size <= self.left:
            self.left -= size
            self.known[index] = item
        return item


class HeldOut:
    """Validation batches with their teacher states, for asking again and again."""

    def __init__(self, model: nn.Module, batches: Sequence[Batch], limit: float) -> None:
        self.model, self.teacher = model, _Teacher(model, batches, limit)

    @torch.no_grad()
    def kl(self) -> float:
        """KL(dense || student) per completion token."""
        total, tokens = 0.0, 0
        for index in range(len(self.teacher.batches)):
            batch, cache, target = self.teacher[index]
            hidden = completion_hidden(self.model, batch, cache)
            for start in range(0, len(hidden), CHUNK):
                part = slice(start, start + CHUNK)
                student, teacher = lm_logits(self.model, hidden[part]), lm_logits(self.model, target[part])
                total += float(kl_divergence(student, teacher).sum(dtype=torch.float64))
            tokens += batch.tokens
        return total / max(1, tokens)


def train(
    model: nn.Module,
    batches: Sequence[Batch],
    validation: HeldOut,
    config: EndToEnd,
    seed: int,
    state: Path,
    identity: str,
    start_kl: float,
) -> tuple[float, list[dict[str, float]], list[dict[str, float]]]:
    """Train branches and mixers of `model` in place by its final output; see `descend`."""
    teacher = _Teacher(model, batches, config.cache_gigabytes)

    def loss(index: int) -> torch.Tensor:
        batch, context, target = teacher[index]
        hidden = completion_hidden(model, batch, context)
        if config.objective == "hidden":
            return hidden_mse(hidden, target)
        return hidden_kl(hidden, target, lambda h: lm_logits(model, h))

    return descend(model, batches, loss, validation.kl, config, seed, state, identity, start_kl, "3/4 end-to-end")


def descend(
    model: nn.Module,
    batches: Sequence[Batch],
    loss_of: Callable[[int], torch.Tensor],
    check: Callable[[], float],
    config: Descent,
    seed: int,
    state: Path,
    identity: str,
    start: float,
    label: str,
) -> tuple[float, list[dict[str, float]], list[dict[str, float]]]:
    """Train branches and mixers of `model` in place; they end as the best checkpoint by `check`, or as they began.

    Args:
        batches: micro-batches of the training samples.
        loss_of: the loss of one of them, summed over its completion tokens.
        check: asked after every epoch on what is held out; less is better.
        state: file the run is resumed from and kept in.
        identity: what the state must belong to (recipe, samples, start).
        start: what `check` says at the beginning.
        label: of the progress bar.

    Returns: the best of `check`, the training curve and the validation curve.

    Raises:
        CapreseError: the loss is not finite, or the state belongs to something else.
    """
    world = PartialState()
    parameters = branch_parameters(model)
    for parameter in parameters:
        parameter.requires_grad_(True)
    accumulate = config.batch_size // config.micro_batch
    steps_per_epoch = -(-len(batches) // accumulate)
    total = steps_per_epoch * config.epochs
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    schedule = get_linear_schedule_with_warmup(optimizer, round(config.warmup * total), total)
    best_kl, best = start, get_branches(model)
    curve: list[dict[str, float]] = []
    held_out: list[dict[str, float]] = []
    done = 0
    if state.exists():
        tensors, facts = read_tensors(state, "delete it and run again to repeat this stage")
        if facts["identity"] != identity:
            raise CapreseError(f"{state} belongs to another recipe; choose another --output, or delete that file")
        done, best_kl, curve, held_out = facts["step"], facts["best_kl"], facts["curve"], facts["validation"]
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

    def keep_state(step: int) -> None:
        if not world.is_main_process:
            return
        tensors = {f"now.{k}": v for k, v in get_branches(model).items()} | {f"best.{k}": v for k, v in best.items()}
        for i, parameter in enumerate(parameters):
            moments = optimizer.state.get(parameter, {})
            tensors |= {f"{k}.{i}": moments[k] for k in ("exp_avg", "exp_avg_sq") if k in moments}
        facts = {"identity": identity, "step": step, "best_kl": best_kl, "curve": curve, "validation": held_out}
        write_tensors(state, tensors, facts)

    with bar(label, total, "steps", done) as advance:
        for step in range(done, total):
            epoch, within = divmod(step, steps_per_epoch)
            order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
            chosen = order[within * accumulate : (within + 1) * accumulate].tolist()
            tokens = sum(batches[i].tokens for i in chosen)
            summed = torch.zeros((), device=device_of(model))
            for index in chosen[world.process_index :: world.num_processes]:
                loss = loss_of(index) / tokens
                loss.backward()
                summed += loss.detach()
            if world.num_processes > 1:
                summed = reduce(summed, "sum")
                # layers that do not act have no gradient anywhere
                known = reduce(torch.tensor([float(p.grad is not None) for p in parameters]).to(summed.device), "sum")
                for parameter, any_has in zip(parameters, known.tolist(), strict=True):
                    if any_has:
                        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                        parameter.grad = reduce(grad, "sum")
            if not torch.isfinite(summed):
                raise CapreseError(
                    f"the loss is {float(summed)} at step {step + 1} of {label[4:]}; lower its learning_rate (now "
                    f"{config.learning_rate:g})"
                )
            nn.utils.clip_grad_norm_(parameters, config.clip)
            rate = schedule.get_last_lr()[0]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            curve.append({"step": step + 1, "epoch": (step + 1) / steps_per_epoch, "loss": float(summed), "lr": rate})
            if within == steps_per_epoch - 1:
                kl = broadcast_object_list([check()])[0]  # all keep the same checkpoint
                held_out.append({"step": step + 1, "kl": kl})
                if kl < best_kl:
                    best_kl, best = kl, get_branches(model)
            if (step + 1) % config.checkpoint_every == 0 or step + 1 == total:
                keep_state(step + 1)
            advance(1)
    set_branches(model, best)
    for parameter in parameters:
        parameter.requires_grad_(False)
        broadcast(parameter.data)
    return best_kl, curve, held_out


def _under(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
