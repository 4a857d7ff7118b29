"""act(x gate') * (x up') on chosen rows of an FFN, for decoding: few tokens, each needed row read once."""

from __future__ import annotations

import torch

from caprese.kernels.dispatch import (
    MAX_BATCH,
    Rows,
    check_act,
    check_input,
    check_rows,
    check_vector,
    check_weight,
    load_triton,
    turns,
    uses_triton,
)
from caprese.kernels.gate_up import naive

triton = load_triton("gate_up")


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
    """act(x gate') * (x up') on chosen rows, and x left' behind it; act(x up') where gate is None.

    Args:
        x: [B, D].
        gate, up: [F, D], rows contiguous; biases: theirs, [F].
        rows: of both.
        left: [r, D], the recovery branch's first factor, transposed.
        a: [B, k], act(x gate') already there in the list's order (`cats_select`): gate is not read.
    Returns: [B, k + r], zero where the list does not hold.
    """
    gate_bias, up_bias = biases
    check_input("x", x)
    check_act(act)
    check_weight("up", up, x, None, x.shape[1])
    k = check_rows(rows, x.shape[0], up.shape[0])
    check_vector("up_bias", up_bias, up.shape[0])
    check_weight("left", left, x, None, x.shape[1])
    if a is None:
        check_weight("gate", gate, x, up.shape[0], x.shape[1])
        if gate is None and gate_bias is not None:
            raise ValueError("gate_bias: there is no gate")
        check_vector("gate_bias", gate_bias, up.shape[0])
    else:
        gate = gate_bias = None
        biases = (None, up_bias)
        check_weight("a", a, x, x.shape[0], k)
    if not uses_triton(x, gate, up, left, gate_bias, up_bias, a):
        return naive.gate_up(x, gate, up, rows, act, left, biases, a)
    if x.shape[0] <= MAX_BATCH:
        return triton.gate_up(x, gate, up, rows, act, left, biases, a)
    return torch.cat(
        [
            triton.gate_up(x[t], gate, up, rows.turn(t), act, left, biases, None if a is None else a[t])
            for t in turns(x.shape[0])
        ]
    )
