"""Which neurons CATS keeps for each sequence (arXiv 2404.08763)."""

from __future__ import annotations

import torch

from caprese.kernels.cats_select import naive
from caprese.kernels.dispatch import (
    MAX_BATCH,
    check_act,
    check_input,
    check_vector,
    check_weight,
    load_triton,
    turns,
    uses_triton,
)

triton = load_triton("cats_select")


def cats_select(
    x: torch.Tensor, gate: torch.Tensor, threshold: torch.Tensor, act: str, gate_bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Which neurons CATS keeps for each sequence: those with |act(x gate')| >= threshold.

    Args:
        x: [B, D].
        gate: [F, D], rows contiguous (up, in a plain FFN); gate_bias: [F].
        threshold: one, or [B].
    Returns: a [B, F], index [B, F] int32, count [B] int32: the kept activations and their places, in ascending order of
        place, then zeros. The comparison sees activations as rounded to x's type.
    """
    check_input("x", x)
    check_act(act)
    check_weight("gate", gate, x, None, x.shape[1])
    check_vector("gate_bias", gate_bias, gate.shape[0])
    if threshold.numel() not in (1, x.shape[0]):
        raise ValueError(f"threshold: expected one or [{x.shape[0]}], got {list(threshold.shape)}")
    if not uses_triton(x, gate, gate_bias):
        return naive.cats_select(x, gate, threshold, act, gate_bias)
    if x.shape[0] <= MAX_BATCH:
        return triton.cats_select(x, gate, threshold, act, gate_bias)
    each = threshold.reshape(-1)
    found = [
        triton.cats_select(x[t], gate, each if len(each) == 1 else each[t], act, gate_bias) for t in turns(x.shape[0])
    ]
    a, index, count = zip(*found, strict=True)
    return torch.cat(a), torch.cat(index), torch.cat(count)
