"""Chosen rows weighted and summed, in plain torch."""

from __future__ import annotations

import torch

from caprese.kernels.dispatch import Rows
from caprese.kernels.naive import take_rows, valid_places, wide


def down(
    z: torch.Tensor,
    weight: torch.Tensor,
    rows: Rows,
    right: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """The reference of `kernels.down`."""
    index, count = rows
    k = len(weight) if index is None else index.shape[1]
    valid = valid_places(k, count, z.device)
    y = (wide(z)[:, None, :k].masked_fill(~valid[:, None], 0) @ take_rows(weight, index, valid)).squeeze(1)
    if right is not None:
        y = y + wide(z)[:, k:] @ wide(right)
    if bias is not None:
        y = y + bias
    return y.to(z.dtype)
