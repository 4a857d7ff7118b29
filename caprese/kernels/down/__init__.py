"""Chosen rows of the down projection, weighted by their neurons and summed."""

from __future__ import annotations

import torch

from caprese.kernels.dispatch import (
    MAX_BATCH,
    Rows,
    check_input,
    check_rows,
    check_vector,
    check_weight,
    load_triton,
    turns,
    uses_triton,
)
from caprese.kernels.down import naive

triton = load_triton("down")


def down(
    z: torch.Tensor,
    down: torch.Tensor,
    rows: Rows,
    right: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    atomic: bool = False,
) -> torch.Tensor:
    """Sum over j of z_j times row index_j of down, plus the tail of z times right, plus bias.

    Args:
        z: [B, k + r]; of the first k only those that hold are read.
        down: [F, D], the weight stored transposed, rows contiguous; bias: [D].
        rows: of down.
        right: [r, D], the recovery branch's second factor.
        atomic: add up in memory, in no fixed order: faster perhaps, but two runs may differ in the last bits.
    Returns: [B, D].
    """
    check_input("z", z)
    if down.ndim != 2:
        raise ValueError(f"down: expected [F, D], got {list(down.shape)}")
    check_weight("down", down, z, None, down.shape[1])
    check_weight("right", right, z, None, down.shape[1])
    k = check_rows(rows, z.shape[0], down.shape[0])
    wanted = k + (0 if right is None else right.shape[0])
    if z.shape[1] != wanted:
        raise ValueError(f"z: expected [B, {wanted}], got {list(z.shape)}")
    check_vector("bias", bias, down.shape[1])
    if not uses_triton(z, down, right, bias):
        return naive.down(z, down, rows, right, bias)
    if z.shape[0] <= MAX_BATCH:
        return triton.down(z, down, rows, right, bias, atomic)
    return torch.cat([triton.down(z[t], down, rows.turn(t), right, bias, atomic) for t in turns(z.shape[0])])
