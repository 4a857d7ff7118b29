"""The same in plain torch, all tokens of a block at once: it is short."""

from __future__ import annotations

import torch

from caprese.kernels.scan.chunk import mixing


def replay(state: torch.Tensor, x: torch.Tensor, dt: torch.Tensor, B: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    """The state after these tokens."""
    total = (dt * A).cumsum(1)
    weight = (total[:, -1:] - total).exp() * dt
    added = torch.einsum("bthp,bthn->bhpn", weight[..., None] * x, B)
    return total[:, -1].exp()[..., None, None] * state + added


def outputs(
    state: torch.Tensor, x: torch.Tensor, dt: torch.Tensor, B: torch.Tensor, A: torch.Tensor, C: torch.Tensor
) -> torch.Tensor:
    """y [B, T, H, P] of these tokens behind a state."""
    x, dt, B, C = (t.transpose(1, 2) for t in (x, dt, B, C))  # [B, H, T, ...]
    total = (dt * A[:, None]).cumsum(-1)
    y = mixing(total, dt, B, C) @ x + total.exp()[..., None] * (C @ state.mT)
    return y.transpose(1, 2)
