"""The Triton kernel of `gate_up`, and its launcher, which takes what has been checked."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from caprese.kernels.dispatch import Rows
from caprese.kernels.tiles import WIDEN, activation, config_of, launch_options, on_device, padded_batch, row_products


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
            g, u = row_products(
                x_ptr, gate_ptr, up_ptr, sequences, sequences < B, rows * gate_stride, rows * up_stride, valid,
                columns, D, 1, HAS_GATE, False, WIDEN, BLOCK_ROWS, BLOCK_COLS,
            )  # fmt: skip
        else:
            sequences = tl.arange(0, BATCH)
            g, u = row_products(
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
            z = activation(g, ACT) * u
        else:
            z = activation(u, ACT)
        # zeros beyond the list's end, so that nothing undefined leaves here
        to = z_ptr + sequences[:, None] * (k + r) + places[None, :]
        tl.store(
            to, tl.where(hold, z, 0.0).to(z_ptr.dtype.element_ty), mask=(sequences < B)[:, None] & (places < k)[None, :]
        )
    else:
        tail = (job - blocks * lists) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        all_of_them = tl.arange(0, BATCH)
        offsets = tail.to(tl.int64) * left_stride
        _, product = row_products(
            x_ptr, left_ptr, left_ptr, all_of_them, all_of_them < B, offsets, offsets, tail < r,
            D, D, BATCH, False, DOT, WIDEN, BLOCK_ROWS, BLOCK_COLS,
        )  # fmt: skip
        tail_to = z_ptr + all_of_them[:, None] * (k + r) + k + tail[None, :]
        tl.store(tail_to, product.to(z_ptr.dtype.element_ty), mask=(all_of_them < B)[:, None] & (tail < r)[None, :])


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
    """See `kernels.gate_up`."""
    (index, count), (gate_bias, up_bias) = rows, biases
    x = x.contiguous()
    B, D = x.shape
    k = up.shape[0] if index is None else index.shape[1]
    r = 0 if left is None else left.shape[0]
    z = torch.empty(B, k + r, dtype=x.dtype, device=x.device)
    own = index is not None and index.shape[0] > 1
    config = config_of("gate_up", B)
    dot = bool(config["DOT"])
    programs = triton.cdiv(k, config["BLOCK_ROWS"]) * (B if own else 1) + triton.cdiv(r, config["BLOCK_ROWS"])
    if programs == 0:
        return z
    with on_device(x):
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
            BATCH=padded_batch(B, dot),
            DOT=dot,
            WIDEN=WIDEN,
            **launch_options(config),
        )
    return z
