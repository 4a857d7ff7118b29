"""The shape every efficient method has: a config whose fields are documented where they stand, and three functions.

A method first *looks* at prompt tokens (`statistic`, additive over tokens, so that chunks, second turns and
calibration samples all add up), then *chooses* once per sequence, then *keeps* neurons of each generated token.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from caprese.errors import CapreseError

Layers = Literal["all", "first-half"] | list[int]


class Method(BaseModel):
    """Base class of the efficient methods. Shapes: a and z are [B, T, F], masks [B, T]."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: ClassVar[str]
    #: whether the choice of neurons differs from token to token (else it is fixed per sequence and can be packed)
    per_token: ClassVar[bool]

    sparsity: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)] = 0.5
    """Fraction of FFN neurons removed, in (0, 1)."""

    layers: Layers = "all"
    """Which decoder layers: "all", "first-half", or a list of layer numbers from 0."""

    def layer_indices(self, count: int) -> list[int]:
        """The layers of a model of `count` layers that this method acts on.

        Raises:
            CapreseError: a number out of range, twice, or an empty list.
        """
        if self.layers == "all":
            return list(range(count))
        if self.layers == "first-half":
            return list(range(math.ceil(count / 2)))
        chosen = sorted(self.layers)
        if not chosen or len(set(chosen)) != len(chosen) or chosen[0] < 0 or chosen[-1] >= count:
            raise CapreseError(
                f"layers {self.layers} do not fit a model of {count} layers: numbers 0-{count - 1}, each once"
            )
        return chosen

    def kept(self, width: int) -> int:
        """How many of `width` neurons are kept."""
        return min(width, max(1, round((1 - self.sparsity) * width)))

    def statistic(self, a: torch.Tensor, z: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """What the method learns from the tokens where `mask` is true; [B, S], additive over tokens."""
        raise NotImplementedError

    def choose(self, statistic: torch.Tensor, width: int) -> torch.Tensor:
        """The choice for each sequence, [B, ...], from the summed statistic [B, S]."""
        raise NotImplementedError

    def keep(self, a: torch.Tensor, z: torch.Tensor, choice: torch.Tensor) -> torch.Tensor:
        """Which neurons of each token are computed with; bool, broadcastable to [B, T, F]."""
        raise NotImplementedError

    def active_parameters(self, hidden: int, width: int) -> int:
        """Weights of one FFN read for one token on average (biases not counted)."""
        raise NotImplementedError
