"""Samples as methods see them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from caprese.errors import CapreseError


@dataclass(frozen=True, eq=False)
class Tokens:
    """Sequences whose completions a method learns from: ids and mask [B, T], prompt lengths [B].

    Pads do not count in the lengths. No mask: no padding.

    Raises:
        CapreseError: other shapes.
    """

    ids: torch.Tensor
    prompt_lengths: torch.Tensor | Sequence[int]
    mask: torch.Tensor | None = None

    def __post_init__(self) -> None:
        shape, lengths = tuple(self.ids.shape), tuple(torch.as_tensor(self.prompt_lengths).shape)
        mask = shape if self.mask is None else tuple(self.mask.shape)
        if len(shape) != 2 or lengths != shape[:1] or mask != shape:
            raise CapreseError(
                "Tokens takes ids [B, T], a prompt length for each of the B sequences, and a mask [B, T]; given "
                f"{shape}, {lengths} and {mask}"
            )

    def valid(self) -> torch.Tensor:
        """Which tokens are no pads, bool [B, T]."""
        return torch.ones_like(self.ids, dtype=torch.bool) if self.mask is None else self.mask.bool()

    def completion(self) -> torch.Tensor:
        """Which tokens are completion, bool [B, T]."""
        mask = self.valid()
        return mask & (mask.cumsum(-1) > torch.as_tensor(self.prompt_lengths, device=mask.device)[:, None])

    def inputs(self, device: torch.device) -> dict[str, torch.Tensor]:
        """What a decoder is called with to read them, positions counted without pads."""
        mask = self.valid().to(device)
        return {
            "input_ids": self.ids.to(device),
            "attention_mask": mask.long(),
            "position_ids": (mask.cumsum(-1) - 1).clamp_min(0),
        }
