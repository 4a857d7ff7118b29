"""Aligning mixers with the attentions they replace: every layer alone, all in parallel, on the teacher's inputs.

Each mixer sees what its attention saw in the dense model and is to give what it gave (the second stage of MOHAWK,
arXiv 2408.10189, section 4.2, on mixers instead of blocks). No gradient goes from layer to layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from caprese.distill.batches import Batch, _positions
from caprese.efficient_methods import Replacement, dense, phases, phases_of
from caprese.models import unwrap


def replacements(model: nn.Module) -> list[Replacement]:
    """The replaced attentions of a model, in layer order."""
    return [m for m in unwrap(model).modules() if isinstance(m, Replacement)]


@torch.no_grad()
def teacher_mixing(model: nn.Module, batch: Batch) -> tuple[dict[int, tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
    """By layer, what each replaced attention saw and gave in the dense model, [B, T, D], and which tokens are real."""
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    mask = torch.cat([batch.prompt_mask, batch.mask], 1)
    shared = phases_of(model)
    shared.mixer_observer = lambda at, x, out, _: seen.__setitem__(at.layer, (x, out))
    try:
        with dense(model), phases(model, batch.prompt_lengths):
            unwrap(model).get_decoder()(
                input_ids=torch.cat([batch.prompt, batch.inputs], 1),
                attention_mask=mask.long(),
                position_ids=_positions(mask),
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


def align(
    model: nn.Module, batches: Sequence[Batch], steps: int, learning_rate: float, seed: int
) -> list[dict[str, float]]:
    """Prototype loop."""
    parameters = [p for at in replacements(model) for p in at.mixer.parameters()]
    for p in parameters:
        p.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1, (s + 1) / 20) * max(0.0, 1 - s / steps))
    generator = torch.Generator().manual_seed(seed)
    curve, tokens = [], 0
    for number in range(steps):
        batch = batches[int(torch.randint(len(batches), (1,), generator=generator))]
        tokens += batch.tokens
        loss = alignment(model, batch)
        loss.sum().backward()
        nn.utils.clip_grad_norm_(parameters, 1.0 * len(loss))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        curve.append({"step": number + 1, "tokens": tokens, "error": float(loss.detach().mean())})
    for p in parameters:
        p.requires_grad_(False)
    return curve
