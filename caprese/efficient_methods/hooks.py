"""What caprese hangs on a transformers model, and the one file of methods that touches what transformers keeps private.

Every private name is asked for by `needed` where it is attached or first used: a version without it is a clear error.
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import transformers
from torch import nn
from transformers import Cache, GenerationMixin
from transformers.cache_utils import DynamicLayer, StaticLayer

from caprese.errors import CapreseError
from caprese.models.cache import RoomyLayer
from caprese.models.private import needed
from caprese.progress import say

# on a cache, while assisted decoding verifies candidates on it: a weak reference to what proposes them
_PROPOSER = "caprese_proposer"
# how many tokens one proposes, in the words of the different kinds
_PROPOSED = ("num_output_tokens", "num_assistant_tokens", "num_mtp_layers", "block_size")


@functools.cache
def mixed(mixin: Hashable, kind: Hashable) -> type:
    """The class `kind` with another mixed in before it; under its own name, by which transformers looks things up."""
    assert isinstance(mixin, type) and isinstance(kind, type)
    return type(kind.__name__, (mixin, kind), {"__module__": kind.__module__, "__qualname__": kind.__qualname__})


@dataclass(frozen=True)
class Call:
    """What a decoder is called with: token ids [B, T] or embeddings [B, T, D], its KV cache, mask and position ids."""

    tokens: torch.Tensor
    cache: Any
    mask: Any
    positions: torch.Tensor | None

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        tokens = args[0] if args else kwargs.get("input_ids")
        if tokens is None:
            tokens = kwargs["inputs_embeds"]
        named = (kwargs.get(name) for name in ("past_key_values", "attention_mask", "position_ids"))
        return cls(tokens, *named)


class Listener(Protocol):
    """What is told of a model's passes."""

    def before(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before every pass of the decoder."""

    def after(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """After it, also where it failed."""

    def prefilling(self) -> AbstractContextManager[None]:
        """Around `generate`'s prefill."""

    def decode_step(self, model: Any, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """What `generate` is to call in place of its compiled decode step."""


def attach(model: Any, listener: Listener) -> list[Callable[[], None]]:
    """Tell `listener` of the passes of a bare transformers model; returns the undoing.

    Raises:
        CapreseError: a version of transformers without the methods that `generate` is followed by.
    """
    around: dict[str, Callable[..., Any]] = {}
    if isinstance(model, GenerationMixin):
        around = {
            "_prefill": _prefill,
            "_get_candidate_generator": _propose,
            "get_compiled_call": _compile,  # generate with a static cache compiles the decode step
        }
    # functions with what they need, and no closures: a deep copy of the model then has its own
    wrapped = {name: functools.partial(run, listener, model, needed(model, name)) for name, run in around.items()}
    decoder = model.get_decoder()
    undo: list[Callable[[], None]] = [
        decoder.register_forward_pre_hook(listener.before, with_kwargs=True).remove,
        decoder.register_forward_hook(listener.after, with_kwargs=True, always_call=True).remove,
    ]
    for name, run in wrapped.items():
        setattr(model, name, run)
        undo.append(functools.partial(delattr, model, name))
    return undo


def _prefill(listener: Listener, _: Any, prefill: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`generate`'s prompt is dense also where its last chunk is one token, which alone looks like decoding.

    Without a KV cache every pass is a prompt, and that is said.
    """
    if not kwargs.get("is_first_iteration", True):  # an assistant, which goes on from tokens it generated
        return prefill(*args, **kwargs)
    settings = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
    if getattr(settings, "use_cache", None) is False:
        say("generating without a KV cache (use_cache=False): every token is read again each time, and runs dense")
    with listener.prefilling():
        return prefill(*args, **kwargs)


def _propose(_: Listener, __: Any, propose: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Assisted decoding verifies what is proposed; where nothing is, that pass too looks like decoding."""
    proposer = propose(*args, **kwargs)
    if not any(hasattr(proposer, name) for name in _PROPOSED):
        raise CapreseError(
            f"transformers {transformers.__version__} proposes tokens by {type(proposer).__name__}, which does not say "
            "how many; generate without it"
        )
    cache = kwargs.get("model_kwargs", {}).get("past_key_values")
    if cache is not None:
        setattr(cache, _PROPOSER, weakref.ref(proposer))
    return proposer


def _compile(
    listener: Listener, model: Any, compiled: Callable[..., Any], *args: Any, **kwargs: Any
) -> Callable[..., Any]:
    return listener.decode_step(model, compiled(*args, **kwargs))


def proposed(cache: Any) -> int | None:
    """Tokens that assisted decoding proposes at a time on this cache; None where no candidates are verified on it."""
    proposer = getattr(cache, _PROPOSER, lambda: None)()
    if proposer is None:
        return None
    return max(int(getattr(proposer, name, None) or 0) for name in _PROPOSED)


def has_state(layer: Any) -> bool:
    """Whether a cache layer holds a recurrent state, and no keys and values; it then marks, keeps and puts back."""
    return hasattr(layer, "put_back")


def only_goes_on(layer: Any) -> bool:
    """Whether a cache layer lets go of what it needed before: with a sliding window, or a recurrent state."""
    return bool(layer.is_sliding) or has_state(layer)


def copy_layer(layer: Any) -> Any:
    """A copy of such a layer, for `put_back`."""
    twin = copy.copy(layer)
    if layer.is_compileable:  # written in place
        twin.keys, twin.values = layer.keys.clone(), layer.values.clone()
        twin.cumulative_length = needed(layer, "cumulative_length").clone()
    return twin


def put_back(layer: Any, before: Any) -> None:
    """Make a cache layer what it was when `copy_layer` made `before` of it."""
    if has_state(layer):
        layer.put_back(before)
    elif layer.is_compileable:
        layer.keys.copy_(before.keys)
        layer.values.copy_(before.values)
        layer.cumulative_length.copy_(before.cumulative_length)
        layer.cumulative_length_int = needed(before, "cumulative_length_int")
    else:
        layer.keys, layer.values = before.keys, before.values
        layer.cumulative_length = needed(before, "cumulative_length")


def change_layer(layer: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Reorder, select or repeat the sequences of such a layer."""
    if has_state(layer):
        layer.each(change)
    else:
        layer.keys, layer.values = change(layer.keys), change(layer.values)


def shorten(cache: Cache, layer: Any, tokens: int) -> None:
    """Take the last `tokens` tokens out of a layer of `cache` that does not only go on.

    Raises:
        CapreseError: a kind of layer that cannot.
    """
    if isinstance(layer, RoomyLayer):
        layer.extend(-tokens)
    elif isinstance(layer, StaticLayer):
        needed(layer, "cumulative_length").sub_(tokens)
    elif isinstance(layer, DynamicLayer):
        layer.crop(-tokens)
    else:
        raise CapreseError(f"a {type(cache).__name__} cannot be taken back; use a dynamic or static cache")
