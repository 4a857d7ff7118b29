"""How close a cheaper model stays to the dense one on the dense model's own completions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from caprese.adapters import without_branches
from caprese.distill.batches import Batch, completion_hidden, lm_logits
from caprese.distill.losses import CHUNK, kl_divergence
from caprese.distill.teacher import Teacher
from caprese.efficient_methods import EfficientFFN, applied_ffns, dense, untrained
from caprese.progress import bar

VARIANTS = ("dense", "efficient", "recovered")


@contextmanager
def variant(model: nn.Module, name: str) -> Iterator[None]:
    """Run an applied model as "dense", "efficient" (what needs no training) or "recovered"."""
    with ExitStack() as stack:
        if name == "dense":
            stack.enter_context(dense(model))
        elif name == "efficient":
            stack.enter_context(untrained(model))
            stack.enter_context(without_branches(model))
        yield


@dataclass
class Tally:
    """Sums over predicted tokens: KL(dense || x), top-1 agreements, and the loss of the teacher's completions."""

    sums: torch.Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))
    tokens: int = 0

    def add(self, logits: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor) -> None:
        """Logits of a variant and of the dense model [n, V], and the tokens that followed [n]."""
        each = [
            kl_divergence(logits, teacher).sum(dtype=torch.float64),
            (logits.argmax(-1) == teacher.argmax(-1)).sum(dtype=torch.float64),
            nn.functional.cross_entropy(logits, targets, reduction="sum").double(),
        ]
        self.sums += torch.stack(each).cpu()
        self.tokens += len(targets)

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.sums + other.sums, self.tokens + other.tokens)

    def figures(self) -> dict[str, float]:
        """Means: {"kl", "top1_agreement", "perplexity"}."""
        kl, top1, loss = (self.sums / max(1, self.tokens)).tolist()
        return {"kl": max(kl, 0.0), "top1_agreement": top1, "perplexity": float(torch.tensor(loss).exp())}


def fidelity(
    model: nn.Module, batches: Sequence[Batch], names: Sequence[str] = VARIANTS
) -> dict[str, dict[str, float]]:
    """KL(dense || x), top-1 agreement and perplexity of the teacher's completions, for each variant.

    Means over the completion tokens that an efficient pass predicts (all but a completion's first where the prompt that
    predicts it is dense).
    """
    return {name: tally.figures() for name, tally in tally_fidelity(Teacher(model, batches, 0), names).items()}


@torch.no_grad()
def tally_fidelity(teacher: Teacher, names: Sequence[str] = VARIANTS) -> dict[str, Tally]:
    """The sums that `fidelity` gives the means of."""
    model = teacher.model
    tallies = {name: Tally() for name in names}
    with bar("evaluation: fidelity", len(teacher.batches), "batches") as advance:
        for index in range(len(teacher.batches)):
            batch, context, dense_hidden = teacher[index]
            hidden = {"dense": dense_hidden}
            for name in names:
                if name != "dense":
                    with variant(model, name):
                        hidden[name] = completion_hidden(model, batch, context)
            targets = batch.predicted
            for start in range(0, len(targets), CHUNK):
                part = slice(start, start + CHUNK)
                wanted = lm_logits(model, hidden["dense"][part])
                for name in names:
                    logits = wanted if name == "dense" else lm_logits(model, hidden[name][part])
                    tallies[name].add(logits, wanted, targets[part])
            advance(1)
    return tallies


@torch.no_grad()
def layer_errors(model: nn.Module, *teachers: Teacher) -> list[dict[str, float]]:
    """Per layer, ||FF(x) - FF_eff(x)|| / ||FF(x)|| with everything else dense, without and with the branch.

    What the dense model says on the way, the teachers remember.
    """
    ffns = list(applied_ffns(model).values())
    squares = {ffn: torch.zeros(3, dtype=torch.float64, device=ffn.view.device) for ffn in ffns}

    def observe(ffn: EfficientFFN, x: torch.Tensor, e: torch.Tensor, y: torch.Tensor) -> None:
        for at, each in enumerate((e, e - ffn.recovery(x), y)):
            squares[ffn][at] += each.float().square().sum(dtype=torch.float64)

    for teacher in teachers:
        for index in range(len(teacher.batches)):
            teacher.observe(index, observe)
    rows = []
    for ffn in ffns:
        errors, dense = squares[ffn][:2], squares[ffn][2]
        efficient, recovered = (errors / dense).sqrt().tolist()  # no number where nothing was seen
        slot: Any = ffn.recovery
        rank = slot.lora_A[slot.active_adapters[0]].out_features if isinstance(slot, LoraLayer) else 0
        rows.append({"layer": ffn.layer, "rank": rank, "efficient": efficient, "recovered": recovered})
    return rows
