"""All of a decoder in one call on a CPU, where each of its layers runs whole.

Between two tokens there is then little Python: what a token needs is in one place, and is looked at once for the model
instead of once for a layer.
"""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Hashable, Sequence
from typing import Any, cast

import torch
from torch import nn
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from caprese import kernels
from caprese.efficient_methods import EfficientFFN
from caprese.efficient_methods.hooks import mixed
from caprese.efficient_methods.passes import Pass
from caprese.inference.fused.dense import DenseLayers
from caprese.inference.fused.layer import Plan, close, plan_of, rms_normed
from caprese.inference.fused.watch import Watch
from caprese.kernels import DecoderLayers
from caprese.models.cache import RoomyLayer

# beside the layers
_PARTS = ("embed_tokens", "norm", "rotary_emb")
# positions whose rotation is computed at once, and the kinds in which it does not depend on how many there are
_TURNS = 64
_STEADY = ("default", "linear", "llama3", "yarn")


def put_on(model: Any, wrappers: Sequence[EfficientFFN]) -> None:
    """Have decoder layers run whole, those that can, whenever the FFN's step runs; the decoder too, if all can."""
    decoder = model.get_decoder()
    plans = [made for wrapper in wrappers if (made := plan_of(wrapper, getattr(decoder, "rotary_emb", None)))]
    if not _looks_alike(decoder, plans) or not (whole := Whole(decoder, plans)).is_right():
        return
    before = type(decoder)
    decoder.__class__ = mixed(WholeDecoder, cast(Hashable, before))
    decoder.whole = whole
    for wrapper in wrappers:  # the first that goes takes it along
        wrapper.fused.undo.append(functools.partial(_take_off, decoder, before))


def _take_off(decoder: Any, before: type) -> None:
    if isinstance(decoder, WholeDecoder):
        decoder.__class__ = before
        del decoder.whole


class WholeDecoder(nn.Module):
    """Mixed into the class of a decoder: one more token runs in one call, and a few of the dense model."""

    whole: Whole

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        y = None if args or torch.compiler.is_compiling() else self.whole.run(**kwargs)
        return super().forward(*args, **kwargs) if y is None else y


class Whole:
    """What C is given of a decoder; made anew for a copy of the model."""

    def __init__(self, decoder: Any, plans: list[Plan]) -> None:
        self.decoder, self.plans, self.phases = decoder, plans, plans[0].wrapper.phases
        self.caches = [plan.layer.self_attn.layer_idx for plan in plans]
        self.watch = Watch([decoder._modules[name] for name in _PARTS], decoder, plans)
        self.facts: Any = None  # with which C was given what it has
        self.made: DecoderLayers | None = None
        self.dense = DenseLayers(plans)
        self.turns, self.alone = Turns(), threading.Lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> Whole:
        copied = copy.copy(self)
        memo[id(self)] = copied
        copied.made, copied.facts = None, None  # addresses, which are not its own
        copied.turns, copied.alone = Turns(), threading.Lock()
        for name in ("decoder", "plans", "phases", "watch", "dense"):
            setattr(copied, name, copy.deepcopy(getattr(self, name), memo))
        return copied

    def run(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        use_cache: Any = None,
        return_dict: Any = None,
        **more: Any,
    ) -> BaseModelOutputWithPast | None:
        """What the decoder returns; None where it is to compute that itself."""
        current, dense = self.phases.current, self.phases.dense
        if input_ids is None or past_key_values is None or use_cache is False or return_dict is False:
            return None
        if any(value is not None and value is not False for value in more.values()):
            return None
        if dense:
            if not len(past_key_values) or torch.is_grad_enabled():
                return None
            (batch, tokens), past = input_ids.shape, int(past_key_values.get_seq_length())
            if not past or batch * tokens > kernels.MAX_BATCH:
                return None
        elif current is None or current.prompt is not None or current.shape[1] != 1:
            return None
        else:
            (batch, tokens), past = current.shape, current.offset
        mask: torch.Tensor | None = None
        if attention_mask is not None:
            if not isinstance(attention_mask, torch.Tensor) or attention_mask.shape != (batch, past + tokens):
                return None
            mask = attention_mask.bool().contiguous()
        with self.alone:
            layers = self._dense_layers() if dense else self._layers(current)
            y = None if layers is None else self._run(layers, input_ids, mask, position_ids, past_key_values, past)
        return None if y is None else BaseModelOutputWithPast(last_hidden_state=y, past_key_values=past_key_values)

    def _dense_layers(self) -> DecoderLayers | None:
        """The same of the dense model's."""
        if not self.watch.is_as_it_was():
            return None
        before = self.dense.made
        made = self.dense.layers(self.decoder.norm, self.decoder.rotary_emb)
        if made is not before:
            self.turns = Turns()
        return made

    def _run(
        self, layers: DecoderLayers, ids: Any, mask: Any, positions: Any, cache: Any, past: int
    ) -> torch.Tensor | None:
        """The last hidden states [B, T, D]; None where C is not for them."""
        batch, tokens = ids.shape
        held = self._held(cache, past)
        if held is None:
            return None
        first = layers.layers[0]
        fresh = [layer for i, layer in enumerate(held) if not layers.knows(i, *layer.rooms.values())]
        if not all(_fits(layer.rooms, (batch, first.kv_heads, first.size), first.dtype) for layer in fresh):
            return None
        x = self.decoder.embed_tokens(ids)
        if x.shape != (batch, tokens, first.columns) or x.dtype != first.dtype or x.device.type != "cpu":
            return None
        if tokens > 1 and positions is None:
            positions = past + torch.arange(tokens)[None]
        cos, sin = self.turns.of(self.decoder.rotary_emb, x, past if positions is None else positions)
        sizes = [(each, tokens, first.size) for each in (1, batch)]
        if any(t.dtype != x.dtype or t.shape not in sizes for t in (cos, sin)):
            return None
        if tokens > 1:  # all tokens one after the other
            cos, sin = (t.expand(batch, -1, -1).reshape(batch * tokens, 1, -1) for t in (cos, sin))
        for i, layer in enumerate(held):
            layer.extend(tokens)
            if not layers.knows(i, *layer.rooms.values()):
                layers.put_states(i, *layer.rooms.values())
        try:
            return layers.run(x.contiguous().view(batch * tokens, 1, -1), cos, sin, past + tokens, mask, tokens).view(
                x.shape
            )
        except MemoryError:
            for layer in held:
                layer.extend(-tokens)
            raise

    def _layers(self, current: Pass) -> DecoderLayers | None:
        """What C is given, up to date; None where this pass cannot run so."""
        if self.made is not None and self.facts == self.watch.facts(current):
            return self.made
        self.facts = None
        self.watch.look()
        if not self.watch.is_as_it_was() or not all([plan.may_run(current.shape[0]) for plan in self.plans]):
            return None
        if not all([plan.follow(current) for plan in self.plans]):
            return None
        parts: list[Any] = [plan.made() for plan in self.plans]
        if self.made is None or self.made.layers != parts:
            norm = self.decoder.norm
            self.made = DecoderLayers(parts, norm.weight, norm.variance_epsilon)
        for i, plan in enumerate(self.plans):
            self.made.put_ffn(i, plan.whole)
        self.made.forget()  # looked at for as many sequences as there were
        self.turns = Turns()
        self.facts = self.watch.facts(current)
        return self.made

    def _held(self, cache: Any, past: int) -> list[RoomyLayer] | None:
        """The cache's layers, which from now on are written in place; None for other kinds."""
        every = getattr(cache, "layers", ())
        held = [every[i] for i in self.caches if i < len(every)]
        for layer in held:
            if type(layer) is DynamicLayer and layer.is_initialized:
                RoomyLayer.take_over(layer)
        lengths = {"keys": past, "values": past}
        alike = all(type(layer) is RoomyLayer and layer.lengths == lengths for layer in held)
        return held if alike and len(held) == len(self.caches) else None

    @torch.no_grad()
    def is_right(self) -> bool:
        """Whether the decoder does what ours does around its layers: it is run on one layer that only looks."""
        decoder, spy = self.decoder, _Spy()
        ids, layers = torch.tensor([[1, 2, 3], [3, 2, 1]]), decoder.layers
        embedded: list[torch.Tensor] = []
        hook = decoder.embed_tokens.register_forward_hook(lambda module, given, x: embedded.append(x))
        decoder.layers = nn.ModuleList([spy])
        try:
            with self.phases.telling(torch.zeros(2, dtype=torch.long)):
                y = decoder(input_ids=ids, use_cache=False).last_hidden_state
            (x,) = embedded
            turned = decoder.rotary_emb(x, position_ids=torch.arange(3)[None])
            same = torch.equal(spy.x, x) and all(map(torch.equal, spy.turned, turned))
            return same and close(y, rms_normed(decoder.norm, x))
        except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError):
            return False  # another kind of decoder
        finally:
            hook.remove()
            decoder.layers = layers


class Turns:
    """cos and sin of the positions that come next, found together where they do not depend on how many there are."""

    def __init__(self) -> None:
        self.rotary: Any = None
        self.start = 0
        self.cos = self.sin = torch.empty(0)

    def of(self, rotary: Any, x: torch.Tensor, positions: int | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B or 1, 1, size] each, in the type of x [B, 1, D]; positions: one for all, or [B or 1, 1]."""
        if not isinstance(positions, torch.Tensor):
            positions = torch.tensor([[positions]])
        many = positions.numel() > 1 or positions.is_floating_point()
        if many or getattr(rotary, "rope_type", None) not in _STEADY:
            cos, sin = rotary(x, position_ids=positions)
            return cos, sin
        place = int(positions)
        at = place - self.start
        if rotary is not self.rotary or not 0 <= at < _TURNS or self.cos.dtype != x.dtype:
            cos, sin = rotary(x, position_ids=torch.arange(place, place + _TURNS)[None])
            self.rotary, self.start, self.cos, self.sin, at = rotary, place, cos, sin, 0
        return self.cos[:, at : at + 1], self.sin[:, at : at + 1]


class _Spy(nn.Module):
    """In the place of layers: hands on what it is given."""

    x: torch.Tensor
    turned: tuple[torch.Tensor, torch.Tensor]

    def forward(self, hidden_states: torch.Tensor, *, position_embeddings: Any, **_: Any) -> torch.Tensor:
        self.x, self.turned = hidden_states, position_embeddings
        return hidden_states


def _looks_alike(decoder: Any, plans: list[Plan]) -> bool:
    """Whether a decoder has the parts, every layer of it is one of these, and each sees all tokens."""
    if {name for name, _ in decoder.named_children()} != {*_PARTS, "layers"}:
        return False
    config = decoder.config
    kinds = {*(getattr(config, "layer_types", None) or ())}
    if not kinds <= {"full_attention"} or (not kinds and getattr(config, "sliding_window", None)):
        return False  # all tokens are seen by all layers
    return [*decoder.layers] == [plan.layer for plan in plans]


def _fits(rooms: dict[str, torch.Tensor], sizes: tuple[int, int, int], dtype: torch.dtype) -> bool:
    """Whether keys and values are as C reads them: B, K and the size of a head."""
    states = rooms.values()
    return all((*t.shape[:2], t.shape[3]) == sizes and t.dtype == dtype and t.stride(-1) == 1 for t in states)
