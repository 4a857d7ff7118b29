"""CATS (arXiv 2404.08763): each token keeps the neurons whose gate activation is large."""

from __future__ import annotations

from typing import ClassVar

import torch

from caprese.efficient_methods.base import Method

# |act(gate)| is counted in bins taken from the float's own bits: exponent and 6 bits of mantissa, so a bin is at most
# 1.6% wide, from 2^-40 to 2^24. The counts add up exactly whatever the chunks, and their size does not depend on
# the number of tokens.
_SHIFT = 17
_LOWEST = (127 - 40) << (23 - _SHIFT)
_BINS = 64 << (23 - _SHIFT)


def _bin(a: torch.Tensor) -> torch.Tensor:
    bits = a.abs().float().contiguous().view(torch.int32)
    return ((bits >> _SHIFT) - _LOWEST).clamp(0, _BINS - 1).long()


def _edge(index: torch.Tensor) -> torch.Tensor:
    """The lower edge of a bin; the exact inverse of `_bin`'s shift."""
    return ((index + _LOWEST) << _SHIFT).int().view(torch.float32)


class Cats(Method):
    """Keep neuron j of a token when |act(gate)_j| >= tau, the sparsity-quantile of |act(gate)| over the prompt."""

    name: ClassVar[str] = "cats"
    per_token: ClassVar[bool] = True

    def statistic(self, a: torch.Tensor, z: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Counts of |act(gate)| in log-spaced bins, [B, bins] (int64)."""
        batch = len(a)
        index = _bin(a) + torch.arange(batch, device=a.device)[:, None, None] * _BINS
        return torch.bincount(index[mask].flatten(), minlength=batch * _BINS).view(batch, _BINS)

    def choose(self, statistic: torch.Tensor, width: int) -> torch.Tensor:
        """tau, [B, 1, 1]: the quantile, interpolated within its bin; 0 keeps everything when nothing need go."""
        total = statistic.sum(-1, keepdim=True)
        drop = (self.sparsity * total).floor()
        above = statistic.cumsum(-1)
        index = torch.searchsorted(above.double(), drop.double(), right=True).clamp_max(_BINS - 1)
        count = statistic.gather(-1, index)
        below = above.gather(-1, index) - count
        low, high = _edge(index), _edge(index + 1)
        tau = low + (high - low) * ((drop - below) / count.clamp_min(1)).float()
        return torch.where(drop > 0, tau, torch.zeros_like(tau)).unsqueeze(-1)

    def keep(self, a: torch.Tensor, z: torch.Tensor, choice: torch.Tensor) -> torch.Tensor:
        return a.abs() >= choice

    def active_parameters(self, hidden: int, width: int) -> int:
        return hidden * width + 2 * hidden * self.kept(width)
