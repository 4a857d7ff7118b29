"""Aligning mixers with the attentions they replace: every layer alone, all in parallel, on the teacher's inputs.

Each mixer sees what its attention saw in the dense model and is to give what it gave (the second stage of MOHAWK,
arXiv 2408.10189, section 4.2, on mixers instead of blocks). No gradient goes from layer to layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from caprese.distill.batches import Batch, device_of, positions_of
from caprese.distill.end_to_end import Descent, descend
from caprese.efficient_methods import dense, phases, phases_of, replacements
from caprese.models import unwrap


@torch.no_grad()
def teacher_mixing(model: nn.Module, batch: Batch) -> tuple[dict[int, tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
    """By layer, what each replaced attention saw and gave in the dense model, [B, T, D], and which tokens are real."""
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    mask = torch.cat([batch.prompt_mask, batch.mask], 1)
    shared = phases_of(model)
    shared.mixer_observer = lambda at, x, out: seen.__setitem__(at.layer, (x, out))
    try:
        with dense(model), phases(model, batch.prompt_lengths):
            unwrap(model).get_decoder()(
                input_ids=torch.cat([batch.prompt, batch.inputs], 1),
                attention_mask=mask.long(),
                position_ids=positions_of(mask),
                use_cache=False,
            )
    finally:
        shared.mixer_observer = None
    return seen, mask


def alignment(model: nn.Module, batch: Batch) -> torch.Tensor:
    """||mixer(x) - attention(x)||^2 / ||attention(x)||^2 over the real tokens of a batch, by layer [layers]."""
    seen, mask = teacher_mixing(model, batch)
    errors = []
    for at in replacements(model):
        x, out = seen[at.layer]
        y = at.mixer(x, mask)
        wanted = out[mask].float()
        errors.append((y[mask].float() - wanted).square().sum() / wanted.square().sum())
    return torch.stack(errors)


class Alignment(Descent):
    """Stage 2, where attentions are replaced: mixers learn what attention gave."""

    epochs: Annotated[int, Field(ge=0)] = 1
    """Passes over the samples; 0 skips the stage."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """Peak of a linear schedule with 2% warm-up."""


def align(
    model: nn.Module,
    batches: Sequence[Batch],
    validation: Sequence[Batch],
    config: Alignment,
    seed: int,
    state: Path,
    identity: str,
) -> tuple[float, float, list[dict[str, float]]]:
    """Train the mixers of `model` in place by `alignment`; see `descend`.

    Returns: the mean error on `validation` before and after, and the training curve.
    """
    held_out = [batch.to(device_of(model)) for batch in validation]

    @torch.no_grad()
    def check() -> float:
        tokens = sum(batch.tokens for batch in held_out)
        return sum(float(alignment(model, batch).mean()) * batch.tokens for batch in held_out) / max(1, tokens)

    def loss(index: int) -> torch.Tensor:
        batch = batches[index].to(device_of(model))
        return alignment(model, batch).mean() * batch.tokens

    before = check()
    if config.epochs == 0:
        return before, before, []
    after, curve, _ = descend(model, batches, loss, check, config, seed, state, identity, before, "2/4 alignment")
    return before, after, curve
