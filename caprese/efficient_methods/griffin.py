"""GRIFFIN (arXiv 2404.01365): the prompt chooses the neurons for the whole generation."""

from __future__ import annotations

from typing import ClassVar

import torch

from caprese.efficient_methods.base import Method


class Griffin(Method):
    """Keep the k neurons with the largest s_j = || z_ij / ||z_i||_2 ||_2 over the prompt tokens i, per sequence."""

    name: ClassVar[str] = "griffin"
    per_token: ClassVar[bool] = False

    def statistic(self, a: torch.Tensor, z: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """s squared, [B, F]: squares add up over tokens, and top-k of s and of s*s are the same."""
        squares = z.float().square()
        weight = mask / squares.sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
        return torch.einsum("btf,bt->bf", squares, weight)

    def choose(self, statistic: torch.Tensor, width: int) -> torch.Tensor:
        """Bool [B, 1, F] with exactly k true in each row."""
        top = statistic.topk(self.kept(width), dim=-1).indices
        return torch.zeros_like(statistic, dtype=torch.bool).scatter_(-1, top, True).unsqueeze(1)

    def keep(self, a: torch.Tensor, z: torch.Tensor, choice: torch.Tensor) -> torch.Tensor:
        return choice

    def active_parameters(self, hidden: int, width: int) -> int:
        return 3 * hidden * self.kept(width)
