"""What the Triton kernels share.

Decoding is bound by reading weights, so each kernel reads a needed row once for all sequences that share it: for
few sequences as a broadcast product, for more as a matrix product padded to 16. Rows are
contiguous, columns are the fast axis. Grids follow from shapes alone and nothing is read back from the device, so the
launchers can be captured in a CUDA graph or traced by torch.compile. Kernels take their tensors one by one, as Triton
wants them.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch
import triton
import triton.language as tl

# Launch settings of each operation by how many sequences there are, up to the number that names them: measured by
# `benchmarks/gpu.py sweep`, which writes the file, or by reasoning where its `measured` does not name them.
# PROGRAMS: how many programs the rows are split for. DOT: whether matrices are multiplied. Keys in capitals are for the
# launchers and kernels.
Config = dict[str, int]
CONFIGS: dict[str, dict[int, Config]] = {
    operation: {int(most): values for most, values in by_batch.items()}
    for operation, by_batch in json.loads(Path(__file__).with_name("tuned.json").read_text())["configs"].items()
}

# the interpreter multiplies bfloat16 matrices as if their bits were integers, so there they are widened first
WIDEN = os.environ.get("TRITON_INTERPRET") == "1"


def config_of(operation: str, B: int = 1) -> Config:
    """The launch settings of an operation on B sequences; those of the most there are for any larger batch."""
    by_batch = CONFIGS[operation]
    for most in by_batch:  # from few to many
        if most >= B:
            break
    return by_batch[most]


@contextlib.contextmanager
def configured(operation: str, **values: int) -> Iterator[None]:
    """Inside, an operation is launched with these values in place of its own, whatever the batch."""
    before = CONFIGS[operation]
    CONFIGS[operation] = {most: {**config, **values} for most, config in before.items()}
    try:
        yield
    finally:
        CONFIGS[operation] = before


def on_device(x: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device; a compiled graph has its own way to x's."""
    if torch.compiler.is_compiling() or not x.is_cuda:
        return contextlib.nullcontext()
    return torch.cuda.device_of(x)


def padded_batch(B: int, dot: bool) -> int:
    """Sequences a program is padded to; matrices are multiplied from 16 on."""
    return 16 if dot or B > 8 else 8 if B > 4 else 4 if B > 2 else B


def launch_options(config: Config, hip: bool = torch.version.hip is not None) -> Config:
    """What a launch is given of an operation's settings.

    Args:
        hip: whether it is for an AMD GPU, for which Triton 3.6 cannot compile pipelined matrix products of few rows.
    """
    options = {key: value for key, value in config.items() if key not in ("DOT", "PROGRAMS")}
    return options | {"num_stages": 1} if hip and config.get("DOT") else options


@triton.jit
def activation(x, ACT: tl.constexpr):
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
def row_products(
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
