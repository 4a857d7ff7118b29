"""LoRA on gate, up and down of an efficient FFN: what the paper compares its branch with (arXiv 2505.07861)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

PARTS = ("gate", "up", "down")


def shape(ffn: Any, part: str) -> tuple[int, int]:
    """Features that come in and go out."""
    d, f = ffn.hidden_size, ffn.width
    return (f, d) if part == "down" else (d, f)


def lora_size(ffn: Any, rank: int, parts: Sequence[str] = PARTS) -> int:
    """Parameters of a LoRA on these parts."""
    return rank * sum(sum(shape(ffn, part)) for part in parts)


class LoraFFN(nn.Module):
    """LoRA on gate, up and down of an efficient FFN, as the paper compares, or on some of them: W x + B A x."""

    def __init__(self, inner: Any, rank: int, parts: Sequence[str] = PARTS) -> None:
        super().__init__()
        self.inner = inner
        self.act, self.gated, self.fused = inner.act, True, False
        self.hidden_size, self.width, self.device = inner.hidden_size, inner.width, inner.device
        self.recovery = nn.Module()  # by this name `train` takes it for the branch
        self.parts = parts
        for name in parts:
            fan_in, fan_out = shape(inner, name)
            a = nn.Parameter(torch.randn(rank, fan_in) / fan_in**0.5)
            self.recovery.register_parameter(f"lora_A_{name}", a)
            self.recovery.register_parameter(f"lora_B_{name}", nn.Parameter(torch.zeros(fan_out, rank)))

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        packed = getattr(self.inner, f"{name}_proj", None)  # a quantised FFN has modules, the others weights
        if packed is not None:
            y = packed(x)
        else:
            weights = self.inner.weights()
            y = F.linear(x, getattr(weights, name), getattr(weights, f"{name}_bias"))
        if name not in self.parts:
            return y
        a, b = (getattr(self.recovery, f"lora_{part}_{name}") for part in "AB")
        return y + F.linear(F.linear(x, a), b)

    def neurons(self, x: torch.Tensor, x_up: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        a = self.act(self._linear("gate", x))
        return a, a * self._linear("up", x if x_up is None else x_up)

    def down(self, z: torch.Tensor) -> torch.Tensor:
        return self._linear("down", z)

    def weights(self) -> Any:
        """For choices alone: rows gathered from these would lack the LoRA."""
        return self.inner.weights()
