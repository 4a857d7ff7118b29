"""A linear layer that sees only the large channels of its input (TEAL, arXiv 2408.14690)."""

from __future__ import annotations

import torch

from caprese.kernels.dispatch import MAX_BATCH, check_input, check_vector, check_weight, load_triton, turns, uses_triton
from caprese.kernels.input_sparse import naive

triton = load_triton("input_sparse")


def input_sparse(
    x: torch.Tensor, weight_t: torch.Tensor, threshold: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """A linear layer that sees only the large channels of its input, sequence by sequence (TEAL).

    A row of the weight is read if any sequence needs it.

    Args:
        x: [B, D]; channels with |x| < threshold count as zero.
        weight_t: [D, N], the weight stored transposed, rows contiguous; bias: [N].
        threshold: one.
    Returns: [B, N].
    """
    check_input("x", x)
    if weight_t.ndim != 2:
        raise ValueError(f"weight_t: expected [D, N], got {list(weight_t.shape)}")
    check_weight("weight_t", weight_t, x, x.shape[1], weight_t.shape[1])
    if threshold.numel() != 1:
        raise ValueError(f"threshold: expected one, got {list(threshold.shape)}")
    check_vector("bias", bias, weight_t.shape[1])
    if not uses_triton(x, weight_t, bias):
        return naive.input_sparse(x, weight_t, threshold, bias)
    if x.shape[0] <= MAX_BATCH:
        return triton.input_sparse(x, weight_t, threshold, bias)
    return torch.cat([triton.input_sparse(x[t], weight_t, threshold, bias) for t in turns(x.shape[0])])
