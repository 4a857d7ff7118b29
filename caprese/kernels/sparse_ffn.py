"""A gated FFN of which only some neurons are used."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from caprese.models import GatedFFN

Packed = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor | None]


def sparse_ffn(ffn: GatedFFN, neurons: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """The reference: the dense product with the dropped neurons at zero.

    Args:
        neurons: act(gate(x)) * up(x), [B, T, F].
        keep: bool, broadcastable to it.
    Returns: [B, T, D].
    """
    return ffn.down(neurons.masked_fill(~keep, 0))


def pack(ffn: GatedFFN, index: torch.Tensor) -> Packed:
    """Gather the chosen neurons once: ([2k, D] gate over up, bias, [D, k] down, bias)."""
    gate, up, down = ffn.gate, ffn.up, ffn.down
    bias = None if gate.bias is None else torch.cat([gate.bias[index], up.bias[index]])
    return torch.cat([gate.weight[index], up.weight[index]]), bias, down.weight[:, index].contiguous(), down.bias


def packed_ffn(x: torch.Tensor, packed: Packed, act: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """x [..., D] -> [..., D] through the packed neurons alone."""
    gate_up, bias, down, down_bias = packed
    gate, up = F.linear(x, gate_up, bias).chunk(2, dim=-1)
    return F.linear(act(gate) * up, down, down_bias)
