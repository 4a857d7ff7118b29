"""What one generated token reads: one arithmetic for plans, reports, benchmarks and scaling.

All counts are of weights, means over tokens, in weights of the model's own type: packed ones count for as much as they
are. An input embedding that is not also the head is looked up, not read; KV caches and states are no weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from caprese.efficient_methods.apply import applied_ffns, methods_by_layer
from caprese.efficient_methods.base import Method
from caprese.efficient_methods.compose import idle_branches
from caprese.efficient_methods.passes import phases_of
from caprese.efficient_methods.reads import Reads
from caprese.efficient_methods.stand_in import stand_ins
from caprese.models import FFN, Site, active_parameters, count_parameters, find_ffns, unwrap
from caprese.models.linear import sizes

Variant = Literal["dense", "efficient", "recovered"]


@dataclass(frozen=True)
class Cost:
    """Weights of a model, and those that one generated token reads."""

    base: int
    """Of the base model, each once."""
    dense: int
    """Of these, what the dense model reads."""
    spared: int
    """Of these, what methods spare a token; what stands in for something is taken off."""
    stand_ins: int
    """Of modules that were put in the place of the model's own."""
    adapter: int
    """Of the branches."""
    again: int = 0
    """A token's part of the dense passes of reselection."""
    lora: int = 0
    """What would be read, in place of the branches, of a LoRA on the FFN's linear layers with as many parameters."""

    @property
    def efficient(self) -> int:
        return self.dense - self.spared + self.again

    @property
    def recovered(self) -> int:
        return self.efficient + self.adapter

    def read(self, variant: Variant) -> int:
        """Weights that one generated token reads of the dense, the efficient or the recovered model."""
        return {"dense": self.dense, "efficient": self.efficient, "recovered": self.recovered}[variant]


def cost(
    model: nn.Module,
    methods: Sequence[Method],
    rank: int = 0,
    *,
    bias: bool = False,
    batch: int = 1,
    reselect_every: int | None = None,
) -> Cost:
    """What a token reads of `model` with methods that are to be applied to it; it may be on the meta device.

    Args:
        rank: of the branches, and whether they have a `bias`; 0 where there are none.
        batch: sequences that decode together. Where they choose for themselves, all that some of them needs is read, as
            if their choices were independent; counts are then of one step, not of one token.

    Raises:
        CapreseError: an unsupported model, or layers that it does not have.
    """
    sites = find_ffns(model)
    rank = min(rank, 1) if idle_branches(methods) else rank
    spared = trained = adapter = lora = 0
    for index, own in methods_by_layer([method.at_batch(batch) for method in methods], len(sites)).items():
        site = sites[index]
        spared += weights_saved(site, own)
        for method in own:
            weights = method.stand_in_weights(site, unwrap(model).config)
            trained, spared = trained + weights.trained, spared + weights.spared - weights.read
        if rank:
            adapter += site.ffn.hidden_size * (2 * rank + bias)
            lora += _lora(site.ffn, own, rank)
    spared += head_saved(model, methods)
    dense = active_parameters(model)
    again = 0 if reselect_every is None else round(dense / reselect_every)
    return Cost(count_parameters(model), dense, spared, trained, adapter, again, lora)


def cost_of(model: nn.Module) -> Cost:
    """What a token reads of a model as it is, with the methods and the adapter that are on it."""
    wrappers = applied_ffns(model).values()
    base, dense = count_parameters(model), active_parameters(model)
    spared = sum(weights_saved(w.site, w.methods) for w in wrappers)
    spared += head_saved(model, phases_of(model).methods) if wrappers else 0
    new = sum(_count(at.trained) for at in stand_ins(model))
    spared += sum(_count(at.original) - at.reads for at in stand_ins(model))
    adapter = sum(p.numel() for w in wrappers for p in _active(w.recovery))
    every = phases_of(model).reselect_every if wrappers else None
    return Cost(base, dense, spared, new, adapter, 0 if every is None else round(dense / every))


def _active(recovery: Any) -> list[nn.Parameter]:
    """What a slot's branch reads: the parameters of the adapters that are on, or of all where none is."""
    layers = [layer for kind in ("lora_A", "lora_B") for layer in getattr(recovery, kind, {}).items()]
    on = set(getattr(recovery, "active_adapters", ())) & {name for name, _ in layers}
    return [p for name, layer in layers if name in on or not on for p in layer.parameters()]


def weights_saved(site: Site, methods: Sequence[Method]) -> int:
    """How many weights of one layer `methods` spare a generated token, on average; in weights of the model's type.

    Methods that choose by token are taken as independent of one another.
    """
    each = float(site.ffn.hidden_size * site.ffn.width)
    before = Reads(each if site.ffn.gated else 0.0, each, each)
    left, density = before.after(methods).total, 1.0
    for method in methods:
        density *= method.attention_density
    attention: list[Any] = site.attention_linears() if density < 1 else []
    # what is said of packed weights is in weights of 16 bit, whatever the model's are
    packed = frozenset().union(*(method.acts_on for method in methods))
    left = round(left * (_of_16_bit(site) if "weights" in packed else 1))
    density *= _of_16_bit(site) if "projections" in packed else 1
    return before.total - left + round((1 - density) * sum(math.prod(sizes(linear)) for linear in attention))


def _of_16_bit(site: Site) -> float:
    return 2 / site.ffn.dtype.itemsize


def head_saved(model: nn.Module, methods: Sequence[Method]) -> int:
    """How many weights of the language model head `methods` spare a token, in weights of the model's type."""
    sites, head = find_ffns(model), unwrap(model).get_output_embeddings().weight
    density = math.prod(method.head_density for method in methods)
    return round((1 - density * _of_16_bit(sites[0])) * head.numel()) if density < 1 else 0


def lora_rank(ffn: FFN, rank: int) -> int:
    """Of the LoRA on the FFN's three (two) linear layers that has as many parameters as a branch of `rank`."""
    d, f = ffn.hidden_size, ffn.width
    return max(1, round(2 * d * rank / ((3 if ffn.gated else 2) * (d + f))))


def _lora(ffn: FFN, methods: Sequence[Method], rank: int) -> int:
    """Weights read of that LoRA: rows that stand for neurons are chosen as the FFN's are."""
    kept = Reads(0, 0, 1).after([m for m in methods if "weights" not in m.acts_on]).down
    return (3 if ffn.gated else 2) * lora_rank(ffn, rank) * round(ffn.hidden_size + kept * ffn.width)


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
