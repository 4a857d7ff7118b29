"""Products in bfloat16 where this machine is faster at them: sampling and training of a float32 model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from caprese.models import device_of, unwrap
from caprese.models.quickest import product_seconds
from caprese.models.residency import residency_of

# How much faster bfloat16 has to be: below it, its rounding is not worth it.
_FASTER = 1.3
# [tokens, in] x [in, out] of a small FFN: large enough for bfloat16 instructions to show, and measured in milliseconds.
_SHAPE = (256, 576, 1536)


def is_quicker(model: nn.Module, tries: int = 5) -> bool:
    """Whether bfloat16 products take clearly less time here than the model's own of float32; measured."""
    if device_of(model).type != "cpu" or unwrap(model).dtype != torch.float32:  # accelerators run bfloat16 anyway
        return False
    single, half = (product_seconds(dtype, *_SHAPE, tries) for dtype in (torch.float32, torch.bfloat16))
    return single > _FASTER * half


@contextmanager
def quick_products(model: nn.Module, on: bool) -> Iterator[None]:
    """Inside, linear layers of a float32 model multiply in bfloat16, and sums and what is trained stay in float32."""
    # no cast is kept: after an optimiser step it would be that of the weights before
    with torch.autocast(device_of(model).type, torch.bfloat16, enabled=on, cache_enabled=False):
        yield


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Inside, what `quick_products` does is off: for what is measured, not trained."""
    with torch.autocast(device.type, enabled=False):
        yield


@contextmanager
def kept_casts(model: nn.Module, on: bool) -> Iterator[None]:
    """As `quick_products`, without gradients: weights are cast once and not at every step, for half as much memory
    again.

    Autocast keeps the casts of parameters that could be trained, and of no others.
    """
    kept = on and residency_of(model) == "whole"  # else the casts would be the base, whole
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()] if kept else []
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        with torch.autocast(device_of(model).type, torch.bfloat16, enabled=on, cache_enabled=kept):
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
