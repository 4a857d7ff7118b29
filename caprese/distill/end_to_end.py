"""Stage 3: all branches together, against the dense model's own output.

Prompt tokens dense (unless they run efficient, too), completion tokens efficient; base weights frozen. The teacher is
the same model with transforms off.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from caprese.distill.batches import completion_hidden, lm_logits
from caprese.distill.checkpoints import Checkpoints
from caprese.distill.descend import Course, Descent, descend
from caprese.distill.losses import Divergence, hidden_loss, hidden_mse, kl_divergence, sharpened, total_variation
from caprese.distill.teacher import HeldOut, Teacher
from caprese.limits import Amount, Count


class EndToEnd(Descent):
    """Stage 3: how branches and stand-ins are trained together."""

    objective: Literal["kl", "hidden", "tv"] = "kl"
    """kl: KL(dense || student) of the next-token distributions. hidden: the paper's squared error of final hidden
    states. tv: their total variation, the chance that a drafted token is refused (see docs/lossless.md)."""
    temperature: Annotated[float, Field(ge=0.05, le=20)] = 1.0
    """Of both distributions in kl and tv."""
    rounds: Count = 1
    """Rounds of `epochs` each, in which ever more layers act, the last with all of them (stepwise replacement,
    arXiv 2408.15237, section 4.1)."""
    cache_gigabytes: Amount = 3.0
    """Memory for what does not change between epochs: prompt KV caches and the teacher's hidden states."""

    @property
    def divergence(self) -> Divergence:
        """What checkpoints are chosen by, and what is trained but with hidden."""
        kind = total_variation if self.objective == "tv" else kl_divergence
        return kind if self.objective == "hidden" else sharpened(kind, self.temperature)


def train(
    model: nn.Module,
    teacher: Teacher,
    held_out: HeldOut,
    config: EndToEnd,
    start: float,
    run: Checkpoints | None = None,
    name: str = "end_to_end",
) -> Course:
    """Train branches and stand-ins of `model` in place by its final output; see `descend`.

    Args:
        teacher: of the training samples, in micro-batches.
        start: what `held_out` says now of `config.divergence`.
    """

    def loss(index: int) -> torch.Tensor:
        batch, context, target = teacher[index]
        hidden = completion_hidden(model, batch, context)
        if config.objective == "hidden":
            return hidden_mse(hidden, target)
        return hidden_loss(hidden, target, lambda h: lm_logits(model, h), config.divergence)

    return descend(model, teacher.batches, loss, lambda: held_out.mean(config.divergence), config, start, run, name)
