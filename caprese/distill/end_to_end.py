"""Stage 3: all branches together, against the dense model's own output.

Prompt tokens dense (unless they run efficient, too), completion tokens efficient; base weights frozen. The teacher is
the same model with transforms off.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from caprese.distill.batches import Batch, Context, completion_hidden, lm_logits, prefill
from caprese.distill.checkpoints import Checkpoints
from caprese.distill.descend import Course, Descent, descend
from caprese.distill.losses import CHUNK, hidden_kl, hidden_mse, kl_divergence
from caprese.distill.precision import exact_products
from caprese.efficient_methods import dense
from caprese.models import device_of


class EndToEnd(Descent):
    """Stage 3: how branches and stand-ins are trained together."""

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
        with exact_products(device_of(self.model)):
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
    held_out: HeldOut,
    config: EndToEnd,
    start: float,
    run: Checkpoints | None = None,
    name: str = "end_to_end",
) -> Course:
    """Train branches and stand-ins of `model` in place by its final output; see `descend`.

    Args:
        start: what `held_out.kl()` says now.
    """
    teacher = _Teacher(model, batches, config.cache_gigabytes)

    def loss(index: int) -> torch.Tensor:
        batch, context, target = teacher[index]
        hidden = completion_hidden(model, batch, context)
        if config.objective == "hidden":
            return hidden_mse(hidden, target)
        return hidden_kl(hidden, target, lambda h: lm_logits(model, h))

    return descend(model, batches, loss, held_out.kl, config, start, run, name)
