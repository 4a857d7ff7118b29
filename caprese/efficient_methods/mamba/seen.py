"""What a layer still attends to of a text, where most of its attention is replaced."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch

from caprese.models.cache import RoomyLayer

Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Seen:
    """Keys and values of tokens that are still attended to, and their `places` [B, T] in their texts, -1 for what is
    none: pads, and tokens taken back."""

    def __init__(self, batch: int, device: torch.device, window: int | None = None, sinks: int = 0) -> None:
        """
        Args:
            window: how far back a token sees, beside the first `sinks`; None is all before it.
        """
        self.window, self.sinks = window, sinks
        self.layer = RoomyLayer()
        self.places = torch.zeros(batch, 0, dtype=torch.long, device=device)
        self.count = torch.zeros(batch, dtype=torch.long, device=device)

    def add(self, keys: torch.Tensor, values: torch.Tensor, valid: torch.Tensor | None) -> Rows:
        """Read T more tokens [B, H, T, d]: all keys and values, and the places of those that are new [B, T]."""
        if valid is None:
            tokens = keys.shape[-2]
            places = self.count[:, None] + torch.arange(tokens, device=keys.device)
            self.count = self.count + tokens
        else:
            places = torch.where(valid, self.count[:, None] + valid.cumsum(-1) - 1, -1)
            self.count = self.count + valid.sum(-1)
        self.places = torch.cat([self.places, places], 1)
        return *self.layer.update(keys, values), places

    def take_back(self, block: int, taken: torch.Tensor) -> None:
        """Of the last `block` tokens, each sequence keeps its first `taken` [B]."""
        begin = self.places.shape[1] - block
        goes = (torch.arange(block, device=taken.device) >= taken[:, None]) & (self.places[:, begin:] >= 0)
        self.count = self.count - goes.sum(-1)
        end = begin + int(taken.max())  # what nobody keeps is cut off; what some do not, a hole
        self.places = torch.cat([self.places[:, :begin], self.places[:, begin:].masked_fill(goes, -1)], 1)[:, :end]
        self._change(lambda t: t[:, :, :end])
        if self.window is not None:
            self.let_go()
        elif end > 2 * (width := int(self.count.max())):
            self._keep(self.places >= 0, width)

    def let_go(self) -> None:
        """Drop what no later token sees behind a window; now and then, so that little is copied for it.

        Not while tokens may be taken back: then a window reaches further. All of a prompt is here until it was read.
        """
        if self.window is None or self.places.shape[1] <= 2 * self.window + self.sinks:
            return
        near = (self.places < self.sinks) | (self.places >= self.count[:, None] - self.window)
        self._keep((self.places >= 0) & near, self.window + self.sinks)

    def _keep(self, stays: torch.Tensor, width: int) -> None:
        """Of each sequence, those that stay [B, T], at most `width`, in their order."""
        which = (~stays).long().argsort(dim=1, stable=True)[:, :width]
        self.places = torch.where(stays, self.places, -1).gather(1, which)
        self._change(lambda t: t.gather(2, which[:, None, :, None].expand(-1, t.shape[1], -1, t.shape[-1])))

    def each(self, how: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Reorder, select or repeat sequences."""
        self._change(how)
        self.places, self.count = how(self.places), how(self.count)

    def _change(self, how: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.layer.keys, self.layer.values = how(self.layer.keys), how(self.layer.values)

    def __copy__(self) -> Seen:
        """Neither goes on in the other."""
        twin = type(self).__new__(type(self))
        vars(twin).update(vars(self))
        twin.layer = copy.copy(self.layer)
        return twin

    def bytes_at(self, tokens: int) -> float:
        """Bytes of the keys and values of a sequence of so many tokens, at most: see `let_go`."""
        held = tokens if self.window is None else min(tokens, 2 * self.window + self.sinks)
        keys, values = self.layer.keys, self.layer.values
        return (keys.nbytes + values.nbytes) / max(1, keys.shape[0] * keys.shape[-2]) * held
