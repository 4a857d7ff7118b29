"""An FFN seen from outside: its neurons and its weights, however its family spells them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from caprese.models.family import Family
from caprese.models.linear import anchor, float_type, linear_weights, sizes, why_not_by_row


class Weights(NamedTuple):
    """One neuron a row: gate and up [F, D], down [D, F]; views on the model's own tensors where that is possible.

    `gate` is None in a plain FFN.
    """

    gate: torch.Tensor | None
    gate_bias: torch.Tensor | None
    up: torch.Tensor
    up_bias: torch.Tensor | None
    down: torch.Tensor
    down_bias: torch.Tensor | None


@dataclass(frozen=True)
class FFN:
    """A view on the parts of an FFN: down(act(gate(x)) * up(x)), or down(act(up(x))) where there is no gate.

    It owns nothing. Shapes: x [..., D], neurons [..., F].
    """

    module: Any
    family: Family

    @property
    def gated(self) -> bool:
        return bool(self.family.gate)

    @property
    def fused(self) -> bool:
        """Whether one matrix holds gate over up."""
        return self.family.gate == self.family.up

    def part(self, name: str) -> Any:
        return getattr(self.module, getattr(self.family, name))

    def linears(self) -> dict[str, Any]:
        """Its linear layers: gate (where it stands alone), up, down."""
        names = ("gate", "up", "down") if self.gated and not self.fused else ("up", "down")
        return {name: self.part(name) for name in names}

    @property
    def hidden_size(self) -> int:
        return sizes(self.part("up"))[0]

    @property
    def width(self) -> int:
        rows = sizes(self.part("up"))[1]
        return rows // 2 if self.fused else rows

    @property
    def row_wise(self) -> bool:
        """Whether its weights can be told apart by neuron; packed ones and those with an adapter on them cannot."""
        return all(why_not_by_row(linear) is None for linear in self.linears().values())

    def act(self, x: torch.Tensor) -> torch.Tensor:
        return self.part("act")(x)

    def neurons(self, x: torch.Tensor, x_up: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """x [..., D] -> (a, z), both [..., F]: act(gate(x)) and act(gate(x)) * up(x); the same twice without a gate.

        Args:
            x_up: what up sees instead of x; a fused or plain FFN has one input and takes x.
        """
        if self.fused:
            gate, up = self.part("up")(x).chunk(2, dim=-1)
            a = self.act(gate)
            return a, a * up
        if not self.gated:
            a = self.act(self.part("up")(x))
            return a, a
        a = self.act(self.part("gate")(x))
        return a, a * self.part("up")(x if x_up is None else x_up)

    def down(self, z: torch.Tensor) -> torch.Tensor:
        """z [..., F] -> [..., D]."""
        return self.part("down")(z)

    def weights(self) -> Weights:
        """The weights by neuron.

        Raises:
            CapreseError: they are packed, or an adapter is on them.
        """
        up, up_bias = linear_weights(self.part("up"))
        down, down_bias = linear_weights(self.part("down"))
        if self.fused:
            gate, up = up.chunk(2)
            gate_bias, up_bias = (None, None) if up_bias is None else up_bias.chunk(2)
            return Weights(gate, gate_bias, up, up_bias, down, down_bias)
        if not self.gated:
            return Weights(None, None, up, up_bias, down, down_bias)
        return Weights(*linear_weights(self.part("gate")), up, up_bias, down, down_bias)

    @property
    def device(self) -> torch.device:
        return anchor(self.part("down")).device

    @property
    def dtype(self) -> torch.dtype:
        """The type to compute in beside its weights."""
        return float_type(anchor(self.part("down")))


class _Named(nn.Module):
    """Says what it is to whoever prints it, as PEFT does when it cannot put an adapter there."""

    def __repr__(self) -> str:
        return "(an FFN that an efficient method runs as one; an adapter goes on it before caprese.apply)"


class Passed(_Named, nn.Identity):
    """Stands where the decoder layer calls a part that `Spread` has called already."""


class Spread(_Named):
    """The parts of an FFN that sit on the decoder layer itself, gathered so that they can be called as one."""

    def __init__(self, layer: nn.Module, family: Family) -> None:
        super().__init__()
        self.names = [name for name in (family.up, family.act, family.down) if name]
        for name in self.names:
            setattr(self, name, getattr(layer, name))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name in self.names:
            x = getattr(self, name)(x)
        return x
