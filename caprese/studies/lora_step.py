"""What equal-size LoRA costs a decode step, for `bench`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from caprese.efficient_methods import EfficientFFN, Method
from caprese.inference.fused.packed import Packed


class LoraStep(Packed):
    """Equal-size LoRA on gate, up and down in a decode step (arXiv 2505.07861's comparison).

    Each linear layer's own product and its two, scaled and added, as PEFT runs LoRA; unmerged, since the chosen rows
    change with every prompt. They are gathered as for the branch.
    """

    def __init__(self, wrapper: EfficientFFN, rank: int) -> None:
        super().__init__(wrapper)
        self.rank = rank

    def _fill(self, choices: list[tuple[Method, torch.Tensor | None]], branch: Any) -> None:
        super()._fill(choices, None)
        (wrapper,) = self.wrapper
        d, k, like = wrapper.view.hidden_size, self.width, wrapper.transformed.weights().down
        shapes = {"gate": (d, k), "up": (d, k), "down": (k, d)}
        for name, (fan_in, fan_out) in shapes.items():
            self.register_buffer(f"{name}_A", like.new_empty(self.rank, fan_in).normal_(), persistent=False)
            self.register_buffer(f"{name}_B", like.new_empty(fan_out, self.rank).normal_(), persistent=False)

    def _linear(self, name: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        lora = F.linear(F.linear(x, getattr(self, f"{name}_A")), getattr(self, f"{name}_B"))
        return F.linear(x, weight, bias) + lora * 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first: Any = self.first
        bias: Any = self.first_bias
        second: Any = self.second
        second_bias: Any = self.second_bias
        k = self.width
        z = self._linear("up", x, first[-k:], None if bias is None else bias[-k:])
        if self.wrapper[0].view.gated:
            z = self.act(self._linear("gate", x, first[:k], None if bias is None else bias[:k])) * z
        else:
            z = self.act(z)
        mask: Any = self.mask
        if mask is not None:
            z = z * mask
        return self._linear("down", z, second, second_bias)
