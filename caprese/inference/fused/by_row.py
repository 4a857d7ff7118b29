"""The packed form of rows: a neuron's weights lie one after the other, in few bits or in the model's own type."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F

from caprese import kernels
from caprese.efficient_methods import EfficientFFN, Method
from caprese.inference.fused.packed import Packed, fastest, take_columns, take_rows
from caprese.kernels import QuantizedFFN, QuantizedRows, WholeFFN


def runs_here(wrapper: EfficientFFN) -> bool:
    """Whether a whole FFN of this kind runs in one call."""
    view = wrapper.view
    return view.dtype in (torch.float32, torch.bfloat16) and kernels.runs_whole(
        torch.empty(1, view.hidden_size, dtype=view.dtype, device=view.device),
        kernels.activation_name(wrapper.transformed.act),
    )


@functools.cache
@torch.no_grad()
def whole_is_faster(width: int, size: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a gated FFN of `width` neurons is faster here in one call than in torch's two products: measured, once
    for a shape."""
    if dtype not in (torch.float32, torch.bfloat16) or device.type != "cpu" or not width:
        return False
    x, h = torch.ones(1, size, dtype=dtype), torch.ones(1, width, dtype=dtype)
    return (
        kernels.runs_whole(x, "silu")
        and fastest(
            3 * width * size * dtype.itemsize,
            lambda: (torch.ones(2 * width, size, dtype=dtype), torch.ones(width, size, dtype=dtype)),
            lambda first, second: kernels.whole_ffn(x, WholeFFN(first, second, "silu")),
            lambda first, second: (F.linear(x, first), F.linear(h, second.T)),
        )
        == 0
    )


class ByRow(Packed):
    """[gate_k; up_k] and down_k by neuron; the branch beside them, in the model's type.

    On a CPU the whole step is one call (`kernels.whole_ffn`); elsewhere two products and the branch's two.
    """

    first: Any
    second: Any

    def __init__(self, wrapper: EfficientFFN) -> None:
        super().__init__(wrapper)
        self.act_name = kernels.activation_name(self.act)
        self.in_c = runs_here(wrapper)

    def _fill(self, choices: list[tuple[Method, torch.Tensor | None]], branch: Any) -> None:
        (wrapper,) = self.wrapper
        ffn = wrapper.transformed
        index = self._take_over(choices)
        if isinstance(ffn, QuantizedFFN):
            both = index if index is None or not ffn.gated else torch.cat([index, index + ffn.width])
            self.first, self.second = self._taken("first", ffn.first, both), self._taken("second", ffn.second, index)
            bias: Any = ffn.bias
            bias = bias if bias is None or both is None else bias[both]
            down: Any = ffn.down_bias
        else:
            w = ffn.weights()
            halves = [w.up] if w.gate is None else [w.gate, w.up]
            self._gather("first", halves, index)
            self._gather("second", [w.down.T], index)
            bias, down = self._first_bias(w, index, 0), w.down_bias
        self._hold("first_bias", bias, torch.float32)
        self._hold_branch(branch, down, torch.float32)
        mask: Any = self.mask
        self._hold("keep", None if mask is None else mask.flatten(0, 1).contiguous())
        thresholds = [choice for method, choice in choices if "neurons" in method.acts_on]
        self._hold("threshold", thresholds[0].flatten().float() if thresholds and thresholds[0] is not None else None)

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

    def _gather(self, name: str, parts: list[torch.Tensor], index: torch.Tensor | None) -> None:
        """Rows of weights under one another."""
        held = getattr(self, name, None)
        shape = len(parts) * self.width, parts[0].shape[1]
        if held is None or held.shape != shape:
            held = parts[0].new_empty(shape)
            self.register_buffer(name, held, persistent=False)
        for out, part in zip(held.split(self.width), parts, strict=True):
            if part.is_contiguous():
                take_rows(out, part, index)
            else:
                take_columns(out.T, part.T, index)

    def whole(self) -> WholeFFN:
        left: Any = self.left
        assert self.act_name is not None
        more: Any = {"bias": self.first_bias, "keep": self.keep, "threshold": self.threshold, "last": self.last_bias}
        branch: Any = None if left is None else (left, self.right)
        gated = self.wrapper[0].view.gated
        return WholeFFN(self.first, self.second, self.act_name, gated, branch=branch, **more)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(0, -2)
        if kernels.runs_whole(flat, self.act_name):
            return kernels.whole_ffn(flat, self.whole()).view(x.shape)
        first_bias: Any = self.first_bias
        left: Any = self.left
        right: Any = self.right
        last: Any = self.last_bias
        gated = self.wrapper[0].view.gated
        h = _products(flat, self.first)
        h = (h if first_bias is None else h + first_bias.to(h.dtype)).view(*x.shape[:-1], -1)
        gate, z = h[..., : self.width], h[..., -self.width :]
        a = self.act(gate)
        z = a * z if gated else a
        mask: Any = self.mask
        if mask is not None:
            z = z * mask
        for i, method in enumerate(self.methods):
            keep = method.keep(a, z, getattr(self, f"choice_{i}"))
            if keep is not None:
                z = z * keep
        y = _sums(z.flatten(0, -2), self.second)
        if left is not None:
            y = torch.addmm(y, F.linear(flat, left), right)
        return (y if last is None else y + last.to(y.dtype)).view(x.shape)


def _products(x: torch.Tensor, weight: QuantizedRows | torch.Tensor) -> torch.Tensor:
    return F.linear(x, weight) if isinstance(weight, torch.Tensor) else kernels.products(x, weight)


def _sums(z: torch.Tensor, weight: QuantizedRows | torch.Tensor) -> torch.Tensor:
    return z @ weight if isinstance(weight, torch.Tensor) else kernels.sums(z, weight)
