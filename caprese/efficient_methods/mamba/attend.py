"""What of a replaced attention stays: some of its heads, or all of them over a window.

Heads that fetch are few (2% of them hold 95% of a model's retrieval, arXiv 2602.11374), and what is near is exact where
it is still attended to: a window and the first tokens, "sinks" (arXiv 2309.17453), take bounded memory. Weights are the
attention's own, and stay as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from caprese.efficient_methods.mamba.mixer import Rotation, normed
from caprese.efficient_methods.mamba.seen import Seen
from caprese.errors import CapreseError
from caprese.kernels.near import Sight, attend
from caprese.models.attention import read_attention


class Attend(nn.Module):
    """x [B, T, D] -> [B, T, D]: what some heads give, without the bias of the out projection.

    Attributes:
        near: heads that the window is of; None is all of them.
    """

    near: Collection[int] | None = None

    def __init__(
        self, attention: nn.Module, config: Any, heads: Sequence[int] | None, window: int | None, sinks: int
    ) -> None:
        """
        Args:
            attention: whose weights they are; no module of this one.
            heads: by number; None is all.
            window: tokens that a token sees, itself among them; None is all that the attention sees.
            sinks: first tokens that are seen beside a window.

        Raises:
            CapreseError: scores with a soft cap, or norms over all heads where some stay.
        """
        super().__init__()
        self.window, self.sinks = window, sinks
        self._of = attention, config, heads
        self._take()
        if self.facts.cap:
            raise CapreseError(
                "the attention scores of this model have a soft cap, which windows and heads that stay have not; leave "
                "out window and keep_heads"
            )

    def _take(self) -> None:
        attention, config, heads = self._of
        whole = read_attention(attention, config, rope=True)
        self.facts = whole if heads is None else whole.of(heads)

    def _apply(self, fn: Any, recurse: bool = True) -> Attend:
        """Where the attention's weights go, or what they become, is seen when it is told so."""
        super()._apply(fn, recurse)
        self._take()
        return self

    @property
    def reads(self) -> int:
        """Weights that a token reads."""
        return self.facts.weights

    @property
    def bias(self) -> torch.Tensor | float:
        """Of the attention's out projection."""
        return 0.0 if self.facts.out_bias is None else self.facts.out_bias

    def sight(self, x: torch.Tensor) -> Seen:
        """Of texts [B, ...] that begin."""
        return Seen(len(x), x.device, self.window if self.near is None else None, self.sinks)

    def forward(
        self,
        x: torch.Tensor,
        valid: torch.Tensor | None = None,
        seen: Seen | None = None,
        rotation: Rotation | None = None,
    ) -> torch.Tensor:
        """Tokens that are not `valid` [B, T] are seen by none."""
        a = self.facts
        rows = (a.q, a.q_bias), (a.k, a.k_bias), (a.v, a.v_bias)
        q, k, v = (F.linear(x, weight, bias).unflatten(-1, (-1, a.head_dim)) for weight, bias in rows)
        if a.norms is not None:
            q, k = (normed(norm, t) for norm, t in zip(a.norms, (q, k), strict=True))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if a.rotate is not None and rotation is not None:
            q, k = a.rotate(q, k, *rotation)
        seen = self.sight(x) if seen is None else seen
        k, v, new = seen.add(k, v, valid)
        y = None
        if self.near is None:
            y = attend(q, k, v, seen.places, new, a.scaling, Sight(self.window, self.sinks, a.sliding))
        if y is None:
            shared = q.shape[1] != k.shape[1]
            sees = self._sees(seen.places, new, q.shape[1])
            y = F.scaled_dot_product_attention(q, k, v, sees, scale=a.scaling, enable_gqa=shared)
        return F.linear(y.transpose(1, 2).flatten(-2), a.out)

    def _sees(self, places: torch.Tensor, new: torch.Tensor, heads: int) -> torch.Tensor:
        """What tokens at the places `new` [B, T] see of those at `places` [B, S]: [B, 1 or heads, T, S]."""
        own, others = new[:, :, None], places[:, None]
        sees = ((others <= own) & (others >= 0)).unsqueeze(1)
        if self.window is not None:
            within = ((others > own - self.window) | (others < self.sinks)).unsqueeze(1)
            if self.near is not None:
                limited = torch.tensor([head in self.near for head in range(heads)], device=new.device)
                within = within | ~limited[:, None, None]
            sees = sees & within
        if self.facts.sliding is not None:
            sees = sees & (others > own - self.facts.sliding).unsqueeze(1)
        return sees | (own < 0).unsqueeze(1)  # what a pad gives is nobody's, but a number
