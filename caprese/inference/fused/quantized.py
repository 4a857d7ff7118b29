"""The packed form of weights in few bits: chosen rows gathered as they are stored."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from caprese import kernels
from caprese.efficient_methods import Method
from caprese.inference.fused.packed import Packed
from caprese.kernels import QuantizedFFN, QuantizedRows


class PackedRows(Packed):
    """[gate_k; up_k] and down_k in few bits; the branch stays in the model's type, in two products of its own."""

    first: QuantizedRows
    second: QuantizedRows

    def _fill(self, choices: list[tuple[Method, torch.Tensor | None]], branch: Any) -> None:
        (wrapper,) = self.wrapper
        ffn = wrapper.transformed
        assert isinstance(ffn, QuantizedFFN)
        index = self._take_over(choices)
        both = index if index is None or not ffn.gated else torch.cat([index, index + ffn.width])
        self.first = self._taken("first", ffn.first, both)
        self.second = self._taken("second", ffn.second, index)
        bias: Any = ffn.bias
        self._hold("first_bias", bias if bias is None or both is None else bias[both])
        left, right, extra = branch or (None, None, None)
        self._hold("left", left)
        self._hold("right", None if right is None else right.T.contiguous())
        down: Any = ffn.down_bias
        self._hold("second_bias", extra if down is None else down + (0 if extra is None else extra))

    def _taken(self, name: str, weight: QuantizedRows, index: torch.Tensor | None) -> QuantizedRows:
        """Rows of a weight; where the last ones were, if they fit there."""
        if index is None:
            return weight
        held = getattr(self, name, None)
        if not isinstance(held, QuantizedRows) or held is weight or len(held) != len(index):
            return weight.take(index)
        torch.index_select(weight.codes, 0, index, out=held.codes)
        torch.index_select(weight.scales, 0, index, out=held.scales)
        return held

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(0, -2)
        h = kernels.products(flat, self.first)
        first_bias: Any = self.first_bias
        h = (h if first_bias is None else h + first_bias).view(*x.shape[:-1], -1)
        gate, z = h[..., : self.width], h[..., -self.width :]
        a = self.act(gate)
        z = a * z if self.wrapper[0].view.gated else a
        mask: Any = self.mask
        if mask is not None:
            z = z * mask
        for i, method in enumerate(self.methods):
            keep = method.keep(a, z, getattr(self, f"choice_{i}"))
            if keep is not None:
                z = z * keep
        y = kernels.sums(z.flatten(0, -2), self.second)
        left: Any = self.left
        right: Any = self.right
        second_bias: Any = self.second_bias
        if left is not None:
            y = torch.addmm(y, F.linear(flat, left), right)
        return (y if second_bias is None else y + second_bias).view(x.shape)
