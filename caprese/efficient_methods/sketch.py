"""A quantile of magnitudes from counts in log-spaced bins: additive over tokens, of one size however many there are."""

from __future__ import annotations

import torch

# Bins are taken from the float's own bits: exponent and 6 bits of mantissa, so a bin is at most 1.6% wide, from 2^-40
# to 2^24.
_SHIFT = 17
_LOWEST = (127 - 40) << (23 - _SHIFT)
BINS = 64 << (23 - _SHIFT)


def counts(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Counts of |values| [B, T, N] over the tokens where mask [B, T] is true, [B, BINS] (int64)."""
    batch = len(values)
    bits = values.detach().abs().float().contiguous().view(torch.int32)
    index = ((bits >> _SHIFT) - _LOWEST).clamp(0, BINS - 1).long()
    index = index + torch.arange(batch, device=values.device)[:, None, None] * BINS
    return torch.bincount(index[mask].flatten(), minlength=batch * BINS).view(batch, BINS)


def quantile(counted: torch.Tensor, fraction: float) -> torch.Tensor:
    """The magnitude below which `fraction` of the counted values lie, [...] for counts [..., BINS].

    Interpolated within its bin; 0, under which nothing lies, when nothing need.
    """
    drop = (fraction * counted.sum(-1, keepdim=True).double()).floor()
    above = counted.cumsum(-1)
    index = torch.searchsorted(above.double(), drop.double(), right=True).clamp_max(BINS - 1)
    count = counted.gather(-1, index)
    below = above.gather(-1, index) - count
    low, high = _edge(index), _edge(index + 1)
    value = low + (high - low) * ((drop - below) / count.clamp_min(1)).float()
    return torch.where(drop > 0, value, torch.zeros_like(value)).squeeze(-1)


def _edge(index: torch.Tensor) -> torch.Tensor:
    """The lower edge of a bin."""
    return ((index + _LOWEST) << _SHIFT).int().view(torch.float32)
