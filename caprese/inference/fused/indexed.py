"""The indexed form: the chosen rows are read where they lie, by Triton kernels or, on a CPU, in one call."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from caprese import kernels
from caprese.efficient_methods import EfficientFFN, Method
from caprese.inference.fused.step import Step, chosen_rows
from caprese.kernels import WholeFFN
from caprese.models import Weights


class Indexed(Step):
    """The chosen rows of the base's weights are read in place: no second copy of the FFN.

    down is stored transposed for it, one neuron a contiguous row; `restore` puts it back.
    """

    def __init__(self, wrapper: EfficientFFN) -> None:
        super().__init__(wrapper)
        name = kernels.activation_name(wrapper.transformed.act)
        assert name is not None
        self.act_name = name
        acting = frozenset().union(*(m.acts_on for m in wrapper.methods))
        self.in_c = not kernels.triton_runs(wrapper.view.device)
        self.kind = next((part for part in ("inputs", "neurons") if part in acting), "rows")
        for tensor in self._transposed():
            tensor.data = tensor.data.T.contiguous().T

    def restore(self) -> None:
        super().restore()
        for tensor in self._transposed():
            tensor.data = tensor.data.contiguous()

    def _transposed(self) -> list[torch.Tensor]:
        """The weights that are read by input channel."""
        (wrapper,) = self.wrapper
        ffn: Any = wrapper.transformed
        if ffn is not wrapper.view:
            return [ffn.down_weight]
        return [wrapper.view.part(p).weight for p in (("gate", "up", "down") if self.kind == "inputs" else ("down",))]

    def _fill(self, choices: list[tuple[Method, torch.Tensor | None]], branch: Any) -> None:
        (wrapper,) = self.wrapper
        w = wrapper.transformed.weights()
        rows = chosen_rows(choices)
        index = None
        if rows is not None:  # exactly k in each row
            index = rows.squeeze(1).nonzero()[:, 1].view(len(rows), -1).int()
        elif self.kind == "rows":
            index = torch.arange(len(w.up), device=w.up.device, dtype=torch.int32)[None]
        self._hold("index", index)
        threshold = next((c for m, c in choices if m.acts_on & {"neurons", "inputs"}), None)
        if self.in_c and threshold is not None:
            threshold = threshold.flatten().float()
        self._hold("threshold", threshold, None if threshold is None else threshold.dtype)
        kind = torch.float32 if self.in_c else None
        self._hold_branch(branch, w.down_bias, kind)
        biases = [b for b in (w.gate_bias, w.up_bias) if b is not None]
        self._hold("first_bias", torch.cat(biases) if self.in_c and biases else None, kind)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w = self.wrapper[0].transformed.weights()  # not kept here: compiled, they are to be known as the model's own
        flat = x.flatten(0, 1)
        left: Any = self.left
        right: Any = self.right
        bias: Any = self.last_bias
        threshold: Any = self.threshold
        if self.in_c:
            return self._called(flat, w).view_as(x)
        assert w.gate is not None or self.kind == "rows"
        if self.kind == "inputs":
            gate, up = (
                kernels.input_sparse(flat, weight.T, threshold[0, i], b)  # type: ignore[union-attr]
                for i, (weight, b) in enumerate(((w.gate, w.gate_bias), (w.up, w.up_bias)))
            )
            y = kernels.input_sparse(self.act(gate) * up, w.down.T, threshold[0, 2], bias)
            return (y if left is None else torch.addmm(y, F.linear(flat, left), right)).view_as(x)
        a = count = None
        index: Any = self.index
        if self.kind == "neurons":
            assert w.gate is not None
            a, index, count = kernels.cats_select(flat, w.gate, threshold.flatten(), self.act_name, w.gate_bias)
        rows = kernels.Rows(index, count)
        z = kernels.gate_up(flat, w.gate, w.up, rows, self.act_name, left, (w.gate_bias, w.up_bias), a)
        return kernels.down(z, w.down.T, rows, right, bias).view_as(x)

    def _called(self, x: torch.Tensor, w: Weights) -> torch.Tensor:
        """A step in one call, or in one a sequence where each has rows of its own."""
        index: Any = self.index
        if index is None or len(index) == 1:
            return kernels.whole_ffn(x, self._whole(w, None if index is None else index[0]))
        each = zip(x.split(1), index, strict=True)
        return torch.cat([kernels.whole_ffn(own, self._whole(w, rows)) for own, rows in each])

    def whole(self) -> WholeFFN | None:
        index: Any = self.index
        if index is not None and len(index) > 1:
            return None
        return self._whole(self.wrapper[0].transformed.weights(), None if index is None else index[0])

    def _whole(self, w: Weights, rows: torch.Tensor | None) -> WholeFFN:
        left: Any = self.left
        first, beside = (w.up, None) if w.gate is None else (w.gate, w.up)
        branch: Any = None if left is None else (left, self.right)
        more: Any = {"bias": self.first_bias, "threshold": self.threshold, "last": self.last_bias}
        return WholeFFN(first, w.down.T, self.act_name, w.gate is not None, beside, rows, branch=branch, **more)
