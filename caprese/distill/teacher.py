"""The dense model's answers to batches of samples, remembered between the stages and epochs that ask for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from caprese.distill.batches import Batch, Context, completion_hidden, lm_logits, prefill
from caprese.distill.losses import CHUNK, Divergence, kl_divergence
from caprese.distill.precision import exact_products
from caprese.efficient_methods import Observer, dense, stand_ins
from caprese.models import device_of


class Teacher:
    """What comes before each batch's completion and the dense model's hidden states of it, remembered up to a limit;
    the same whether remembered or not."""

    def __init__(self, model: nn.Module, batches: Sequence[Batch], gigabytes: float) -> None:
        self.model, self.batches, self.left = model, batches, gigabytes * 1e9
        self.known: dict[int, tuple[Batch, Context, torch.Tensor]] = {}

    @torch.no_grad()
    def __getitem__(self, index: int) -> tuple[Batch, Context, torch.Tensor]:
        """The batch on its device, what comes before its completion, and the teacher's completion states [n, D]."""
        if index in self.known:
            return self.known[index]
        batch, context = self._before(index)
        with dense(self.model):
            hidden = completion_hidden(self.model, batch, context)
        return self._remember(index, batch, context, hidden)

    @torch.no_grad()
    def observe(self, index: int, observer: Observer) -> None:
        """Show the completion tokens of every FFN in the dense pass over a batch."""
        batch, context = self._before(index)
        hidden = completion_hidden(self.model, batch, context, observer)
        # what is observed is the teacher's own pass, but for attentions' stand-ins and where it stops to choose anew
        if len(context.blocks) <= 1 and not stand_ins(self.model):
            self._remember(index, batch, context, hidden)

    def _before(self, index: int) -> tuple[Batch, Context]:
        if index in self.known:
            return self.known[index][:2]
        batch = self.batches[index].to(device_of(self.model))
        return batch, prefill(self.model, batch)

    def _remember(
        self, index: int, batch: Batch, context: Context, hidden: torch.Tensor
    ) -> tuple[Batch, Context, torch.Tensor]:
        size = hidden.nbytes + context.nbytes
        if index not in self.known and size <= self.left:
            self.left -= size
            self.known[index] = batch, context, hidden
        return batch, context, hidden


class HeldOut(Teacher):
    """Of validation batches, for asking again and again how far the student is: measured in exact products."""

    def observe(self, index: int, observer: Observer) -> None:
        with exact_products(device_of(self.model)):
            super().observe(index, observer)

    def kl(self) -> float:
        """KL(dense || student) per completion token."""
        return self.mean(kl_divergence)

    @torch.no_grad()
    def mean(self, divergence: Divergence) -> float:
        """A divergence per completion token."""
        total, tokens = 0.0, 0
        with exact_products(device_of(self.model)):
            for index in range(len(self.batches)):
                batch, cache, target = self[index]
                hidden = completion_hidden(self.model, batch, cache)
                for start in range(0, len(hidden), CHUNK):
                    part = slice(start, start + CHUNK)
                    student, teacher = lm_logits(self.model, hidden[part]), lm_logits(self.model, target[part])
                    total += float(divergence(student, teacher).sum(dtype=torch.float64))
                tokens += batch.tokens
        return total / max(1, tokens)
