"""Verifying tokens on a recurrent state: what of the last ones was accepted is replayed, then the new ones are read.

The hardware-aware algorithm of arXiv 2408.15237, section 4.2, for the recurrence of `kernels.scan`: a verifier keeps x,
dt and B of its last block, and no states; the next step replays what was accepted of it from the last kept state, keeps
that state, and reads the new tokens. A state weighs as much as a hundred tokens' x, dt and B.

Shapes: x [B, T, H, P], dt [B, T, H], A [H], B and C [B, T, H, N], state [B, H, P, N]; dt 0 passes a token by, so each
sequence replays as many tokens as it accepted.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from caprese.kernels.dispatch import load_triton, uses_triton
from caprese.kernels.replay import naive

triton = load_triton("replay")


class Tokens(NamedTuple):
    """What is replayed of T tokens: x, dt and B."""

    x: torch.Tensor
    dt: torch.Tensor
    B: torch.Tensor


def replay(state: torch.Tensor, known: Tokens, A: torch.Tensor) -> torch.Tensor:
    """The state after `known`, a tensor of its own."""
    return naive.replay(state, *known, A)


def verify(
    state: torch.Tensor, known: Tokens | None, new: Tokens, A: torch.Tensor, C: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """y [B, T, H, P] of the `new` tokens behind those `known`, and the state [B, H, P, N] between the two."""
    if known is not None and uses_triton(state, *known, *new, C):
        return triton.verify(state, known, new, A, C)
    kept = state if known is None else naive.replay(state, *known, A)
    return naive.outputs(kept, *new, A, C), kept
