"""GRIFFIN (arXiv 2404.01365): the prompt chooses the neurons for the whole generation."""

from __future__ import annotations

from typing import ClassVar

import torch

from caprese.efficient_methods.base import FromPrompt, Part, Reads
from caprese.kernels import PackedFFN
from caprese.models import FFN


def relative_energy(z: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sum over tokens i of (z_ij / ||z_i||_2)^2, [B, F] for z [B, T, F]; at least in float32."""
    squares = z.detach().to(torch.promote_types(z.dtype, torch.float32)).square()
    weight = mask / squares.sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return torch.einsum("btf,bt->bf", squares, weight.to(squares.dtype))


class Griffin(FromPrompt):
    """Keep the k neurons with the largest s_j = || z_ij / ||z_i||_2 ||_2 over the prompt tokens i, per sequence."""

    name: ClassVar[str] = "griffin"
    summary: ClassVar[str] = "each prompt chooses the FFN neurons for its whole generation"
    parts: ClassVar[frozenset[Part]] = frozenset({"rows"})

    def statistic(self, x: torch.Tensor, a: torch.Tensor, z: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """s squared, [B, F]: squares add up over tokens, and top-k of s and of s*s are the same."""
        return relative_energy(z, mask)

    def choose(self, statistic: torch.Tensor, ffn: FFN | PackedFFN) -> torch.Tensor:
        """Bool [B, 1, F] with exactly k true in each row; of equal neurons the first.

        A sort, not topk, which breaks ties as the batch falls: behind a ReLU many neurons are silent on a short prompt.
        """
        top = statistic.sort(dim=-1, descending=True, stable=True).indices[..., : self.kept(ffn.width)]
        return torch.zeros_like(statistic, dtype=torch.bool).scatter_(-1, top, True).unsqueeze(1)

    def keep(self, a: torch.Tensor, z: torch.Tensor, choice: torch.Tensor | None) -> torch.Tensor | None:
        return choice

    def reads(self, reads: Reads) -> Reads:
        return reads.times(1 - self.level)
