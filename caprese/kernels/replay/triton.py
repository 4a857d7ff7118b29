"""The Triton kernel of `verify`: the state is read once and written once, whatever the number of tokens."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from caprese.kernels.tiles import on_device

# rows of the state in one program: with N 64 to 128 they stay in registers
_ROWS = 16


@triton.jit
def _verify(
    state_ptr,
    kept_ptr,
    x0_ptr,
    dt0_ptr,
    b0_ptr,
    x_ptr,
    dt_ptr,
    b_ptr,
    c_ptr,
    rate_ptr,
    y_ptr,
    H,
    P,
    N,
    known,
    new,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """A program: ROWS rows of one head's state, of one sequence. Tensors are contiguous, tokens before heads."""
    which = tl.program_id(0).to(tl.int64)
    batch, head = which // H, which % H
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    live, wide = rows < P, cols < N
    rate = tl.load(rate_ptr + head).to(tl.float32)
    at = which * P * N + rows[:, None] * N + cols[None, :]
    inside = live[:, None] & wide[None, :]
    state = tl.load(state_ptr + at, mask=inside, other=0.0).to(tl.float32)
    for t in range(0, known):
        token = (batch * known + t) * H + head
        dt = tl.load(dt0_ptr + token).to(tl.float32)
        x = tl.load(x0_ptr + token * P + rows, mask=live, other=0.0).to(tl.float32)
        b = tl.load(b0_ptr + token * N + cols, mask=wide, other=0.0).to(tl.float32)
        state = tl.exp(dt * rate) * state + (dt * x)[:, None] * b[None, :]
    tl.store(kept_ptr + at, state, mask=inside)
    for t in range(0, new):
        token = (batch * new + t) * H + head
        dt = tl.load(dt_ptr + token).to(tl.float32)
        x = tl.load(x_ptr + token * P + rows, mask=live, other=0.0).to(tl.float32)
        b = tl.load(b_ptr + token * N + cols, mask=wide, other=0.0).to(tl.float32)
        c = tl.load(c_ptr + token * N + cols, mask=wide, other=0.0).to(tl.float32)
        state = tl.exp(dt * rate) * state + (dt * x)[:, None] * b[None, :]
        tl.store(y_ptr + token * P + rows, tl.sum(state * c[None, :], 1), mask=live)


def verify(state: torch.Tensor, known: Any, new: Any, A: torch.Tensor, C: torch.Tensor) -> Any:
    """See `kernels.replay.verify`."""
    batch, heads, size, width = state.shape
    state, A, C = state.contiguous(), A.contiguous(), C.contiguous()
    known, new = ([t.contiguous() for t in tokens] for tokens in (known, new))
    kept, y = torch.empty_like(state), torch.empty_like(new[0])
    lengths = known[0].shape[1], new[0].shape[1]
    blocks = {"ROWS": _ROWS, "COLS": triton.next_power_of_2(width)}
    grid = (batch * heads, triton.cdiv(size, _ROWS))
    with on_device(state):
        _verify[grid](state, kept, *known, *new, C, A, y, heads, size, width, *lengths, **blocks)
    return y, kept
