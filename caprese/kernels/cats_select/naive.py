"""Which neurons CATS keeps, in plain torch."""

from __future__ import annotations

import torch

from caprese.kernels.dispatch import Rows
from caprese.kernels.gate_up.naive import gate_up
from caprese.kernels.naive import valid_places, wide


def cats_select(
    x: torch.Tensor, gate: torch.Tensor, threshold: torch.Tensor, act: str, gate_bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The reference of `kernels.cats_select`."""
    a = gate_up(x, None, gate, Rows(), act, biases=(None, gate_bias))
    keep = wide(a).abs() >= threshold.reshape(-1, 1)
    count = keep.sum(-1, dtype=torch.int32)
    # a stable sort of "is dropped" brings the kept ones to the front in order
    index = (~keep).byte().argsort(dim=-1, stable=True)
    valid = valid_places(len(gate), count, x.device)
    return a.gather(-1, index).masked_fill(~valid, 0), index.masked_fill(~valid, 0).int(), count
