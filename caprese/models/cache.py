"""A KV cache that is written in place: generation does not copy it at every token."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, GenerationMixin
from transformers.cache_utils import DynamicLayer

from caprese.models.families import unwrap
from caprese.models.private import needed
from caprese.progress import say


class RoomyLayer(DynamicLayer):
    """`DynamicLayer` with room behind its last token; `keys` and `values` are views of what is filled.

    No gradients. `caprese scale`, `generate` and the drawing of samples use it.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rooms: dict[str, torch.Tensor] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """New keys and values [B, H, T, d] -> all of them, as views."""
        if self.keys is None or self.values is None or not self.keys.numel():
            return super().update(key_states, value_states, *args, **kwargs)
        count = key_states.shape[-2]
        keys, values = self.extend(count)
        keys.narrow(-2, keys.shape[-2] - count, count).copy_(key_states)
        values.narrow(-2, values.shape[-2] - count, count).copy_(value_states)
        return keys, values

    def extend(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Room for more tokens: keys and values [B, H, T + count, d], of which the caller writes the last."""
        assert self.keys is not None and self.values is not None
        self.keys = self._extended("keys", self.keys, count)
        self.values = self._extended("values", self.values, count)
        return self.keys, self.values

    def _extended(self, name: str, known: torch.Tensor, count: int) -> torch.Tensor:
        length = known.shape[-2]
        total = length + count
        room = self.rooms.get(name)
        # what cropped the cache left a view of the room; what reordered it left another tensor
        if (
            room is None
            or room.data_ptr() != known.data_ptr()
            or room.shape[:-2] != known.shape[:-2]
            or room.shape[-2] < total
        ):
            room = known.new_empty(*known.shape[:-2], total + max(64, total // 4), known.shape[-1])
            room[..., :length, :] = known
            self.rooms[name] = room
        return room.narrow(-2, 0, total)

    def __copy__(self) -> RoomyLayer:
        """Neither goes on in the room that both see."""
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin.rooms, self.rooms = {}, {}
        return twin

    def reset(self) -> None:
        """Empty, as before the first token; older versions of transformers leave zeros of the same length."""
        self.rooms = {}
        super().reset()
        self.keys = self.values = None
        self.is_initialized = False

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self.rooms = {}  # the memory, too, is given back at once

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self.rooms = {}

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.rooms = {}


class RoomyCache(DynamicCache):
    """`DynamicCache` whose layers of full attention are written in place."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in self.layers]


def roomy_cache(model: nn.Module) -> RoomyCache | None:
    """An empty cache for a transformers model; None where a model makes a cache of its own kind."""
    base: Any = unwrap(model)
    usual = isinstance(base, GenerationMixin) and needed(base, "_supports_default_dynamic_cache")()
    return RoomyCache(base.config) if usual else None


def always_cached(model: nn.Module) -> list[Callable[[], None]]:
    """Switch on the KV cache where a config leaves it off, as training with gradient checkpointing does; returns the
    undoing."""
    base: Any = unwrap(model)
    found: tuple[Any, ...] = (base.config, base.config.get_text_config(), getattr(base, "generation_config", None))
    off = {id(config): config for config in found if getattr(config, "use_cache", None) is False}
    for config in off.values():
        config.use_cache = True
    if off:
        say("the model's settings say use_cache false; without a KV cache generated tokens run dense, so it is on now")
    return [functools.partial(setattr, config, "use_cache", False) for config in off.values()]
