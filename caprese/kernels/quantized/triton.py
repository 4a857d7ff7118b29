"""The Triton kernels of `products` and `sums`: each chosen row is read once, where it lies, for all sequences."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from caprese.kernels.quantized.codes import GROUP, QuantizedRows
from caprese.kernels.tiles import WIDEN, config_of, launch_options, on_device, padded_batch


@triton.jit
def _product(y, x, w, DOT: tl.constexpr, WIDEN: tl.constexpr):
    """y + x w' of x [BATCH, COLS], w [ROWS, COLS]; its terms [BATCH, ROWS, COLS] where no matrices are multiplied."""
    if DOT:
        w = w.to(x.dtype)
        if WIDEN:
            x, w = x.to(tl.float32), w.to(tl.float32)
        y = tl.dot(x, tl.trans(w), y, input_precision="ieee")
    else:
        y += x.to(tl.float32)[:, None, :] * w[None, :, :]
    return y


@triton.jit
def _sum(y, z, w, DOT: tl.constexpr, WIDEN: tl.constexpr):
    """y + z w of z [BATCH, ROWS], w [ROWS, COLS]; its terms [BATCH, ROWS, COLS] where no matrices are multiplied."""
    if DOT:
        w = w.to(z.dtype)
        if WIDEN:
            z, w = z.to(tl.float32), w.to(tl.float32)
        y = tl.dot(z, w, y, input_precision="ieee")
    else:
        y += z.to(tl.float32)[:, :, None] * w[None, :, :]
    return y


@triton.jit
def _products(
    x_ptr,
    codes_ptr,
    scales_ptr,
    rows_ptr,
    y_ptr,
    B,
    C,
    k,
    HAS_ROWS: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BATCH: tl.constexpr,
    DOT: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """A program: BLOCK_ROWS places for all sequences. Of 4 bits a column of codes is two of the weight."""
    places = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    valid = places < k
    rows = places.to(tl.int64)
    if HAS_ROWS:
        rows = tl.load(rows_ptr + places, mask=valid, other=0).to(tl.int64)
    sequences = tl.arange(0, BATCH)
    live = (sequences < B)[:, None]
    half: tl.constexpr = GROUP // 2
    width = C
    if BITS == 4:
        width = C // 2
    if DOT:
        y = tl.zeros((BATCH, BLOCK_ROWS), dtype=tl.float32)
    else:
        y = tl.zeros((BATCH, BLOCK_ROWS, BLOCK_COLS), dtype=tl.float32)
    for start in range(0, width, BLOCK_COLS):
        cols = start + tl.arange(0, BLOCK_COLS)
        inside = cols < width
        mask = valid[:, None] & inside[None, :]
        codes = tl.load(codes_ptr + rows[:, None] * width + cols[None, :], mask=mask, other=0)
        at = x_ptr + sequences[:, None] * C
        if BITS == 8:
            x = tl.load(at + cols[None, :], mask=live & inside[None, :], other=0.0)
            y = _product(y, x, codes.to(tl.float32), DOT, WIDEN)
        else:
            first = (cols // half * GROUP + cols % half)[None, :]
            scales = tl.load(scales_ptr + rows[:, None] * (C // GROUP) + (cols // half)[None, :], mask=mask, other=0.0)
            scales = scales.to(tl.float32)
            low, high = ((codes & 15).to(tl.float32) - 8.0) * scales, ((codes >> 4).to(tl.float32) - 8.0) * scales
            x = tl.load(at + first, mask=live & inside[None, :], other=0.0)
            y = _product(y, x, low, DOT, WIDEN)
            x = tl.load(at + first + half, mask=live & inside[None, :], other=0.0)
            y = _product(y, x, high, DOT, WIDEN)
    if not DOT:
        y = tl.sum(y, 2)
    if BITS == 8:
        y *= tl.load(scales_ptr + rows, mask=valid, other=0.0)[None, :]
    tl.store(y_ptr + sequences[:, None] * k + places[None, :], y.to(y_ptr.dtype.element_ty), mask=live & valid[None, :])


@triton.jit
def _sums(
    z_ptr,
    codes_ptr,
    scales_ptr,
    rows_ptr,
    parts_ptr,
    B,
    C,
    k,
    each,
    HAS_ROWS: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BATCH: tl.constexpr,
    DOT: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """A program: BLOCK_COLS columns of codes, from `each` places; parts: float32 [splits, B, C]."""
    half: tl.constexpr = GROUP // 2
    width = C
    if BITS == 4:
        width = C // 2
    cols = tl.program_id(0) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    inside = cols < width
    split = tl.program_id(1)
    sequences = tl.arange(0, BATCH)
    live = (sequences < B)[:, None]
    if DOT:
        y = tl.zeros((BATCH, BLOCK_COLS), dtype=tl.float32)
    else:
        y = tl.zeros((BATCH, BLOCK_ROWS, BLOCK_COLS), dtype=tl.float32)
    upper = y
    end = tl.minimum((split + 1) * each, k)
    for start in range(split * each, end, BLOCK_ROWS):
        places = start + tl.arange(0, BLOCK_ROWS)
        valid = places < end
        rows = places.to(tl.int64)
        if HAS_ROWS:
            rows = tl.load(rows_ptr + places, mask=valid, other=0).to(tl.int64)
        mask = valid[:, None] & inside[None, :]
        codes = tl.load(codes_ptr + rows[:, None] * width + cols[None, :], mask=mask, other=0)
        z = tl.load(z_ptr + sequences[:, None] * k + places[None, :], mask=live & valid[None, :], other=0.0)
        if BITS == 8:
            scales = tl.load(scales_ptr + rows, mask=valid, other=0.0)
            y = _sum(y, z, codes.to(tl.float32) * scales[:, None], DOT, WIDEN)
        else:
            scales = tl.load(scales_ptr + rows[:, None] * (C // GROUP) + (cols // half)[None, :], mask=mask, other=0.0)
            scales = scales.to(tl.float32)
            y = _sum(y, z, ((codes & 15).to(tl.float32) - 8.0) * scales, DOT, WIDEN)
            upper = _sum(upper, z, ((codes >> 4).to(tl.float32) - 8.0) * scales, DOT, WIDEN)
    if not DOT:
        y = tl.sum(y, 1)
        upper = tl.sum(upper, 1)
    to = parts_ptr + (split * B + sequences[:, None]).to(tl.int64) * C
    if BITS == 8:
        tl.store(to + cols[None, :], y, mask=live & inside[None, :])
    else:
        first = (cols // half * GROUP + cols % half)[None, :]
        tl.store(to + first, y, mask=live & inside[None, :])
        tl.store(to + first + half, upper, mask=live & inside[None, :])


def products(x: torch.Tensor, weight: QuantizedRows, rows: torch.Tensor | None = None) -> torch.Tensor:
    """See `kernels.products`."""
    x = x.contiguous()
    config = config_of(f"products_q{weight.bits}", len(x))
    k = len(weight) if rows is None else len(rows)
    y = torch.empty(len(x), k, dtype=x.dtype, device=x.device)
    dot = bool(config["DOT"])
    if k == 0:
        return y
    with on_device(x):
        _products[(triton.cdiv(k, config["BLOCK_ROWS"]),)](
            x, weight.codes, weight.scales, weight.codes if rows is None else rows, y, len(x), weight.columns, k,
            HAS_ROWS=rows is not None, BITS=weight.bits, GROUP=GROUP, BATCH=padded_batch(len(x), dot), DOT=dot,
            WIDEN=WIDEN, **launch_options(config),
        )  # fmt: skip
    return y


def sums(z: torch.Tensor, weight: QuantizedRows, rows: torch.Tensor | None = None) -> torch.Tensor:
    """See `kernels.sums`."""
    z = z.contiguous()
    B, k = z.shape
    config = config_of(f"sums_q{weight.bits}", B)
    blocks = triton.cdiv(weight.codes.shape[1], config["BLOCK_COLS"])
    splits = max(1, min(triton.cdiv(config["PROGRAMS"], blocks), triton.cdiv(k, config["BLOCK_ROWS"])))
    each = max(1, triton.cdiv(triton.cdiv(k, splits), config["BLOCK_ROWS"])) * config["BLOCK_ROWS"]
    parts = torch.empty(splits, B, weight.columns, dtype=torch.float32, device=z.device)
    dot = bool(config["DOT"])
    with on_device(z):
        _sums[(blocks, splits)](
            z, weight.codes, weight.scales, weight.codes if rows is None else rows, parts, B, weight.columns, k, each,
            HAS_ROWS=rows is not None, BITS=weight.bits, GROUP=GROUP, BATCH=padded_batch(B, dot), DOT=dot,
            WIDEN=WIDEN, **launch_options(config),
        )  # fmt: skip
    return parts.sum(0).to(z.dtype)
