"""The Triton kernel of `cats_select`: activations by `gate_up`, then the kept ones brought together."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from caprese.kernels.dispatch import Rows
from caprese.kernels.gate_up.triton import gate_up
from caprese.kernels.tiles import config_of, on_device


@triton.jit
def _compact(a_ptr, threshold_ptr, kept_ptr, index_ptr, count_ptr, F, ONE_THRESHOLD: tl.constexpr, BLOCK: tl.constexpr):
    """A program: one sequence, its blocks one after the other, so that the order is that of the places."""
    b = tl.program_id(0)
    threshold = tl.load(threshold_ptr + (0 if ONE_THRESHOLD else b)).to(tl.float32)
    row = b.to(tl.int64) * F
    total = tl.zeros((), dtype=tl.int32)
    for start in range(0, F, BLOCK):
        places = start + tl.arange(0, BLOCK)
        a = tl.load(a_ptr + row + places, mask=places < F, other=0.0)
        keep = (tl.abs(a.to(tl.float32)) >= threshold) & (places < F)
        to = total + tl.cumsum(keep.to(tl.int32), 0) - 1
        tl.store(kept_ptr + row + to, a, mask=keep)
        tl.store(index_ptr + row + to, places, mask=keep)
        total += tl.sum(keep.to(tl.int32), 0)
    tl.store(count_ptr + b, total)
    for start in range(0, F, BLOCK):
        places = start + tl.arange(0, BLOCK)
        rest = (places >= total) & (places < F)
        tl.store(kept_ptr + row + places, tl.zeros((BLOCK,), dtype=kept_ptr.dtype.element_ty), mask=rest)
        tl.store(index_ptr + row + places, tl.zeros((BLOCK,), dtype=tl.int32), mask=rest)


def cats_select(
    x: torch.Tensor,
    gate: torch.Tensor,
    threshold: torch.Tensor,
    act: str,
    gate_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `kernels.cats_select`."""
    a = gate_up(x, None, gate, Rows(), act, biases=(None, gate_bias))
    B, width = a.shape
    kept = torch.empty_like(a)
    index = torch.empty(B, width, dtype=torch.int32, device=a.device)
    count = torch.empty(B, dtype=torch.int32, device=a.device)
    one = threshold.numel() == 1
    with on_device(a):
        _compact[(B,)](
            a,
            threshold.contiguous(),
            kept,
            index,
            count,
            width,
            ONE_THRESHOLD=one,
            **config_of("compact"),
        )
    return kept, index, count
