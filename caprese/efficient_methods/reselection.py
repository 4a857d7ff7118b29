"""Reselection: once every few generated tokens, these go through the dense model in parallel and are learned from
(arXiv 2505.07861, section 5). Until then their inputs wait on the KV cache."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from caprese.efficient_methods.hooks import Call, change_layer, copy_layer, only_goes_on, put_back, shorten


class Generated(NamedTuple):
    """One decoding pass: its token's position in the cache, and what the decoder was given: ids [B, 1] or embeddings
    [B, 1, D], and position ids [B, 1]."""

    offset: int
    tokens: torch.Tensor
    positions: torch.Tensor | None


@dataclass
class Pending:
    """The decoding passes since the last dense one; and as they were before these, the cache layers that only
    go on."""

    passes: list[Generated] = field(default_factory=list)
    layers: dict[int, Any] = field(default_factory=dict)

    def clear(self) -> None:
        self.passes, self.layers = [], {}

    def add(self, call: Call, offset: int) -> None:
        """Take down a generated token, before it runs."""
        if not self.passes:
            layers = enumerate(call.cache.layers)
            self.layers = {i: copy_layer(layer) for i, layer in layers if only_goes_on(layer) and layer.is_initialized}
        self.passes.append(Generated(offset, call.tokens, call.positions))

    def rewrite(self, decoder: nn.Module, cache: Any, mask: torch.Tensor) -> None:
        """Run the tokens again, all at once and dense, in their places in the cache.

        Args:
            mask: which tokens of the cache are real, these among them, [B, n].

        Raises:
            CapreseError: a kind of cache that cannot be rewritten.
        """
        tokens = torch.cat([each.tokens for each in self.passes], 1)
        inputs: dict[str, Any] = {"inputs_embeds" if tokens.is_floating_point() else "input_ids": tokens}
        if positions := [each.positions for each in self.passes if each.positions is not None]:
            inputs["position_ids"] = torch.cat(positions, -1)
        for index, layer in enumerate(cache.layers):
            if index in self.layers:
                put_back(layer, self.layers[index])
            else:
                shorten(cache, layer, tokens.shape[1])
        decoder(**inputs, attention_mask=mask.long(), past_key_values=cache, use_cache=True)

    def crop(self, length: int) -> None:
        """Follow a cache that became shorter."""
        self.passes = [each for each in self.passes if each.offset < length]

    def change(self, change: Callable[[torch.Tensor], torch.Tensor], batch: int) -> None:
        """Follow a cache whose sequences, `batch` of them until now, were reordered, selected or repeated."""
        self.passes = [
            Generated(at, change(tokens), p if p is None or len(p) != batch else change(p))
            for at, tokens, p in self.passes
        ]
        for layer in self.layers.values():
            change_layer(layer, change)

    def fork(self) -> Pending:
        return Pending(list(self.passes), {index: copy.copy(layer) for index, layer in self.layers.items()})
