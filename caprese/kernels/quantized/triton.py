"""The Triton kernels of `products` and `sums`: each chosen row is read once, where it lies, for all sequences."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from caprese.kernels.quantized.codes import GROUP, QuantizedRows
from caprese.kernels.tiles import WIDEN, config_of, launch_options, on_device, padded_batch


@triton.jit
def _rows(rows_ptr, places, valid, HAS_ROWS: tl.constexpr):
    """Which rows of the weight some places are."""
    rows = places.to(tl.int64)
    if HAS_ROWS:
        rows = tl.load(rows_ptr + places, mask=valid, other=0).to(tl.int64)
    return rows


@triton.jit
def _groups(codes_ptr, scales_ptr, rows, valid, groups, width):
    """Of 4 bits: words of eight codes, int32 [1, ROWS, GROUPS, 4], and one scale a group, float32 [1, ROWS, GROUPS]."""
    at = rows[None, :, None] * width + groups[None, None, :]
    mask = valid[None, :, None] & (groups < width)[None, None, :]
    scales = tl.load(scales_ptr + at, mask=mask, other=0.0).to(tl.float32)
    # addresses of their own: a thread then loads the four words of a group at once and keeps them
    at = (rows[None, :, None, None] * width + groups[None, None, :, None]) * 4 + tl.arange(0, 4)[None, None, None, :]
    mask = valid[None, :, None, None] & (groups < width)[None, None, :, None]
    return tl.load(codes_ptr.to(tl.pointer_type(tl.int32)) + at, mask=mask, other=0), scales


@triton.jit
def _codes(words, NIBBLE: tl.constexpr):
    """One code of each word, float32, of a mask and a multiplication: where it lies, a nibble times 16^n is what is
    added to 2^23, whose last bits those are. All of it is exact."""
    SHIFT: tl.constexpr = 0 if NIBBLE < 5 else 12
    UNIT: tl.constexpr = 0.0625 ** (NIBBLE if NIBBLE < 5 else NIBBLE - 3)
    bits = (words >> SHIFT) & (15 << (4 * NIBBLE - SHIFT)) | 0x4B000000
    return bits.to(tl.float32, bitcast=True) * UNIT - (8388608.0 * UNIT + 8.0)


@triton.jit
def _all_codes(words):
    """[..., 4, 2, 2, 2] of words [..., 4]: which half of a group it is, and which byte of the word, last bit first."""
    first = tl.join(tl.join(_codes(words, 0), _codes(words, 1)), tl.join(_codes(words, 2), _codes(words, 3)))
    last = tl.join(tl.join(_codes(words, 4), _codes(words, 5)), tl.join(_codes(words, 6), _codes(words, 7)))
    return tl.join(first, last)


@triton.jit
def _add_two(y, x, words, NIBBLE: tl.constexpr):
    """y + the products of x [..., 2] and two codes of each word."""
    low, high = tl.split(x)
    return y + low * _codes(words, NIBBLE) + high * _codes(words, NIBBLE + 1)


@triton.jit
def _add_four(y, x, words, NIBBLE: tl.constexpr):
    """y + the products of x [..., 2, 2], in the order of `_all_codes`, and four codes of each word."""
    even, odd = tl.split(x)
    return _add_two(_add_two(y, even, words, NIBBLE), odd, words, NIBBLE + 2)


@triton.jit
def _dot(x, w, y, WIDEN: tl.constexpr):
    """y + x w, in x's type, or in float32."""
    w = w.to(x.dtype)
    if WIDEN:
        x, w = x.to(tl.float32), w.to(tl.float32)
    return tl.dot(x, w, y, input_precision="ieee")


@triton.jit
def _products(
    x_ptr,
    codes_ptr,
    scales_ptr,
    rows_ptr,
    y_ptr,
    B,
    width,
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
    """A program: BLOCK_ROWS places for all sequences. A row is `width` columns; of 4 bits, `width` groups, of which
    BLOCK_COLS bytes are taken at once."""
    places = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    valid = places < k
    rows = _rows(rows_ptr, places, valid, HAS_ROWS)
    sequences = tl.arange(0, BATCH)
    live = (sequences < B)[:, None]
    AT_ONCE: tl.constexpr = BLOCK_COLS if BITS == 8 else BLOCK_COLS * 2 // GROUP
    # without matrices kept apart along the row until the end: one reduction across threads instead of one a step
    if DOT:
        y = tl.zeros((BATCH, BLOCK_ROWS), dtype=tl.float32)
    else:
        y = tl.zeros((BATCH, BLOCK_ROWS, AT_ONCE), dtype=tl.float32)
    for start in range(0, width, AT_ONCE):
        cols = start + tl.arange(0, AT_ONCE)
        inside = cols < width
        if BITS == 8:
            mask = valid[:, None] & inside[None, :]
            w = tl.load(codes_ptr + rows[:, None] * width + cols[None, :], mask=mask, other=0).to(tl.float32)
            at = sequences[:, None] * width + cols[None, :]
            x = tl.load(x_ptr + at, mask=live & inside[None, :], other=0.0)
            if DOT:
                y = _dot(x, tl.trans(w), y, WIDEN)
            else:
                y += x.to(tl.float32)[:, None, :] * w[None, :, :]
        else:
            words, scales = _groups(codes_ptr, scales_ptr, rows, valid, cols, width)
            at = (sequences[:, None, None] * width + cols[None, :, None]) * GROUP + tl.arange(0, GROUP)[None, None, :]
            x = tl.load(x_ptr + at, mask=live[:, :, None] & inside[None, :, None], other=0.0)
            x = x.reshape(BATCH, 1, AT_ONCE, 2, 4, 2, 2).permute(0, 1, 2, 4, 3, 6, 5)  # as `_all_codes` has them
            if DOT:
                w = _all_codes(words) * scales.reshape(1, BLOCK_ROWS, AT_ONCE, 1, 1, 1, 1)
                w = w.reshape(BLOCK_ROWS, AT_ONCE * GROUP)
                y = _dot(x.reshape(BATCH, AT_ONCE * GROUP), tl.trans(w), y, WIDEN)
            else:
                first, last = tl.split(x.to(tl.float32))
                terms = _add_four(_add_four(0.0, first, words, 0), last, words, 4)
                y += tl.sum(terms, 3) * scales
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
    width,
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
    """A program: BLOCK_COLS bytes of a row, from `each` places; parts: float32 [splits, B, columns]. A row is `width`
    columns; of 4 bits, `width` groups."""
    AT_ONCE: tl.constexpr = BLOCK_COLS if BITS == 8 else BLOCK_COLS * 2 // GROUP
    COLUMNS: tl.constexpr = BLOCK_COLS * 8 // BITS
    cols = tl.program_id(0) * AT_ONCE + tl.arange(0, AT_ONCE)
    inside = cols < width
    split = tl.program_id(1)
    sequences = tl.arange(0, BATCH)
    live = (sequences < B)[:, None]
    if DOT:
        y = tl.zeros((BATCH, COLUMNS), dtype=tl.float32)
    elif BITS == 8:
        y = tl.zeros((BATCH, BLOCK_ROWS, COLUMNS), dtype=tl.float32)
    else:
        y = tl.zeros((BATCH, BLOCK_ROWS, AT_ONCE, 4, 2, 2, 2), dtype=tl.float32)
    end = tl.minimum((split + 1) * each, k)
    for start in range(split * each, end, BLOCK_ROWS):
        places = start + tl.arange(0, BLOCK_ROWS)
        valid = places < end
        rows = _rows(rows_ptr, places, valid, HAS_ROWS)
        z = tl.load(z_ptr + sequences[:, None] * k + places[None, :], mask=live & valid[None, :], other=0.0)
        if BITS == 8:
            mask = valid[:, None] & inside[None, :]
            w = tl.load(codes_ptr + rows[:, None] * width + cols[None, :], mask=mask, other=0).to(tl.float32)
            w *= tl.load(scales_ptr + rows, mask=valid, other=0.0)[:, None]
            if DOT:
                y = _dot(z, w, y, WIDEN)
            else:
                y += z.to(tl.float32)[:, :, None] * w[None, :, :]
        else:
            words, scales = _groups(codes_ptr, scales_ptr, rows, valid, cols, width)
            if DOT:
                w = _all_codes(words) * scales.reshape(1, BLOCK_ROWS, AT_ONCE, 1, 1, 1, 1)
                y = _dot(z, w.reshape(BLOCK_ROWS, COLUMNS), y, WIDEN)
            else:
                scales = z.to(tl.float32)[:, :, None] * scales
                y += scales.reshape(BATCH, BLOCK_ROWS, AT_ONCE, 1, 1, 1, 1) * _all_codes(words)
    if not DOT:
        y = tl.sum(y, 1)
    if BITS == 4:  # columns in order
        y = y.reshape(BATCH, AT_ONCE, 4, 2, 2, 2).permute(0, 1, 3, 2, 5, 4).reshape(BATCH, COLUMNS)
    cols = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    columns = width
    if BITS == 4:
        columns = width * GROUP
    to = parts_ptr + (split * B + sequences[:, None]).to(tl.int64) * columns + cols[None, :]
    tl.store(to, y, mask=live & (cols < columns)[None, :])


def _width(weight: QuantizedRows) -> int:
    """Columns of a row, of 4 bits groups."""
    return weight.columns if weight.bits == 8 else weight.columns // GROUP


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
            x, weight.codes, weight.scales, weight.codes if rows is None else rows, y, len(x), _width(weight), k,
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
            z, weight.codes, weight.scales, weight.codes if rows is None else rows, parts, B, _width(weight), k, each,
            HAS_ROWS=rows is not None, BITS=weight.bits, GROUP=GROUP, BATCH=padded_batch(B, dot), DOT=dot,
            WIDEN=WIDEN, **launch_options(config),
        )  # fmt: skip
    return parts.sum(0).to(z.dtype)
