"""A weight in few bits, one row a neuron: rows can be chosen, gathered, and read where they lie."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

#: columns that share a scale in 4 bits
GROUP = 32
# 4 bits: what the largest magnitude of a group is divided by, before the best is taken; negative ones give it the code
# that has no opposite, -8
_DIVISORS = (7.0, 7.5, 8.0, -8.0, -8.5, -7.5, -9.0, 8.5)
# weights that are rounded at once: few enough for a cache
_AT_ONCE = 1 << 18


class QuantizedRows(nn.Module):
    """A weight [R, C], symmetric: codes times scales.

    Attributes:
        codes: 8 bits: int8 [R, C]; 4 bits: uint8 [R, C / 2], two codes from -8 to 7 a byte, plus 8. Of 32 columns the
            first 16 lie in the low halves.
        scales: 8 bits: float32 [R]; 4 bits: bfloat16 [R, C / 32], one for 32 columns.
    """

    codes: torch.Tensor
    scales: torch.Tensor

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("codes", codes.contiguous(), persistent=False)  # kernels read it by address
        self.register_buffer("scales", scales.contiguous(), persistent=False)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> QuantizedRows:
        """A model that changes its type moves these along, and leaves theirs: kernels read them by address."""
        kinds = self.codes.dtype, self.scales.dtype
        super()._apply(fn, recurse)
        self.codes, self.scales = self.codes.to(kinds[0]), self.scales.to(kinds[1])
        return self

    @property
    def bits(self) -> int:
        return 8 if self.codes.dtype == torch.int8 else 4

    @property
    def columns(self) -> int:
        return self.codes.shape[1] * 8 // self.bits

    def __len__(self) -> int:
        return len(self.codes)

    def take(self, index: torch.Tensor) -> QuantizedRows:
        """These rows alone, copied, in this order."""
        return QuantizedRows(self.codes.index_select(0, index), self.scales.index_select(0, index))

    def wide(self, dtype: torch.dtype, index: torch.Tensor | None = None) -> torch.Tensor:
        """The weight that the codes stand for, [R, C]; of the rows `index` [k] alone, [k, C]."""
        codes, scales = self.codes, self.scales
        if index is not None:
            codes, scales = codes.index_select(0, index), scales.index_select(0, index)
        if self.bits == 8:
            return (codes.to(scales.dtype) * scales[:, None]).to(dtype)
        halves = codes.view(len(codes), -1, GROUP // 2)
        codes = torch.cat([halves & 15, halves >> 4], -1).to(torch.float32) - 8
        return (codes * scales[..., None].float()).flatten(1).to(dtype)


@torch.no_grad()
def quantize(weight: torch.Tensor, bits: int, importance: torch.Tensor | None = None) -> QuantizedRows:
    """Round a weight [R, C] to the nearest codes; the scales are those with the least squared error.

    Args:
        bits: 8 or 4. 4 bits take columns in groups of 32.
        importance: [C], what an error in each column counts: the mean square of its input. None: all the same. In 8
            bits it changes nothing, since a whole row has one scale.

    Raises:
        ValueError: columns that are no multiple of 32, in 4 bits.
    """
    weight = weight.detach()
    if bits == 8:
        scales = weight.abs().amax(1).float().clamp_min(torch.finfo(torch.float32).tiny) / 127
        return QuantizedRows((weight.float() / scales[:, None]).round_().to(torch.int8), scales)
    if weight.shape[1] % GROUP:
        raise ValueError(f"weight: 4 bits take columns in groups of {GROUP}, got {list(weight.shape)}")
    parts = [_four_bits(part, importance) for part in weight.split(max(1, _AT_ONCE // weight.shape[1]))]
    return QuantizedRows(torch.cat([codes for codes, _ in parts]), torch.cat([scales for _, scales in parts]))


def _four_bits(weight: torch.Tensor, importance: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes uint8 [R, C / 2] and scales [R, C / 32]: of the scales tried, that whose codes fit best with the scale that
    is best for them: it leaves sum w^2 - (sum w c)^2 / sum c^2 of a group's squares."""
    groups = weight.float().unflatten(1, (-1, GROUP))
    counted = groups if importance is None else groups * importance.float().view(1, -1, GROUP)
    counts = groups.new_ones(1, 1, GROUP) if importance is None else importance.float().view(1, -1, GROUP)
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    largest = largest.masked_fill(largest == 0, 1)
    fits, scales = torch.full_like(largest, -1), torch.zeros_like(largest)
    for divisor in _DIVISORS:
        codes = (groups * (divisor / largest)).round_().clamp_(-8, 7)
        product = (codes * counted).sum(-1, keepdim=True)
        squares = (codes.square_() * counts).sum(-1, keepdim=True).clamp_min_(torch.finfo(torch.float32).tiny)
        scale = product / squares
        fit = product * scale
        scales = torch.where(fit > fits, scale, scales)
        fits = torch.maximum(fit, fits)
    scales = scales.bfloat16()
    wide = scales.float()
    codes = (groups / wide.masked_fill(wide == 0, torch.inf)).round_().clamp_(-8, 7)
    low, high = (codes + 8).to(torch.uint8).chunk(2, -1)
    return (low | high << 4).flatten(1), scales.squeeze(-1)
