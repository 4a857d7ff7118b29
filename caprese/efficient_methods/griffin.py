"""GRIFFIN (arXiv 2404.01365): the prompt chooses the neurons for the whole generation."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import model_validator

from caprese.efficient_methods.base import FromPrompt, Part, Reads, Source
from caprese.kernels import PackedFFN
from caprese.limits import Amount
from caprese.models import FFN


def relative_energy(z: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sum over tokens i of (z_ij / ||z_i||_2)^2, [B, F] for z [B, T, F]; at least in float32."""
    squares = z.detach().to(torch.promote_types(z.dtype, torch.float32)).square()
    weight = mask / squares.sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return torch.einsum("btf,bt->bf", squares, weight.to(squares.dtype))


class Griffin(FromPrompt):
    """Keep the k neurons with the largest s_j = || z_ij / ||z_i||_2 ||_2 over the prompt tokens i, per sequence.

    The defaults are the paper's. A short prompt says little about what its answer will need; `prior` and
    `score="output"` mend that (docs/reasoning.md).
    """

    name: ClassVar[str] = "griffin"
    summary: ClassVar[str] = "each prompt chooses the FFN neurons for its whole generation"
    parts: ClassVar[frozenset[Part]] = frozenset({"rows"})

    score: Literal["activation", "output"] = "activation"
    """output: s_j ||down_:j||_2, what a neuron adds to the FFN's output, in place of s_j."""
    prior: Amount = 0.0
    """Calibration samples weigh as much as this many prompt tokens; 0 is the prompt alone."""

    @model_validator(mode="after")
    def _one_kind_of_help(self) -> Griffin:
        if self.prior and self.shared_choice:  # what samples weigh would depend on the size of the batch
            raise ValueError("prior and shared_choice do not go together; leave one of them out")
        return self

    @property
    def learns(self) -> frozenset[Source]:
        return frozenset({"prompt", "samples"}) if self.prior else super().learns

    @property
    def reads_weights(self) -> bool:
        return self.score == "output"

    def statistic(self, x: torch.Tensor, a: torch.Tensor, z: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """s squared, [B, F]: squares add up over tokens, and top-k of s and of s*s are the same."""
        return relative_energy(z, mask)

    def choose(self, statistic: torch.Tensor, ffn: FFN | PackedFFN) -> torch.Tensor:
        """Bool [B, 1, F] with exactly k true in each row; of equal neurons the first.

        A sort, not topk, which breaks ties as the batch falls: behind a ReLU many neurons are silent on a short prompt.
        """
        if self.score == "output":
            down = ffn.weights().down.detach()
            statistic = statistic * torch.linalg.vector_norm(down, dim=0, dtype=statistic.dtype).square()
        top = statistic.sort(dim=-1, descending=True, stable=True).indices[..., : self.kept(ffn.width)]
        return torch.zeros_like(statistic, dtype=torch.bool).scatter_(-1, top, True).unsqueeze(1)

    def calibrated(self, statistic: torch.Tensor, ffn: FFN | PackedFFN) -> torch.Tensor:
        """The mean over tokens, [1, F]: every token's relative energies add up to 1."""
        return statistic / statistic.sum().clamp_min(torch.finfo(statistic.dtype).tiny)

    def joined(self, statistic: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        return statistic + self.prior * known

    def fits(self, choice: torch.Tensor, width: int, attention: int) -> bool:
        return choice.shape == (1, width)

    def keep(self, a: torch.Tensor, z: torch.Tensor, choice: torch.Tensor | None) -> torch.Tensor | None:
        return choice

    def reads(self, reads: Reads) -> Reads:
        return reads.times(1 - self.level)
