"""What of a replaced attention stays: some of its heads, or all of them over a window.

Heads that fetch are few (2% of them hold 95% of a model's retrieval, arXiv 2602.11374), and what is near is exact where
it is still attended to: a window and the first tokens, "sinks" (arXiv 2309.17453), take bounded memory. Weights are the
attention's own, and stay as they are.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from caprese.efficient_methods.mamba.mixer import Rotation, normed
from caprese.efficient_methods.mamba.seen import Seen
from caprese.models.attention import Attention


class Attend(nn.Module):
    """x [B, T, D] -> [B, T, D]: what some heads give, without the bias of the out projection.

    Attributes:
        near: heads that the window is of; None is all of them. To see what a head's sight of what is far is worth.
    """

    near: Collection[int] | None = None

    def __init__(self, a: Attention, window: int | None, sinks: int) -> None:
        """
        Args:
            a: of these heads (see `Attention.of`).
            window: tokens that a token sees, itself among them; None is all before it.
            sinks: first tokens that are seen beside a window.
        """
        super().__init__()
        self.window, self.sinks = window, sinks
        self.size, self.scaling, self.rotate = a.head_dim, a.scaling, a.rotate
        self.norms = a.norms and tuple(a.norms)  # the attention's own, which are no modules of this one
        for name in ("q", "k", "v", "q_bias", "k_bias", "v_bias", "out"):
            weight = getattr(a, name)
            self.register_buffer(name, None if weight is None else weight.detach(), persistent=False)

    def forward(
        self,
        x: torch.Tensor,
        valid: torch.Tensor | None = None,
        seen: Seen | None = None,
        rotation: Rotation | None = None,
    ) -> torch.Tensor:
        """Tokens that are not `valid` [B, T] are seen by none."""
        own: Any = self
        q, k, v = (
            F.linear(x, getattr(own, name), getattr(own, f"{name}_bias")).unflatten(-1, (-1, self.size))
            for name in "qkv"
        )
        if self.norms is not None:
            q, k = (normed(norm, t) for norm, t in zip(self.norms, (q, k), strict=True))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if self.rotate is not None and rotation is not None:
            q, k = self.rotate(q, k, *rotation)
        seen = Seen(len(x), x.device) if seen is None else seen
        k, v, new = seen.add(k, v, valid)
        places, others = new[:, :, None], seen.places[:, None]
        sees = ((others <= places) & (others >= 0)).unsqueeze(1)
        if self.window is not None:
            within = ((others > places - self.window) | (others < self.sinks)).unsqueeze(1)
            if self.near is not None:
                heads = torch.tensor([head in self.near for head in range(q.shape[1])], device=x.device)
                within = within | ~heads[:, None, None]
            sees = sees & within
        sees = sees | (places < 0).unsqueeze(1)  # what a pad gives is nobody's, but a number
        shared = q.shape[1] != k.shape[1]
        y = F.scaled_dot_product_attention(q, k, v, sees, scale=self.scaling, enable_gqa=shared)
        return F.linear(y.transpose(1, 2).flatten(-2), own.out)
