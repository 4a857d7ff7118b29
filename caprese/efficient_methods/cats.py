"""CATS (arXiv 2404.08763): each token keeps the neurons whose gate activation is large."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch

from caprese.efficient_methods.base import FromPrompt, Part, Reads, Source
from caprese.efficient_methods.sketch import counts, quantile
from caprese.kernels import PackedFFN
from caprese.models import FFN


class Cats(FromPrompt):
    """Keep neuron j of a token when |act(gate)_j| >= tau, the sparsity-quantile of |act(gate)|.

    In a plain FFN, act(up) takes the place of act(gate), and only the down projection is saved.
    """

    name: ClassVar[str] = "cats"
    summary: ClassVar[str] = "each token keeps the FFN neurons whose gate is large"
    parts: ClassVar[frozenset[Part]] = frozenset({"neurons"})

    threshold: Literal["prompt", "calibrated"] = "prompt"
    """Where tau is from: each prompt, or calibration samples once for all."""

    @property
    def learns(self) -> frozenset[Source]:
        return frozenset({"prompt" if self.threshold == "prompt" else "samples"})

    def statistic(self, x: torch.Tensor, a: torch.Tensor, z: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Counts of |act(gate)| in log-spaced bins, [B, bins] (int64)."""
        return counts(a, mask)

    def choose(self, statistic: torch.Tensor, ffn: FFN | PackedFFN) -> torch.Tensor:
        """tau, [B, 1, 1]; 0 keeps everything when nothing need go."""
        return quantile(statistic, self.level)[:, None, None]

    def fits(self, choice: torch.Tensor, width: int, attention: int) -> bool:
        return choice.shape == (1, 1, 1)

    def keep(self, a: torch.Tensor, z: torch.Tensor, choice: torch.Tensor | None) -> torch.Tensor | None:
        assert choice is not None
        return a.abs() >= choice

    def reads(self, reads: Reads) -> Reads:
        """The gate is computed whole; in a plain FFN up is the gate."""
        kept = 1 - self.level
        return Reads(reads.gate, reads.up * (kept if reads.gate else 1), reads.down * kept)
