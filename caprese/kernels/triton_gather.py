"""Triton kernels for `gather`, and their launchers, which take what `gather` has checked.

Decoding is bound by reading weights, so each kernel reads a needed row once for all sequences that share it: for one
or two sequences as a broadcast product, from `DOT_FROM` sequences on as a matrix product padded to 16. Rows are
contiguous, columns are the fast axis. Grids follow from shapes alone and nothing is read back from the device, so the
launchers can be captured in a CUDA graph or traced by torch.compile.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import contextlib
import os

import torch
import triton
import triton.language as tl

# Defaults by reasoning, not yet measured on hardware; `benchmarks/ffn_kernels.py --sweep` measures others.
# PROGRAMS: how many programs the rows are split for. Keys in capitals are for the launchers and kernels.
CONFIGS: dict[str, dict[str, int]] = {
    "gate_up": {"BLOCK_ROWS": 16, "BLOCK_COLS": 128, "DOT_FROM": 3, "num_warps": 4, "num_stages": 3},
    "down": {
        "BLOCK_ROWS": 16,
        "BLOCK_COLS": 256,
        "DOT_FROM": 3,
        "PROGRAMS": 512,
        "num_warps": 4,
        "num_stages": 3,
    },
    "input_sparse": {
        "BLOCK_ROWS": 16,
        "BLOCK_COLS": 256,
        "DOT_FROM": 3,
        "PROGRAMS": 512,
        "num_warps": 4,
        "num_stages": 3,
    },
    "compact": {"BLOCK": 2048, "num_warps": 8},
    "sum_splits": {"BLOCK": 64, "BLOCK_SPLITS": 32, "num_warps": 4},
}

# the interpreter multiplies bfloat16 matrices as if their bits were integers, so there they are widened first
_WIDEN = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def _activation(x, ACT: tl.constexpr):
    if ACT == "silu":
        y = x * tl.sigmoid(x)
    elif ACT == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        # (1 + tanh(u)) / 2 = sigmoid(2u), which needs no device library
        y = x * tl.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
    else:
        y = tl.where(x < 0, 0.0, x)
    return y


@triton.jit
def _row_products(
    x_ptr,
    gate_ptr,
    up_ptr,
    sequences,
    live,
    gate_rows,
    up_rows,
    valid,
    columns,
    D,
    BATCH: tl.constexpr,
    GATED: tl.constexpr,
    DOT: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """x gate' and x up' of some sequences with some rows, both [BATCH, BLOCK_ROWS]; without a gate the same twice.

    `columns` is D, or 0 to read nothing.
    """
    if DOT:
        g = tl.zeros((BATCH, BLOCK_ROWS), dtype=tl.float32)
        u = tl.zeros((BATCH, BLOCK_ROWS), dtype=tl.float32)
    else:
        # kept apart along the columns until the end: one reduction across threads instead of one a step
        g = tl.zeros((BATCH, BLOCK_ROWS, BLOCK_COLS), dtype=tl.float32)
        u = tl.zeros((BATCH, BLOCK_ROWS, BLOCK_COLS), dtype=tl.float32)
    for start in range(0, columns, BLOCK_COLS):
        cols = start + tl.arange(0, BLOCK_COLS)
        inside = cols < D
        x = tl.load(x_ptr + sequences[:, None] * D + cols[None, :], mask=live[:, None] & inside[None, :], other=0.0)
        mask = valid[:, None] & inside[None, :]
        w = tl.load(up_ptr + up_rows[:, None] + cols[None, :], mask=mask, other=0.0)
        if DOT:
            if WIDEN:
                x = x.to(tl.float32)
                w = w.to(tl.float32)
            u = tl.dot(x, tl.trans(w), u, input_precision="ieee")
        else:
            u += x.to(tl.float32)[:, None, :] * w.to(tl.float32)[None, :, :]
        if GATED:
            v = tl.load(gate_ptr + gate_rows[:, None] + cols[None, :], mask=mask, other=0.0)
            if DOT:
                if WIDEN:
                    v = v.to(tl.float32)
                g = tl.dot(x, tl.trans(v), g, input_precision="ieee")
            else:
                g += x.to(tl.float32)[:, None, :] * v.to(tl.float32)[None, :, :]
    if not DOT:
        u = tl.sum(u, 2)
        if GATED:
            g = tl.sum(g, 2)
    if not GATED:
        g = u
    return g, u


@triton.jit
def _gate_up(
    x_ptr,
    gate_ptr,
    up_ptr,
    gate_bias_ptr,
    up_bias_ptr,
    index_ptr,
    count_ptr,
    a_ptr,
    left_ptr,
    z_ptr,
    B,
    D,
    k,
    r,
    gate_stride,
    up_stride,
    left_stride,
    HAS_GATE: tl.constexpr,
    HAS_A: tl.constexpr,
    HAS_GATE_BIAS: tl.constexpr,
    HAS_UP_BIAS: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    HAS_COUNT: tl.constexpr,
    OWN: tl.constexpr,
    ACT: tl.constexpr,
    BATCH: tl.constexpr,
    DOT: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """A program: BLOCK_ROWS places of one list, or BLOCK_ROWS rows of `left` for all sequences."""
    job = tl.program_id(0)
    blocks = tl.cdiv(k, BLOCK_ROWS)
    lists = 1
    if OWN:
        lists = B
    if job < blocks * lists:
        which = job // blocks
        places = (job % blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        n = k
        if HAS_COUNT:
            n = tl.minimum(tl.load(count_ptr + which).to(tl.int32), k)
        valid = places < n
        if HAS_INDEX:
            rows = tl.load(index_ptr + which.to(tl.int64) * k + places, mask=valid, other=0).to(tl.int64)
        else:
            rows = places.to(tl.int64)
        columns = tl.where((job % blocks) * BLOCK_ROWS < n, D, 0)
        if OWN:
            sequences = which + tl.arange(0, 1)
            g, u = _row_products(
                x_ptr, gate_ptr, up_ptr, sequences, sequences < B, rows * gate_stride, rows * up_stride, valid,
                columns, D, 1, HAS_GATE, False, WIDEN, BLOCK_ROWS, BLOCK_COLS,
            )  # fmt: skip
        else:
            sequences = tl.arange(0, BATCH)
            g, u = _row_products(
                x_ptr, gate_ptr, up_ptr, sequences, sequences < B, rows * gate_stride, rows * up_stride, valid,
                columns, D, BATCH, HAS_GATE, DOT, WIDEN, BLOCK_ROWS, BLOCK_COLS,
            )  # fmt: skip
        if HAS_UP_BIAS:
            u += tl.load(up_bias_ptr + rows, mask=valid, other=0.0).to(tl.float32)[None, :]
        hold = (sequences < B)[:, None] & valid[None, :]
        if HAS_A:
            z = tl.load(a_ptr + sequences[:, None] * k + places[None, :], mask=hold, other=0.0).to(tl.float32) * u
        elif HAS_GATE:
            if HAS_GATE_BIAS:
                g += tl.load(gate_bias_ptr + rows, mask=valid, other=0.0).to(tl.float32)[None, :]
            z = _activation(g, ACT) * u
        else:
            z = _activation(u, ACT)
        # zeros beyond the list's end, so that nothing undefined leaves here
        to = z_ptr + sequences[:, None] * (k + r) + places[None, :]
        tl.store(
            to, tl.where(hold, z, 0.0).to(z_ptr.dtype.element_ty), mask=(sequences < B)[:, None] & (places < k)[None, :]
        )
    else:
        tail = (job - blocks * lists) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        all_of_them = tl.arange(0, BATCH)
        offsets = tail.to(tl.int64) * left_stride
        _, product = _row_products(
            x_ptr, left_ptr, left_ptr, all_of_them, all_of_them < B, offsets, offsets, tail < r,
            D, D, BATCH, False, DOT, WIDEN, BLOCK_ROWS, BLOCK_COLS,
        )  # fmt: skip
        tail_to = z_ptr + all_of_them[:, None] * (k + r) + k + tail[None, :]
        tl.store(tail_to, product.to(z_ptr.dtype.element_ty), mask=(all_of_them < B)[:, None] & (tail < r)[None, :])


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


def _device(x: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device; a compiled graph has its own way to x's."""
    if torch.compiler.is_compiling() or not x.is_cuda:
        return contextlib.nullcontext()
    return torch.cuda.device_of(x)


def _batch(B: int, dot_from: int) -> tuple[int, bool]:
    """Sequences a program is padded to, and whether it multiplies matrices."""
    if dot_from <= B:
        return 16, True
    return (1 if B == 1 else 2 if B == 2 else 4 if B <= 4 else 8 if B <= 8 else 16), False


def _launch(config: dict[str, int]) -> dict[str, int]:
    return {key: value for key, value in config.items() if key not in ("DOT_FROM", "PROGRAMS")}


def gate_up(
    x: torch.Tensor,
    gate: torch.Tensor | None,
    up: torch.Tensor,
    index: torch.Tensor | None,
    act: str,
    left: torch.Tensor | None = None,
    gate_bias: torch.Tensor | None = None,
    up_bias: torch.Tensor | None = None,
    count: torch.Tensor | None = None,
    a: torch.Tensor | None = None,
    config: dict[str, int] | None = None,
) -> torch.Tensor:
    """See `gather.gate_up`; config: in place of `CONFIGS`."""
    config = CONFIGS["gate_up"] if config is None else config
    x = x.contiguous()
    B, D = x.shape
    k = up.shape[0] if index is None else index.shape[1]
    r = 0 if left is None else left.shape[0]
    z = torch.empty(B, k + r, dtype=x.dtype, device=x.device)
    own = index is not None and index.shape[0] > 1
    batch, dot = _batch(B, config["DOT_FROM"])
    programs = triton.cdiv(k, config["BLOCK_ROWS"]) * (B if own else 1) + triton.cdiv(r, config["BLOCK_ROWS"])
    if programs == 0:
        return z
    with _device(x):
        # an argument that is not there is x, and never read
        _gate_up[(programs,)](
            x,
            x if gate is None else gate,
            up,
            x if gate_bias is None else gate_bias.contiguous(),
            x if up_bias is None else up_bias.contiguous(),
            x if index is None else index.contiguous(),
            x if count is None else count.contiguous(),
            x if a is None else a.contiguous(),
            x if left is None else left,
            z,
            B,
            D,
            k,
            r,
            0 if gate is None else gate.stride(0),
            up.stride(0),
            0 if left is None else left.stride(0),
            HAS_GATE=gate is not None,
            HAS_A=a is not None,
            HAS_GATE_BIAS=gate_bias is not None,
            HAS_UP_BIAS=up_bias is not None,
            HAS_INDEX=index is not None,
            HAS_COUNT=count is not None,
            OWN=own,
            ACT=act,
            BATCH=batch,
            DOT=dot,
            WIDEN=_WIDEN,
            **_launch(config),
        )
    return z


def cats_select(
    x: torch.Tensor,
    gate: torch.Tensor,
    threshold: torch.Tensor,
    act: str,
    gate_bias: torch.Tensor | None = None,
    config: dict[str, int] | None = None,
    compact: dict[str, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `gather.cats_select`; config, compact: in place of `CONFIGS`' gate_up and compact."""
    a = gate_up(x, None, gate, None, act, up_bias=gate_bias, config=config)
    B, width = a.shape
    kept = torch.empty_like(a)
    index = torch.empty(B, width, dtype=torch.int32, device=a.device)
    count = torch.empty(B, dtype=torch.int32, device=a.device)
    one = threshold.numel() == 1
    with _device(a):
        _compact[(B,)](
            a,
            threshold.contiguous(),
            kept,
            index,
            count,
            width,
            ONE_THRESHOLD=one,
            **(CONFIGS["compact"] if compact is None else compact),
        )
    return kept, index, count


def _split_down(
    z: torch.Tensor,
    weight: torch.Tensor,
    index: torch.Tensor | None,
    right: torch.Tensor | None,
    bias: torch.Tensor | None,
    count: torch.Tensor | None,
    threshold: torch.Tensor | None,
    atomic: bool,
    config: dict[str, int],
) -> torch.Tensor:
    """`down`, or with a threshold `input_sparse`: parts of the rows side by side, then their sum."""
    z = z.contiguous()
    B = z.shape[0]
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
    batch, dot = _batch(B, config["DOT_FROM"])
    if not atomic:
        parts = torch.empty(splits + tail_splits, B, D, dtype=torch.float32, device=z.device)
    elif bias is None:
        parts = torch.zeros(B, D, dtype=torch.float32, device=z.device)
    else:
        parts = bias.float().expand(B, D).contiguous()
    with _device(z):
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
            BATCH=batch,
            DOT=dot,
            WIDEN=_WIDEN,
            **_launch(config),
        )
        if atomic:
            return parts.to(z.dtype)
        total = CONFIGS["sum_splits"]
        _sum_splits[(triton.cdiv(B * D, total["BLOCK"]),)](
            parts, z if bias is None else bias.contiguous(), y, B * D, D, splits + tail_splits,
            HAS_BIAS=bias is not None, **total,
        )  # fmt: skip
    return y


def down(
    z: torch.Tensor,
    down: torch.Tensor,
    index: torch.Tensor | None,
    right: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    count: torch.Tensor | None = None,
    atomic: bool = False,
    config: dict[str, int] | None = None,
) -> torch.Tensor:
    """See `gather.down`; config: in place of `CONFIGS`."""
    return _split_down(z, down, index, right, bias, count, None, atomic, CONFIGS["down"] if config is None else config)


def input_sparse(
    x: torch.Tensor,
    weight_t: torch.Tensor,
    threshold: torch.Tensor,
    bias: torch.Tensor | None = None,
    config: dict[str, int] | None = None,
) -> torch.Tensor:
    """See `gather.input_sparse`; config: in place of `CONFIGS`."""
    config = CONFIGS["input_sparse"] if config is None else config
    return _split_down(x, weight_t, None, None, bias, None, threshold, False, config)
