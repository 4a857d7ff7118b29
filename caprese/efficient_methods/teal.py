"""TEAL (arXiv 2408.14690): every linear layer sees only the large channels of its input."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from caprese.efficient_methods.base import Block, Part, Reads, Source, Sparse
from caprese.efficient_methods.sketch import BINS, counts, quantile
from caprese.kernels import PackedFFN
from caprese.models import FFN

# how far greedy raises one linear layer, unless more is asked of all
_MOST = 0.95


class Teal(Sparse):
    """Zero the input channels of every linear layer with |x| below a threshold from calibration samples.

    Choice: a threshold for each linear layer, [1, 3 + n]: gate, up, down, then the attention's. Where gate and up are
    one matrix, or there is no gate, the first two are the same.
    """

    name: ClassVar[str] = "teal"
    summary: ClassVar[str] = "each linear layer skips the small channels of its input, token by token"
    parts: ClassVar[frozenset[Part]] = frozenset({"inputs", "attention"})

    where: Literal["all", "ffn", "attention"] = "all"
    """Which linear layers."""
    greedy: bool = True
    """Spread the sparsity over a decoder layer's linear layers, always raising the one that adds the least error to
    the layer's output for the weights it saves; else the same for all."""
    step: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """greedy: how far a linear layer is raised at a time."""

    @property
    def acts_on(self) -> frozenset[Part]:
        only: dict[str, frozenset[Part]] = {"ffn": frozenset({"inputs"}), "attention": frozenset({"attention"})}
        return only.get(self.where, self.parts)

    @property
    def learns(self) -> frozenset[Source]:
        return frozenset({"samples"})

    def statistic(self, x: torch.Tensor, a: torch.Tensor, z: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Counts of |x| and of |z| in log-spaced bins, [B, 2 * bins]."""
        return torch.cat([counts(x, mask), counts(z, mask)], -1)

    def attention_statistic(self, inputs: list[torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
        return torch.cat([counts(x, mask) for x in inputs], -1)

    def _linears(self, ffn: FFN | PackedFFN, attention: int) -> list[list[int]]:
        """The linear layers, each by its places in the choice; gate and up that cannot differ share one."""
        own = [[0], [1], [2]] if ffn.gated and not ffn.fused else [[0, 1], [2]]
        others = [[3 + i] for i in range(attention)]
        return {"ffn": own, "attention": others, "all": own + others}[self.where]

    def _thresholds(self, statistic: torch.Tensor, linears: list[list[int]], levels: list[float]) -> torch.Tensor:
        counted = statistic.view(-1, BINS)
        choice = torch.zeros(1, 1 + len(counted), device=statistic.device)
        for places, level in zip(linears, levels, strict=True):
            # x is the input of gate and up, so the statistics are one fewer than the places
            choice[0, places] = quantile(counted[max(0, places[-1] - 1)], level)
        return choice

    def choose(self, statistic: torch.Tensor, ffn: FFN | PackedFFN) -> torch.Tensor:
        """The thresholds at one sparsity for all, [1, 3 + n]."""
        linears = self._linears(ffn, statistic.shape[-1] // BINS - 2)
        return self._thresholds(statistic, linears, [self.level] * len(linears))

    def fit(self, statistic: torch.Tensor, ffn: FFN | PackedFFN, block: Block) -> torch.Tensor:
        """The thresholds at sparsities that `greedy` spread, whose mean over weights is `sparsity`."""
        if not self.greedy:
            return self.choose(statistic, ffn)
        linears = self._linears(ffn, statistic.shape[-1] // BINS - 2)
        one = ffn.width * ffn.hidden_size
        sizes = [block.sizes[p[0] - 3] if p[0] >= 3 else len(p) * one if ffn.gated else one for p in linears]
        levels = [0.0] * len(sizes)
        left, most = self.level * sum(sizes), max(_MOST, self.level)
        now = 0.0
        # lazy greedy: errors grow with sparsity, so a price that was too high stays so; look again at the cheapest only
        prices = [0.0] * len(sizes)
        fresh = [False] * len(sizes)
        while left > 1e-9 * sum(sizes):
            open_ = [i for i, level in enumerate(levels) if level < most]
            if not open_:
                break
            i = min(open_, key=prices.__getitem__)
            more = min(self.step, most - levels[i], left / sizes[i])
            trial = [level + more * (j == i) for j, level in enumerate(levels)]
            if not fresh[i]:
                error = block.error(self._thresholds(statistic, linears, trial))
                prices[i], fresh[i] = (error - now) / (more * sizes[i]), True
                continue
            now = now + prices[i] * more * sizes[i]
            levels, left = trial, left - more * sizes[i]
            fresh = [False] * len(sizes)
        return self._thresholds(statistic, linears, levels)

    def fits(self, choice: torch.Tensor, width: int, attention: int) -> bool:
        return choice.shape == (1, 3 + (attention if "attention" in self.acts_on else 0))

    def inputs(
        self, x: torch.Tensor, x_up: torch.Tensor, choice: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.where == "attention":
            return x, x_up
        assert choice is not None
        return _large(x, choice[0, 0]), _large(x_up, choice[0, 1])

    def keep(self, a: torch.Tensor, z: torch.Tensor, choice: torch.Tensor | None) -> torch.Tensor | None:
        if self.where == "attention":
            return None
        assert choice is not None
        return z.abs() >= choice[0, 2]

    def attention_input(self, x: torch.Tensor, number: int, choice: torch.Tensor | None) -> torch.Tensor:
        assert choice is not None
        return _large(x, choice[0, 3 + number])

    def reads(self, reads: Reads) -> Reads:
        return reads if self.where == "attention" else reads.times(1 - self.level)

    @property
    def attention_density(self) -> float:
        return 1.0 if self.where == "ffn" else 1 - self.level


def _large(x: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    return x * (x.abs() >= threshold)
