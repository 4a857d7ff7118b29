"""An FFN whose weights are stored in few bits, one neuron a row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from caprese.kernels.packed import PackedFFN
from caprese.kernels.quantized import products, sums
from caprese.kernels.quantized.codes import QuantizedRows
from caprese.models import FFN, Weights


class QuantizedFFN(PackedFFN):
    """The same functions as `models.FFN`.

    Attributes:
        first: gate over up, [2 F, D]; up alone where there is no gate.
        second: down, stored transposed, [F, D].
    """

    first: QuantizedRows
    second: QuantizedRows

    def __init__(
        self,
        ffn: FFN | PackedFFN,
        store: Callable[[torch.Tensor, torch.Tensor | None], QuantizedRows],
        importance: torch.Tensor | None = None,
    ) -> None:
        """
        Args:
            store: quantises a weight [R, C] by the importance of its columns.
            importance: [D], of the input's channels.
        """
        nn.Module.__init__(self)
        w = ffn.weights()
        self.gated, self.fused = ffn.gated, ffn.fused
        self.hidden_size, self.width, self.act = ffn.hidden_size, ffn.width, ffn.act
        self.dtype: torch.dtype = w.up.dtype
        self.first = store(w.up if w.gate is None else torch.cat([w.gate, w.up]), importance)
        self.second = store(w.down.T, None)
        bias = w.up_bias if w.gate_bias is None or w.up_bias is None else torch.cat([w.gate_bias, w.up_bias])
        self.register_buffer("bias", bias, persistent=False)
        self.register_buffer("down_bias", w.down_bias, persistent=False)

    @property
    def device(self) -> torch.device:
        return self.second.codes.device

    def take(self, index: torch.Tensor) -> QuantizedFFN:
        """The neurons `index` [k], gathered as they are stored."""
        taken: Any = QuantizedFFN.__new__(QuantizedFFN)
        nn.Module.__init__(taken)
        for name in ("gated", "fused", "hidden_size", "act", "dtype"):
            setattr(taken, name, getattr(self, name))
        taken.width = len(index)
        both = torch.cat([index, index + self.width]) if self.gated else index
        taken.first, taken.second = self.first.take(both), self.second.take(index)
        bias: Any = self.bias
        taken.register_buffer("bias", None if bias is None else bias[both], persistent=False)
        taken.register_buffer("down_bias", self.down_bias, persistent=False)
        return taken

    def neurons(self, x: torch.Tensor, x_up: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        if x_up is not None and x_up is not x and self.gated:
            gate, up = self._first(x).chunk(2, -1)[0], self._first(x_up).chunk(2, -1)[1]
        else:
            product = self._first(x)
            if not self.gated:
                a = self.act(product)
                return a, a
            gate, up = product.chunk(2, -1)
        a = self.act(gate)
        return a, a * up

    def _first(self, x: torch.Tensor) -> torch.Tensor:
        y = products(x.flatten(0, -2), self.first)
        bias: Any = self.bias
        return (y if bias is None else y + bias).view(*x.shape[:-1], -1)

    def down(self, z: torch.Tensor) -> torch.Tensor:
        y = sums(z.flatten(0, -2), self.second)
        bias: Any = self.down_bias
        return (y if bias is None else y + bias).view(*z.shape[:-1], -1)

    def weights(self) -> Weights:
        """What the codes stand for."""
        up = self.first.wide(self.dtype)
        gate, up = up.chunk(2) if self.gated else (None, up)
        bias: Any = self.bias
        gate_bias, bias = bias.chunk(2) if self.gated and bias is not None else (None, bias)
        return Weights(gate, gate_bias, up, bias, self.second.wide(self.dtype).T, self.down_bias)  # type: ignore[arg-type]
