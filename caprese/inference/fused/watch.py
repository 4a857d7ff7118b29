"""What may change between two tokens, looked at in few steps.

For every token all of it has to come from memory, behind the weights that were read meanwhile: so it is few, flat
lists.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from caprese.efficient_methods.passes import Pass
from caprese.inference.fused.layer import Plan

_TRAINING, _MOVES, _VERSION = attrgetter("training"), attrgetter("moves"), attrgetter("_version")
_ACTIVE = attrgetter("active_adapter", "disable_adapters")


class Watch:
    """The modules and tensors of a decoder whose layers are planned."""

    def __init__(self, parts: Sequence[Any], decoder: Any, plans: Sequence[Plan]) -> None:
        """parts: of the decoder, beside the layers."""
        self.decoder, self.plans = decoder, plans
        layers = [plan.layer for plan in plans]
        self.watched = [*parts, *layers]
        # as they lie in modules, because what is in them may be replaced
        self.places = [decoder._modules, decoder.layers._modules]
        self.places += [each._modules for layer in layers for each in (layer, layer.self_attn)]
        self.found = [[*place.values()] for place in self.places]
        self.slots = [plan.wrapper._modules for plan in plans]
        own = [*parts, *layers, *(part for plan in plans for part in plan.parts)]
        self.hooks = [hooks for part in own for hooks in (part._forward_hooks, part._forward_pre_hooks)]
        self.decoders = [decoder._forward_hooks, decoder._forward_pre_hooks]
        self.hung = [len(hooks) for hooks in self.decoders]
        self._look()

    def is_as_it_was(self) -> bool:
        """Whether the parts are those that were found, and nothing looks on at them."""
        config = self.decoder.config
        if getattr(config, "output_hidden_states", False) or getattr(config, "output_attentions", False):
            return False
        if any(self.hooks) or [len(hooks) for hooks in self.decoders] != self.hung:
            return False
        if any("forward" in vars(part) or part.training for part in self.watched):
            return False
        return all([*place.values()] == found for place, found in zip(self.places, self.found, strict=True))

    def _look(self) -> None:
        """Find the adapters that are in the slots now, and their tensors."""
        self.steps = [slot.get("fused") for slot in self.slots]
        self.recoveries = [slot["recovery"] for slot in self.slots if hasattr(slot["recovery"], "active_adapters")]
        self.halves = [half._modules for r in self.recoveries for half in (r.lora_A, r.lora_B)]
        self.homes = [linear._parameters for half in self.halves for linear in half.values()]
        self.scalings = [r.scaling for r in self.recoveries]
        # held, so that no other comes to lie there; what is made in inference mode counts no changes
        self.tensors = [t for home in self.homes for t in home.values() if t is not None]
        self.counted = [t for t in self.tensors if not t.is_inference()]

    def facts(self, current: Pass, anew: bool = False) -> list[Any]:
        """What is equal for two tokens if nothing changed between them that C has to be told of.

        Args:
            anew: look for adapters first.
        """
        if anew:
            self._look()
        memory, config, phases = current.memory, self.decoder.config, self.plans[0].wrapper.phases
        return [
            weakref.ref(memory),
            memory.changes,
            current.shape,
            RemovableHandle.next_id,  # counts all hooks that were ever put on a module
            torch.is_grad_enabled(),
            phases.only,
            phases.observer,
            getattr(config, "output_hidden_states", False),
            getattr(config, "output_attentions", False),
            [*map(_TRAINING, self.watched)],
            [*map(len, map(vars, self.watched))],  # one more: a `forward` of its own
            [*map(list, map(dict.values, self.places))],
            [*map(list, map(dict.values, self.slots))],
            [*map(list, map(dict.values, self.halves))],
            [*map(_MOVES, self.steps)],
            [*map(_ACTIVE, self.recoveries)],
            [*map(list, map(dict.values, self.scalings))],
            [t if t is None else t.data_ptr() for home in self.homes for t in home.values()],
            [*map(_VERSION, self.counted)],
        ]
