"""Attention of one token over what it sees of the keys and values that are held: in C on a CPU, in float32."""

from __future__ import annotations

from typing import NamedTuple

import torch

from caprese.kernels import native

_ALL = 2**62


class Sight(NamedTuple):
    """What a token sees of those before it."""

    window: int | None = None
    """So many, itself among them, beside the first `sinks`; None is all."""
    sinks: int = 0
    reach: int | None = None
    """So many at most, be they the first or not; None is all."""


def attend(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    places: torch.Tensor,
    own: torch.Tensor,
    scaling: float,
    sight: Sight,
) -> torch.Tensor | None:
    """y [B, H, 1, d] of q [B, H, 1, d] over keys and values [B, G, T, d]; None where C does not do it.

    A query that sees nothing gives 0.

    Args:
        places: of keys in their texts, [B, T]; below 0 for what nobody sees.
        own: of the queries, [B, 1].
        scaling: what q k is multiplied by.
    """
    batch, heads, tokens, size = q.shape
    groups, held = keys.shape[1:3]
    apart = keys.stride(1)
    if tokens != 1 or torch.is_grad_enabled() or not native.fits(q, keys, values):
        return None
    if not keys.stride() == values.stride() == (groups * apart, apart, size, 1):
        return None
    q, places, own = q.contiguous(), places.contiguous(), own.contiguous()
    y = torch.empty_like(q)
    where = (t.data_ptr() for t in (q, keys, values, places, own, y))
    window, sinks, reach = sight
    limits = _ALL if window is None else window, sinks, _ALL if reach is None else reach
    native.call("caprese_attend", *where, batch, heads, groups, held, size, apart, *limits, scaling)
    return y
