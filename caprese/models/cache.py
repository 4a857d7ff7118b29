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


class _Filled:
    """Keys or values of a layer: what is filled of the room they lie in."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, layer: Any, owner: type | None = None) -> Any:
        if layer is None:
            return self
        room = layer.rooms.get(self.name)
        if room is None or room.dim() < 2:
            return room
        return room.narrow(-2, 0, layer.lengths[self.name])

    def __set__(self, layer: Any, value: torch.Tensor | None) -> None:
        room = layer.rooms.get(self.name)
        if value is None:
            layer.rooms.pop(self.name, None)
            layer.lengths.pop(self.name, None)
            return
        layer.lengths[self.name] = value.shape[-2] if value.dim() > 1 else 0
        # what cropped the cache made a view of the room; what reordered it, another tensor
        if room is None or room.data_ptr() != value.data_ptr() or _around(room) != _around(value):
            layer.rooms[self.name] = value
        elif layer.others:
            layer.shared = True


def _around(states: torch.Tensor) -> tuple[Any, ...]:
    return states.shape[:-2], states.shape[-1], states.stride(), states.dtype


class RoomyLayer(DynamicLayer):
    """`DynamicLayer` with room behind its last token; `keys` and `values` are views of what is filled.

    Gradients make it copy, as transformers' does. `caprese scale`, `generate` and the drawing of samples use it, and
    whatever decodes with a fused model whose layers run in one call.

    Attributes:
        rooms: "keys" and "values", in this order, [B, H, T or more, d].
        lengths: how many tokens of them are filled.
        shared: whether a copy sees the same rooms, so that they are not to be written.
        others: whether it was a layer of transformers', of which who made it may keep what a crop leaves behind.
    """

    keys = _Filled()
    values = _Filled()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.rooms: dict[str, torch.Tensor] = {}
        self.lengths: dict[str, int] = {}
        self.shared = self.others = False
        super().__init__(*args, **kwargs)

    @classmethod
    def take_over(cls, layer: Any) -> None:
        """Make a `DynamicLayer` one, in place."""
        keys, values = (vars(layer).pop(name) for name in ("keys", "values"))
        layer.__class__ = cls
        layer.rooms, layer.lengths, layer.shared, layer.others = {}, {}, False, True
        layer.keys, layer.values = keys, values

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """New keys and values [B, H, T, d] -> all of them, as views.

        Under autocast they are kept in its type, which attention would cast all of them to at every token.
        """
        device = key_states.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            key_states, value_states = key_states.to(dtype), value_states.to(dtype)
        if not self.lengths.get("keys") or key_states.requires_grad:
            return super().update(key_states, value_states, *args, **kwargs)
        self.extend(key_states.shape[-2])
        keys, values = self.keys, self.values
        for all_of_them, new in ((keys, key_states), (values, value_states)):
            count = new.shape[-2]
            all_of_them.narrow(-2, all_of_them.shape[-2] - count, count).copy_(new)
        return keys, values

    def extend(self, count: int) -> None:
        """Room for more tokens of a layer that has some, whose keys and values the caller writes; fewer below 0."""
        for name, room in self.rooms.items():
            length = self.lengths[name]
            total = length + count
            stays = room.is_inference() and not torch.is_inference_mode_enabled()
            if self.shared or stays or room.shape[-2] < total:
                wider = room.new_empty(*room.shape[:-2], total + max(64, total // 4), room.shape[-1])
                wider[..., :length, :] = room[..., :length, :]
                self.rooms[name] = wider
            self.lengths[name] = total
        self.shared = False

    def __copy__(self) -> RoomyLayer:
        """Neither goes on in the room that both see."""
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin.rooms, twin.lengths = dict(self.rooms), dict(self.lengths)
        twin.shared = self.shared = True
        return twin

    def reset(self) -> None:
        """Empty, as before the first token; older versions of transformers leave zeros of the same length."""
        super().reset()
        self.keys = self.values = None
        self.is_initialized = False


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
