"""The form of what can be neither packed nor indexed: a method's own arithmetic, with the branch added."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from caprese.efficient_methods import Method
from caprese.inference.fused.step import Step
from caprese.kernels import sparse_down


class InPlace(Step):
    """The method's own arithmetic on the weights where they lie, and the branch added by the product that ends it."""

    def _fill(self, choices: list[tuple[Method, torch.Tensor | None]], branch: Any) -> None:
        self.methods = [m for m, _ in choices]
        for i, (_, choice) in enumerate(choices):
            self._hold(f"choice_{i}", choice)
        self._hold_branch(branch, None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (wrapper,) = self.wrapper
        choices = [(m, getattr(self, f"choice_{i}")) for i, m in enumerate(self.methods)]
        y = sparse_down(wrapper.transformed, *wrapper.kept(x, wrapper.transformed, choices))
        left: Any = self.left
        right: Any = self.right
        last: Any = self.last_bias
        if left is None:
            return y
        # beside packed weights the branch is of another type than what it is added to
        flat = torch.addmm(y.flatten(0, 1).to(left.dtype), F.linear(x.to(left.dtype), left).flatten(0, 1), right)
        return (flat if last is None else flat + last).view_as(y).to(y.dtype)
