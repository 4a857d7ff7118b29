"""The paper's own layer-wise recipe, kept as the baseline: Adam 1e-3, 20 epochs, linear schedule, 2% warm-up.

All layers train at once from one forward pass; their losses do not touch, so this equals training each alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers import get_linear_schedule_with_warmup

from caprese.adapters import branch_parameters
from caprese.distill.batches import Batch, completion_hidden, prefill
from caprese.distill.descend import check_finite
from caprese.distill.layerwise import Layerwise
from caprese.efficient_methods import EfficientFFN, phases_of
from caprese.models import device_of

Activations = dict[EfficientFFN, tuple[torch.Tensor, torch.Tensor]]


@torch.no_grad()
def collect_activations(model: nn.Module, batch: Batch) -> Activations:
    """x and E [n, D] of every applied layer for one batch."""
    seen: Activations = {}

    def observe(wrapper: EfficientFFN, x: torch.Tensor, e: torch.Tensor, _: torch.Tensor) -> None:
        seen[wrapper] = (x, e)

    batch = batch.to(device_of(model))
    completion_hidden(model, batch, prefill(model, batch), observe)
    return seen


def fit_adam(
    model: nn.Module,
    batches: Sequence[Batch],
    config: Layerwise,
    seed: int,
    advance: Callable[[int], None] | None = None,
    known: dict[int, Activations] | None = None,
) -> None:
    """Train every branch on its own layer's residual, in place.

    Args:
        known: activations by batch number, if they were collected before.

    Raises:
        CapreseError: a loss or gradient that is not finite.
    """
    parameters = branch_parameters(model)
    for parameter in parameters:
        parameter.requires_grad_(True)
    prompts = phases_of(model).prefill == "efficient"
    tokens = [int(batch.mask.sum()) + prompts * int(batch.prompt_mask.sum()) for batch in batches]
    per_batch = [-(-count // config.token_batch) for count in tokens]
    total = sum(per_batch) * config.epochs
    optimizer = torch.optim.Adam(parameters, lr=config.learning_rate)
    schedule = get_linear_schedule_with_warmup(optimizer, round(0.02 * total), total)
    known = {} if known is None else known
    for epoch in range(config.epochs):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        for index in torch.randperm(len(batches), generator=generator).tolist():
            seen = known.get(index) or collect_activations(model, batches[index])
            if config.cache_activations:
                known[index] = seen
            order = torch.randperm(tokens[index], generator=generator)
            for part in order.split(config.token_batch):
                loss = torch.zeros(())
                for wrapper, (x, e) in seen.items():
                    loss = loss + (e[part] - wrapper.recovery(x[part])).square().sum(-1).mean()
                loss.backward()
                norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
                check_finite(f"epoch {epoch + 1} of layerwise", config.learning_rate, loss.detach(), norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                schedule.step()
        if advance is not None:
            advance(1)
    for parameter in parameters:
        parameter.requires_grad_(False)
