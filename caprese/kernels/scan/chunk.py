"""The recurrence in chunks."""

from __future__ import annotations

import torch
import torch.nn.functional as F

# Tokens whose products are taken at once; the cost of a token grows with it, that of a chunk does not.
CHUNK = 64


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
        x, B, C = (F.pad(t, (0, 0, 0, 0, 0, extra)) for t in (x, B, C))
        dt = F.pad(dt, (0, 0, 0, extra))
    # [B, chunks, H, chunk, ...]
    x, B, C = (t.unflatten(1, (-1, chunk)).transpose(2, 3) for t in (x, B, C))
    dt = dt.unflatten(1, (-1, chunk)).transpose(2, 3)
    total = (dt * A[:, None]).cumsum(-1)
    y = mixing(total, dt, B, C) @ x
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


def mixing_matrix(dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor) -> torch.Tensor:
    """The recurrence as one matrix, y = M x from an empty state (equation 6): M [B, H, T, T], lower triangular."""
    dt, B, C = dt.transpose(1, 2), B.transpose(1, 2), C.transpose(1, 2)
    return mixing((dt * A[:, None]).cumsum(-1), dt, B, C)


def mixing(total: torch.Tensor, dt: torch.Tensor, B: torch.Tensor, C: torch.Tensor) -> torch.Tensor:
    """M of a stretch of tokens; `total` [..., T] is dt A summed up to each."""
    gap = total[..., :, None] - total[..., None, :]
    causal = torch.ones(gap.shape[-2:], dtype=torch.bool, device=gap.device).tril()
    return (C @ B.transpose(-1, -2)) * gap.masked_fill(~causal, -torch.inf).exp() * dt[..., None, :]
