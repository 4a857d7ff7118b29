"""Stand-ins before all that is trained is trained end to end: they learn by what their methods ask of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from caprese.distill.batches import Batch
from caprese.distill.checkpoints import Checkpoints, shared
from caprese.distill.descend import Descent, descend
from caprese.efficient_methods import Method, Objective
from caprese.limits import Amount, Rate, Some
from caprese.models import device_of


class Alignment(Descent):
    """Stage 2, where a method trains something in the place of attentions: what they gave is learned."""

    epochs: Some = 1
    """Passes over the samples with every stand-in alone, on what its attention saw; 0 skips this part."""
    hidden_epochs: Some = 0
    """Passes after those with all of them in place, learning the dense model's hidden states after every layer."""
    matrices: Amount = 0.0
    """With every stand-in alone: the weight, beside what it gives, of how it mixes tokens; takes memory by the square
    of the text's length."""
    learning_rate: Rate = 1e-3
    """Peak of a linear schedule with 2% warm-up."""


def prepare(model: nn.Module, methods: Sequence[Method], batches: Sequence[Batch]) -> None:
    """Show methods a batch of middle length before anything trains; `model` has them applied."""
    if batches:
        tokens = batches[len(batches) // 2].to(device_of(model)).whole()
        for method in methods:
            method.prepare(model, tokens)


def align(
    model: nn.Module,
    objective: Objective,
    batches: Sequence[Batch],
    validation: Sequence[Batch],
    config: Descent,
    run: Checkpoints | None = None,
) -> tuple[float, float, list[dict[str, float]]]:
    """Train the stand-ins of `model` in place by one objective; see `descend`.

    Args:
        config: its `epochs` are the objective's own.

    Returns: the mean error on `validation` before and after, and the training curve.
    """
    config = config.model_copy(update={"epochs": objective.epochs})
    held_out = [batch.to(device_of(model)) for batch in validation]

    @torch.no_grad()
    def check() -> float:
        errors = [float(objective.error(model, batch.whole()).mean()) * batch.tokens for batch in held_out]
        return sum(errors) / max(1, sum(batch.tokens for batch in held_out))

    def loss(index: int) -> torch.Tensor:
        batch = batches[index].to(device_of(model))
        return objective.error(model, batch.whole()).mean() * batch.tokens

    before = shared(check())
    after, curve, _ = descend(model, batches, loss, check, config, before, run, objective.name)
    return before, after, curve
