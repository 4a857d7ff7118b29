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
from caprese.inference.fused.layer import Plan, global_hooks, look_on

_TRAINING, _VERSION = attrgetter("training"), attrgetter("_version")
_STEP, _ACTIVE = attrgetter("moves", "fills"), attrgetter("active_adapter", "disable_adapters")


class Watch:
    """The modules and tensors of a decoder whose layers are planned.

    Attributes:
        watched: the parts beside the layers, and the layers.
        hooks: the dicts of hooks on these.
        places: the dicts of modules whose parts the plans took over, as they lie in them, because they may be replaced.
        found: what was in the first two, the decoder's own.
        slots: the dicts of the FFNs' modules, in which steps and adapters lie.
    """

    def __init__(self, parts: Sequence[Any], decoder: Any, plans: Sequence[Plan]) -> None:
        """parts: of the decoder, beside the layers."""
        self.decoder, self.plans = decoder, plans
        layers = [plan.layer for plan in plans]
        self.watched = [*parts, *layers]
        self.hooks = [hooks for part in self.watched for hooks in (part._forward_hooks, part._forward_pre_hooks)]
        own = [decoder._modules, decoder.layers._modules]
        self.places = own + [each._modules for layer in layers for each in (layer, layer.self_attn)]
        self.found = [[*place.values()] for place in own]
        self.slots = [plan.wrapper._modules for plan in plans]
        self.look()

    def is_as_it_was(self) -> bool:
        """Whether the decoder's parts are those that were found, and nothing looks on at them."""
        if self._asked() or global_hooks() or any(map(look_on, self.hooks)):
            return False
        if any("forward" in vars(part) or part.training for part in self.watched):
            return False
        return [[*place.values()] for place in self.places[: len(self.found)]] == self.found

    def look(self) -> None:
        """Find the steps and adapters that are in the slots now, and the adapters' tensors."""
        self.steps = [slot.get("fused") for slot in self.slots]
        self.adapters = [slot["recovery"] for slot in self.slots if hasattr(slot["recovery"], "active_adapters")]
        self.scalings = [adapter.scaling for adapter in self.adapters]
        self.halves = [half._modules for adapter in self.adapters for half in (adapter.lora_A, adapter.lora_B)]
        self.homes = [linear._parameters for half in self.halves for linear in half.values()]
        self.homes.append(self.decoder.rotary_emb._buffers)
        # held, so that no other comes to lie there; what is made in inference mode counts no changes
        self.tensors = self._tensors()
        self.counted = [t for t in self.tensors if not t.is_inference()]

    def _tensors(self) -> list[torch.Tensor]:
        return [t for home in self.homes for t in home.values() if t is not None]

    def _asked(self) -> bool:
        """Whether the model's settings ask for what C does not give."""
        settings = vars(self.decoder.config)
        if settings.get("num_hidden_layers", len(self.plans)) < len(self.plans) or settings.get("return_dict") is False:
            return True
        return bool(settings.get("output_hidden_states") or settings.get("output_attentions"))

    def facts(self, current: Pass) -> list[Any]:
        """What is equal for two tokens if nothing changed between them that C has to be told of."""
        memory, phases, tensors = current.memory, self.plans[0].wrapper.phases, self._tensors()
        return [
            weakref.ref(memory),
            memory.changes,
            current.shape,
            RemovableHandle.next_id,  # counts all hooks that were ever put on a module
            torch.is_grad_enabled(),
            phases.only,
            phases.observer,
            self._asked(),
            [*map(_TRAINING, self.watched)],
            ["forward" in own for own in map(vars, self.watched)],
            [*map(list, map(dict.values, self.places))],
            [*map(list, map(dict.values, self.slots))],
            [*map(list, map(dict.values, self.halves))],
            [*map(_STEP, self.steps)],
            getattr(self.decoder.rotary_emb, "attention_scaling", None),
            [*map(_ACTIVE, self.adapters)],
            [*map(list, map(dict.values, self.scalings))],
            [*map(id, tensors)],
            [*map(torch.Tensor.data_ptr, tensors)],
            [*map(_VERSION, self.counted)],
        ]
