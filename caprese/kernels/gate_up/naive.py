"""act(x gate') * (x up') on chosen rows, in plain torch."""

from __future__ import annotations

import torch

from caprese.kernels.activations import ACTIVATIONS
from caprese.kernels.dispatch import Rows
from caprese.kernels.naive import chosen_bias, product, take_rows, valid_places, wide


def gate_up(
    x: torch.Tensor,
    gate: torch.Tensor | None,
    up: torch.Tensor,
    rows: Rows,
    act: str,
    left: torch.Tensor | None = None,
    biases: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
    a: torch.Tensor | None = None,
) -> torch.Tensor:
    """The reference of `kernels.gate_up`."""
    (index, count), (gate_bias, up_bias) = rows, biases
    valid = valid_places(len(up) if index is None else index.shape[1], count, x.device)
    z = product(x, take_rows(up, index, valid), chosen_bias(up_bias, index, valid))
    if a is not None:
        z = wide(a) * z
    elif gate is None:
        z = ACTIVATIONS[act](z)
    else:
        z = ACTIVATIONS[act](product(x, take_rows(gate, index, valid), chosen_bias(gate_bias, index, valid))) * z
    z = z.masked_fill(~valid, 0)
    if left is not None:
        z = torch.cat([z, product(x, wide(left)[None])], -1)
    return z.to(x.dtype)
