"""The Triton kernels of `down` and `input_sparse`, and the launcher of both."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from caprese.kernels.dispatch import Rows
from caprese.kernels.tiles import WIDEN, config_of, launch_options, on_device, padded_batch


@triton.jit
def _weighted_rows(
    z_ptr,
    z_stride,
    weight_ptr,
    weight_stride,
    index_ptr,
    sequences,
    live,
    which,
    threshold,
    start,
    end,
    k,
    cols,
    inside,
    BATCH: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    SPARSE: tl.constexpr,
    DOT: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Sum over the places start..end of z times the rows they name, [BATCH, BLOCK_COLS]."""
    if DOT:
        y = tl.zeros((BATCH, BLOCK_COLS), dtype=tl.float32)
    else:
        y = tl.zeros((BATCH, BLOCK_ROWS, BLOCK_COLS), dtype=tl.float32)
    for first in range(start, end, BLOCK_ROWS):
        places = first + tl.arange(0, BLOCK_ROWS)
        valid = places < end
        # read even where it does not hold: the masked value is zero
        z = tl.load(
            z_ptr + sequences[:, None] * z_stride + places[None, :], mask=live[:, None] & valid[None, :], other=0.0
        )
        if SPARSE:
            large = tl.abs(z.to(tl.float32)) >= threshold
            z = tl.where(large, z, 0.0)
            valid = valid & (tl.max((large & live[:, None]).to(tl.int32), 0) > 0)
        if HAS_INDEX:
            rows = tl.load(index_ptr + which.to(tl.int64) * k + places, mask=valid, other=0).to(tl.int64)
        else:
            rows = places.to(tl.int64)
        mask = valid[:, None] & inside[None, :]
        w = tl.load(weight_ptr + rows[:, None] * weight_stride + cols[None, :], mask=mask, other=0.0)
        if DOT:
            if WIDEN:
                z = z.to(tl.float32)
                w = w.to(tl.float32)
            y = tl.dot(z, w, y, input_precision="ieee")
        else:
            y += z.to(tl.float32)[:, :, None] * w.to(tl.float32)[None, :, :]
    if not DOT:
        y = tl.sum(y, 1)
    return y


@triton.jit
def _down(
    z_ptr,
    down_ptr,
    right_ptr,
    index_ptr,
    count_ptr,
    threshold_ptr,
    y_ptr,
    B,
    D,
    k,
    r,
    splits,
    tail_splits,
    down_stride,
    right_stride,
    HAS_INDEX: tl.constexpr,
    HAS_COUNT: tl.constexpr,
    OWN: tl.constexpr,
    SPARSE: tl.constexpr,
    ATOMIC: tl.constexpr,
    BATCH: tl.constexpr,
    DOT: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """A program: BLOCK_COLS columns of y, from one part of one list, or from one part of `right` for all sequences.

    y: the parts' sums, float32 [splits + tail_splits, B, D]; ATOMIC: [B, D], added to.
    """
    cols = tl.program_id(0) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    inside = cols < D
    job = tl.program_id(1)
    lists = 1
    if OWN:
        lists = B
    threshold = 0.0
    if SPARSE:
        threshold = tl.load(threshold_ptr).to(tl.float32)
    if job < splits * lists:
        which = job // splits
        part = job % splits
        n = k
        if HAS_COUNT:
            n = tl.minimum(tl.load(count_ptr + which).to(tl.int32), k)
        # what holds is split, not what might, so that the parts are even
        each = tl.cdiv(tl.cdiv(n, splits), BLOCK_ROWS) * BLOCK_ROWS
        start = tl.minimum(part * each, n)
        end = tl.minimum(start + each, n)
        if OWN:
            sequences = which + tl.arange(0, 1)
            y = _weighted_rows(
                z_ptr, k + r, down_ptr, down_stride, index_ptr, sequences, sequences < B, which, threshold, start, end,
                k, cols, inside, 1, HAS_INDEX, SPARSE, False, WIDEN, BLOCK_ROWS, BLOCK_COLS,
            )  # fmt: skip
        else:
            sequences = tl.arange(0, BATCH)
            y = _weighted_rows(
                z_ptr, k + r, down_ptr, down_stride, index_ptr, sequences, sequences < B, which, threshold, start, end,
                k, cols, inside, BATCH, HAS_INDEX, SPARSE, DOT, WIDEN, BLOCK_ROWS, BLOCK_COLS,
            )  # fmt: skip
        mask = (sequences < B)[:, None] & inside[None, :]
        if ATOMIC:
            tl.atomic_add(y_ptr + sequences[:, None] * D + cols[None, :], y, mask=mask, sem="relaxed")
        else:
            tl.store(y_ptr + (part * B + sequences[:, None]).to(tl.int64) * D + cols[None, :], y, mask=mask)
    else:
        tail_part = job - splits * lists
        tail_each = tl.cdiv(tl.cdiv(r, tail_splits), BLOCK_ROWS) * BLOCK_ROWS
        tail_start = tl.minimum(tail_part * tail_each, r)
        tail_end = tl.minimum(tail_start + tail_each, r)
        all_of_them = tl.arange(0, BATCH)
        tail_y = _weighted_rows(
            z_ptr + k, k + r, right_ptr, right_stride, index_ptr, all_of_them, all_of_them < B, tail_part, threshold,
            tail_start, tail_end, k, cols, inside, BATCH, False, False, DOT, WIDEN, BLOCK_ROWS, BLOCK_COLS,
        )  # fmt: skip
        tail_mask = (all_of_them < B)[:, None] & inside[None, :]
        if ATOMIC:
            tl.atomic_add(y_ptr + all_of_them[:, None] * D + cols[None, :], tail_y, mask=tail_mask, sem="relaxed")
        else:
            tail_to = y_ptr + ((splits + tail_part) * B + all_of_them[:, None]).to(tl.int64) * D + cols[None, :]
            tl.store(tail_to, tail_y, mask=tail_mask)


@triton.jit
def _sum_splits(
    part_ptr,
    bias_ptr,
    y_ptr,
    size,
    D,
    splits,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    """Parts [splits, B * D] and bias [D] -> y [B * D], always added in the same order."""
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = places < size
    y = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, splits, BLOCK_SPLITS):
        part = first + tl.arange(0, BLOCK_SPLITS)
        mask = (part < splits)[:, None] & inside[None, :]
        y += tl.sum(tl.load(part_ptr + part.to(tl.int64)[:, None] * size + places[None, :], mask=mask, other=0.0), 0)
    if HAS_BIAS:
        y += tl.load(bias_ptr + places % D, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + places, y.to(y_ptr.dtype.element_ty), mask=inside)


def split_down(
    z: torch.Tensor,
    weight: torch.Tensor,
    rows: Rows,
    right: torch.Tensor | None,
    bias: torch.Tensor | None,
    threshold: torch.Tensor | None,
    atomic: bool,
    operation: str,
) -> torch.Tensor:
    """`down`, or with a threshold `input_sparse`: parts of the rows side by side, then their sum."""
    index, count = rows
    z = z.contiguous()
    B = z.shape[0]
    config = config_of(operation, B)
    dot = bool(config["DOT"])
    k = weight.shape[0] if index is None else index.shape[1]
    D = weight.shape[1]
    r = 0 if right is None else right.shape[0]
    own = index is not None and index.shape[0] > 1
    lists = B if own else 1
    blocks = triton.cdiv(D, config["BLOCK_COLS"])
    y = torch.empty(B, D, dtype=z.dtype, device=z.device)
    if blocks == 0:
        return y
    # at least one part, which writes zeros where there is nothing to add
    wanted = triton.cdiv(config["PROGRAMS"], blocks * lists)
    splits = max(1, min(wanted, triton.cdiv(k, config["BLOCK_ROWS"])))
    each = triton.cdiv(triton.cdiv(k, splits), config["BLOCK_ROWS"]) * config["BLOCK_ROWS"]
    tail_splits = 0 if r == 0 else triton.cdiv(r, max(each, config["BLOCK_ROWS"]))
    if not atomic:
        parts = torch.empty(splits + tail_splits, B, D, dtype=torch.float32, device=z.device)
    elif bias is None:
        parts = torch.zeros(B, D, dtype=torch.float32, device=z.device)
    else:
        parts = bias.float().expand(B, D).contiguous()
    with on_device(z):
        _down[(blocks, splits * lists + tail_splits)](
            z,
            weight,
            z if right is None else right,
            z if index is None else index.contiguous(),
            z if count is None else count.contiguous(),
            z if threshold is None else threshold,
            parts,
            B,
            D,
            k,
            r,
            splits,
            tail_splits,
            weight.stride(0),
            0 if right is None else right.stride(0),
            HAS_INDEX=index is not None,
            HAS_COUNT=count is not None,
            OWN=own,
            SPARSE=threshold is not None,
            ATOMIC=atomic,
            BATCH=padded_batch(B, dot),
            DOT=dot,
            WIDEN=WIDEN,
            **launch_options(config),
        )
        if atomic:
            return parts.to(z.dtype)
        total = config_of("sum_splits")
        _sum_splits[(triton.cdiv(B * D, total["BLOCK"]),)](
            parts, z if bias is None else bias.contiguous(), y, B * D, D, splits + tail_splits,
            HAS_BIAS=bias is not None, **total,
        )  # fmt: skip
    return y


def down(
    z: torch.Tensor,
    weight: torch.Tensor,
    rows: Rows,
    right: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    atomic: bool = False,
) -> torch.Tensor:
    """See `kernels.down`."""
    return split_down(z, weight, rows, right, bias, None, atomic, "down")
