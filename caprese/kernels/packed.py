"""An FFN of which only some neurons are used."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from caprese.models import FFN, Weights


def sparse_down(ffn: FFN | PackedFFN, z: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
    """The reference: the dense product with the dropped neurons at zero.

    Args:
        z: act(gate(x)) * up(x), [B, T, F].
        keep: bool, broadcastable to it; None keeps all.
    Returns: [B, T, D].
    """
    return ffn.down(z if keep is None else z.masked_fill(~keep, 0))


class PackedFFN(nn.Module):
    """Chosen neurons of an FFN, gathered once into contiguous tensors; the same functions as `models.FFN`."""

    def __init__(self, ffn: FFN | PackedFFN, index: torch.Tensor) -> None:
        """index: the chosen rows, [k]."""
        super().__init__()
        w = ffn.weights()
        self.gated: bool = ffn.gated
        self.fused: bool = ffn.fused
        self.hidden_size: int = ffn.hidden_size
        self.width = len(index)
        self.act: Callable[[torch.Tensor], torch.Tensor] = ffn.act
        gate_up = w.up[index] if w.gate is None else torch.cat([w.gate[index], w.up[index]])
        bias = None
        if w.up_bias is not None:
            bias = w.up_bias[index] if w.gate_bias is None else torch.cat([w.gate_bias[index], w.up_bias[index]])
        self.register_buffer("gate_up", gate_up, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.register_buffer("down_weight", w.down[:, index].contiguous(), persistent=False)
        self.register_buffer("down_bias", w.down_bias, persistent=False)

    def take(self, index: torch.Tensor) -> PackedFFN:
        """The neurons `index` [k] of these."""
        return PackedFFN(self, index)

    @property
    def device(self) -> torch.device:
        return self.down_weight.device  # type: ignore[return-value]

    def neurons(self, x: torch.Tensor, x_up: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """x [..., D] -> (a, z), both [..., k]; see `models.FFN.neurons`."""
        if x_up is not None and x_up is not x and self.gated:
            w = self.weights()
            a = self.act(F.linear(x, w.gate, w.gate_bias))  # type: ignore[arg-type]
            return a, a * F.linear(x_up, w.up, w.up_bias)
        product = F.linear(x, self.gate_up, self.bias)  # type: ignore[arg-type]
        if not self.gated:
            a = self.act(product)
            return a, a
        gate, up = product.chunk(2, dim=-1)
        a = self.act(gate)
        return a, a * up

    def down(self, z: torch.Tensor) -> torch.Tensor:
        return F.linear(z, self.down_weight, self.down_bias)  # type: ignore[arg-type]

    def weights(self) -> Weights:
        gate: torch.Tensor | None = None
        gate_bias: torch.Tensor | None = None
        up, bias = self.gate_up, self.bias
        if self.gated:
            gate, up = up.chunk(2)  # type: ignore[operator]
            gate_bias, bias = (None, None) if bias is None else bias.chunk(2)  # type: ignore[operator]
        return Weights(gate, gate_bias, up, bias, self.down_weight, self.down_bias)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.neurons(x)[1])
