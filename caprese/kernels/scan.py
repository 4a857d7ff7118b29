"""The state-space recurrence of Mamba-2 (arXiv 2405.21060): token by token, in chunks, and one step of decoding.

S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T,  y_t = S_t C_t, for each head on its own.

Shapes: x [B, T, H, P], dt [B, T, H] (positive; 0 passes a token by), A [H] (negative), B and C [B, T, H, N], S and
`state` [B, H, P, N].
"""

from __future__ import annotations

import torch

# Tokens whose products are taken at once; the cost of a token grows with it, that of a chunk does not.
CHUNK = 64


def recurrence(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference, as it is written: y [B, T, H, P] and the last state."""
    batch, length, heads, size = x.shape
    state = x.new_zeros(batch, heads, size, B.shape[-1]) if state is None else state
    out = []
    for t in range(length):
        y, state = step(x[:, t], dt[:, t], A, B[:, t], C[:, t], state)
        out.append(y)
    return torch.stack(out, 1), state


def step(
    x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token: the same shapes without T."""
    decay = torch.exp(dt * A)[..., None, None]
    state = decay * state + (dt[..., None] * x)[..., None] * B[..., None, :]
    return (state @ C.unsqueeze(-1)).squeeze(-1), state


def chunk_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    state: torch.Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in chunks (section 6): within one a masked product as in attention, between them the recurrence."""
    batch, length, heads, size = x.shape
    extra = -length % chunk
    if extra:  # tokens that are passed by
        x, B, C = (torch.nn.functional.pad(t, (0, 0, 0, 0, 0, extra)) for t in (x, B, C))
        dt = torch.nn.functional.pad(dt, (0, 0, 0, extra))
    # [B, chunks, H, chunk, ...]
    x, B, C = (t.unflatten(1, (-1, chunk)).transpose(2, 3) for t in (x, B, C))
    dt = dt.unflatten(1, (-1, chunk)).transpose(2, 3)
    total = (dt * A[:, None]).cumsum(-1)
    gap = total[..., :, None] - total[..., None, :]
    causal = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).tril()
    mixing = (C @ B.transpose(-1, -2)) * gap.masked_fill(~causal, -torch.inf).exp() * dt[..., None, :]
    y = mixing @ x
    weight = (total[..., -1:] - total).exp() * dt
    gathered = (weight[..., None] * x).transpose(-1, -2) @ B  # what each chunk adds to the state, [B, chunks, H, P, N]
    decay = total[..., -1].exp()[..., None, None]
    state = x.new_zeros(batch, heads, size, B.shape[-1]) if state is None else state
    before = []
    for c in range(x.shape[1]):
        before.append(state)
        state = decay[:, c] * state + gathered[:, c]
    y = y + total.exp()[..., None] * (C @ torch.stack(before, 1).transpose(-1, -2))
    return y.transpose(2, 3).flatten(1, 2)[:, :length], state
