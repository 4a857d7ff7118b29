"""A model and its KV cache in speculative decoding: it reads several tokens, and takes back those that do not stay.

Sequences of a batch keep as many tokens as they accepted. What others read beyond that stays in the cache and is
masked, until there are so many such holes that the rest is moved together. Layers with a sliding window count places in
the cache, holes included, and static ones have no room for holes, so where there are any, all sequences keep as many as
the one that accepted fewest (`in_step`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers import Cache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from caprese.efficient_methods.hooks import copy_layer, has_state, only_goes_on, put_back, shorten
from caprese.efficient_methods.memory import memory_of
from caprese.errors import CapreseError
from caprese.models import device_of, unwrap
from caprese.models.cache import RoomyLayer, roomy_cache

How = Callable[[], AbstractContextManager[None]]
# The KV cache is moved together when this part of it is holes, and at least so many tokens.
_HOLES, _LEAST = 0.25, 64
_TAKEN_BACK = (RoomyLayer, DynamicLayer, DynamicSlidingWindowLayer, StaticLayer)


class Side:
    """One model with one KV cache, and the tokens in it.

    Attributes:
        real: which places of the cache hold tokens of their sequence, bool [B, S]; None where all do.
        lengths: how many do, [B].
        step: what runs the model in its place, such as its compiled form.
        tokens: of the vocabulary that others speak, where the model's own is padded to another size; None is its own.
    """

    def __init__(
        self, model: nn.Module, how: How = nullcontext, prefill: How = nullcontext, cache: Cache | None = None
    ) -> None:
        """
        Args:
            how: the context in which it reads, such as that of the dense model.
            prefill: the same for prompts.
            cache: an empty one, or one that holds the beginning of the sequences; without, the side's own.
        """
        self.model: Any = unwrap(model)
        self.how, self.prefill, self.device = how, prefill, device_of(model)
        self.cache: Any = roomy_cache(model) if cache is None else cache
        self.real: torch.Tensor | None = None
        self.lengths = torch.zeros(0, dtype=torch.long)
        self.marks: list[Any] | None = None
        self.step: Callable[..., Any] | None = None
        self.tokens: int | None = None

    def begin(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Read the prompts, as far as they are not in the cache: ids [B, T] -> the logits [B, V] behind them.

        Args:
            mask: which of them are no pads, [B, T]; None is all.

        Raises:
            CapreseError: a kind of cache that cannot be taken back, or one that holds all of the prompts.
        """
        self._check()
        if mask is not None and not bool(mask[:, -1].all()):
            raise CapreseError("a prompt ends with a pad; pads go in front of prompts: padding_side left")
        past = 0 if self.cache is None else int(self.cache.get_seq_length())
        if past >= ids.shape[1]:
            raise CapreseError(
                f"the KV cache holds {past} tokens, and the prompt has {ids.shape[1]}: nothing is to read"
            )
        self.real = None if mask is None or bool(mask.all()) else mask.bool()
        self.lengths = torch.full((len(ids),), ids.shape[1]) if self.real is None else self.real.sum(1).cpu()
        inputs: dict[str, Any] = {"input_ids": self._known(ids[:, past:])}
        if self.real is not None:
            positions = (self.real.long().cumsum(1) - 1).clamp(min=0)
            inputs |= {"attention_mask": self.real.long(), "position_ids": positions[:, past:]}
        with self.prefill():
            out = self.model(**inputs, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache = out.past_key_values
        self._check()
        return self._fitted(out.logits[:, -1])

    def _known(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids without those that only the others know, which no text holds."""
        return ids if self.tokens is None else ids.where(ids < vocabulary(self.model), 0)

    def _fitted(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits [..., V] for the vocabulary that others speak; a token that the model does not know is never drawn."""
        if self.tokens is None:
            return logits
        more = max(0, self.tokens - logits.shape[-1])
        return nn.functional.pad(logits[..., : self.tokens], (0, more), value=-torch.inf)

    def _check(self) -> None:
        for layer in () if self.cache is None else getattr(self.cache, "layers", [self.cache]):
            if not (type(layer) in _TAKEN_BACK or has_state(layer)):
                raise CapreseError(
                    f"speculative decoding cannot take tokens back from a {type(layer).__name__}; use a dynamic cache, "
                    "or a static one without sliding windows"
                )

    @property
    def in_step(self) -> bool:
        """Whether all sequences have to keep the same number of tokens."""
        return len(self.lengths) > 1 and (self.fixed or any(layer.is_sliding for layer in self.cache.layers))

    @property
    def fixed(self) -> bool:
        """Whether its sequences cannot leave."""
        return any(isinstance(layer, StaticLayer) for layer in self.cache.layers)

    @property
    def room(self) -> int | None:
        """How many more tokens the cache takes; None: without end."""
        sizes = [layer.max_cache_len for layer in self.cache.layers if isinstance(layer, StaticLayer)]
        return min(sizes) - int(self.cache.get_seq_length()) if sizes else None

    @property
    def narrowest(self) -> int | None:
        """Tokens that can be read at once and still be taken back; None: any number."""
        windows = [layer.sliding_window for layer in self.cache.layers if layer.is_sliding]
        return min(windows) - 1 if windows else None

    def read(self, ids: torch.Tensor, logits_to_keep: int = 0) -> torch.Tensor:
        """T more tokens of each sequence, ids [B, T] -> logits [B, T, V], or of the last tokens alone."""
        inputs: dict[str, Any] = {"input_ids": self._known(ids)}
        inputs |= {"logits_to_keep": logits_to_keep} if logits_to_keep else {}
        if self.real is not None:
            self.real = torch.cat([self.real, self.real.new_ones(ids.shape)], 1)
            positions = self.lengths[:, None] + torch.arange(ids.shape[1])
            inputs |= {"attention_mask": self._mask(ids.shape[1]), "position_ids": positions.to(self.device)}
        with self.how():
            logits: torch.Tensor = (self.step or self.model)(
                **inputs, past_key_values=self.cache, use_cache=True
            ).logits
        self.lengths = self.lengths + ids.shape[1]
        return self._fitted(logits)

    def _mask(self, new: int) -> torch.Tensor:
        """Which places hold tokens, `new` ones included, [B, S]; of a static cache all: one shape compiles once."""
        assert self.real is not None
        room = self.room
        return nn.functional.pad(self.real.long(), (0, 0 if room is None else room - new))

    def mark(self) -> None:
        """What is read from now on may be taken back."""
        self.marks = []
        for layer in self.cache.layers:
            if has_state(layer):
                layer.mark()
            self.marks.append(copy_layer(layer) if layer.is_sliding else None)

    @contextmanager
    def ahead(self) -> Iterator[None]:
        """Inside, what is read is forgotten afterwards."""
        layers = self.cache.layers
        before = [copy_layer(layer) if only_goes_on(layer) else None for layer in layers]
        real, lengths = self.real, self.lengths
        try:
            yield
        finally:
            tokens = int((self.lengths - lengths)[0])
            for layer, known in zip(layers, before, strict=True):
                if known is not None:
                    put_back(layer, known)
                elif tokens:
                    shorten(self.cache, layer, tokens)
            self.real, self.lengths = real, lengths
            self._remember(tokens)
            if (memory := memory_of(self.cache)) is not None:
                memory.forget_waiting()

    def keep(self, taken: torch.Tensor, tokens: int, every: int | None = None) -> None:
        """Of the `tokens` tokens since the mark, each sequence keeps its first `taken` [B]; those that ended none.

        Args:
            every: tokens that stay after which methods choose anew; None never.
        """
        most = int(taken.max())
        memory = memory_of(self.cache)
        if memory is not None:
            memory.confirm(taken.to(self.device), every)
        assert self.marks is not None
        for layer, known in zip(self.cache.layers, self.marks, strict=True):
            if has_state(layer):
                layer.keep(taken)
            elif known is not None:
                _keep_in_window(layer, known, most, tokens)
            elif most < tokens:
                shorten(self.cache, layer, tokens - most)
        self.marks = None
        self.lengths = self.lengths - tokens + taken
        if self.real is None and bool((taken < most).any()):
            places = int(self.cache.get_seq_length()) + tokens - most
            self.real = torch.ones(len(taken), places, dtype=torch.bool, device=self.device)
        if self.real is not None:
            begin = self.real.shape[1] - tokens
            self.real = self.real[:, : begin + most]
            holes = torch.arange(most) >= taken[:, None]
            if bool(holes.any()):
                self.real = self.real.clone()
                self.real[:, begin:] &= ~holes.to(self.device)
        self._remember(tokens - most)

    def _remember(self, fewer: int) -> None:
        """Tell what methods know that the cache is shorter, by tokens that taught nothing."""
        memory = memory_of(self.cache)
        if memory is not None:
            memory.length -= fewer
            if self.real is not None:
                memory.valid = self.real

    def move_together(self, always: bool = False) -> None:
        """Close the holes between tokens, where there are many; pads in front of a sequence stay.

        Args:
            always: also where there are few.
        """
        if self.real is None:
            return
        first = self.real.long().argmax(1, keepdim=True)
        places = torch.arange(self.real.shape[1], device=self.device)
        stays = self.real | (places < first)
        longest = int(stays.sum(1).max())
        holes = self.real.shape[1] - longest
        if holes < (1 if always else max(_LEAST, _HOLES * self.real.shape[1])):
            return
        order = (~stays).byte().argsort(dim=1, stable=True)[:, :longest]
        layers: Any = self.cache.layers
        for layer in layers:
            if has_state(layer):  # it has no places, and only counts them
                layer.length -= holes
                continue
            layer.keys, layer.values = _gathered(layer.keys, order), _gathered(layer.values, order)
        self.real = self.real.gather(1, order)
        self._remember(holes)

    def settle(self, length: int) -> None:
        """Close all holes, and be `length` tokens long at most: that of the longest sequence but its last."""
        self.move_together(always=True)
        surplus = int(self.cache.get_seq_length()) - length
        if surplus < 1:
            return
        for layer in self.cache.layers:
            if has_state(layer):
                layer.length -= surplus
            else:
                shorten(self.cache, layer, surplus)
        self.real = None if self.real is None else self.real[:, :length]
        self._remember(surplus)

    def select(self, rows: torch.Tensor) -> None:
        """Go on with these sequences alone, places in the batch."""
        self.cache.batch_select_indices(rows.to(self.device))
        self.lengths = self.lengths[rows]
        self.real = None if self.real is None else self.real[rows.to(self.device)]


def vocabulary(model: nn.Module) -> int:
    """Tokens of a model, those that only pad its head included."""
    config: Any = model.config
    return int(config.get_text_config().vocab_size)


def _gathered(states: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Tokens of keys or values [B, K, S, d] in another order [B, S']."""
    return states.gather(2, order[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3]))


def _keep_in_window(layer: Any, before: Any, most: int, tokens: int) -> None:
    """A layer of a sliding window as if it had read `most` of the last `tokens` tokens."""
    new = layer.keys[:, :, -tokens:][:, :, :most], layer.values[:, :, -tokens:][:, :, :most]
    put_back(layer, before)
    layer.update(*new)
