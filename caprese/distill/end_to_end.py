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
from caprese.distill.losses import hidden_kl, hidden_mse
from caprese.distill.teacher import HeldOut, Teacher


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
        start: what `held_out.kl()` says now.
    """

    def loss(index: int) -> torch.Tensor:
        batch, context, target = teacher[index]
        hidden = completion_hidden(model, batch, context)
        if config.objective == "hidden":
            return hidden_mse(hidden, target)
        return hidden_kl(hidden, target, lambda h: lm_logits(model, h))

    return descend(model, teacher.batches, loss, held_out.kl, config, start, run, name)
