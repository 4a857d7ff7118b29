"""Static width pruning: one fixed set of neurons, from calibration samples."""

from __future__ import annotations

from typing import ClassVar

import torch

from caprese.efficient_methods.base import Part, Reads, Source, Sparse
from caprese.kernels import PackedFFN
from caprese.models import FFN


class Static(Sparse):
    """Keep the k neurons that add most to the FFN's output on the samples: sqrt(sum_i z_ij^2) ||down_:j||_2.

    The same for every prompt, so the result can be written out as an ordinary, narrower checkpoint.
    """

    name: ClassVar[str] = "static"
    summary: ClassVar[str] = "one fixed set of FFN neurons, chosen on calibration samples"
    parts: ClassVar[frozenset[Part]] = frozenset({"width"})

    @property
    def learns(self) -> frozenset[Source]:
        return frozenset({"samples"})

    @property
    def reads_weights(self) -> bool:
        return True

    def statistic(self, x: torch.Tensor, a: torch.Tensor, z: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Sum of z^2 over tokens, [B, F]."""
        squares = z.detach().to(torch.promote_types(z.dtype, torch.float32)).square()
        return torch.einsum("btf,bt->bf", squares, mask.to(squares.dtype))

    def choose(self, statistic: torch.Tensor, ffn: FFN | PackedFFN) -> torch.Tensor:
        """The kept neurons in ascending order, [1, k]; of equal ones the first."""
        norms = ffn.weights().down.detach().to(statistic.dtype).norm(dim=0)
        scores = statistic.sqrt() * norms
        top = scores.sort(dim=-1, descending=True, stable=True).indices[..., : self.kept(ffn.width)]
        return top.sort(dim=-1).values

    def fits(self, choice: torch.Tensor, width: int, attention: int) -> bool:
        return choice.shape == (1, self.kept(width)) and super().fits(choice, width, attention)

    def transform(self, ffn: FFN | PackedFFN, choice: torch.Tensor | None) -> FFN | PackedFFN:
        assert choice is not None
        return PackedFFN(ffn, choice[0].to(ffn.device))

    def reads(self, reads: Reads) -> Reads:
        return reads.times(1 - self.level)
