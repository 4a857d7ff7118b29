"""Mamba-2 in place of attention, in some layers or in all."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, Protocol, Self

import torch
from pydantic import Field, PlainValidator, model_validator
from torch import nn

from caprese.efficient_methods.base import Method, Part, Trial
from caprese.efficient_methods.mamba.alignment import alignment, hidden_alignment, match_decay, match_scale
from caprese.efficient_methods.mamba.mixer import Mixer
from caprese.efficient_methods.mamba.replacement import Replacement, near, replacements, taken_over
from caprese.efficient_methods.mamba.thaw import parts_of
from caprese.efficient_methods.passes import only
from caprese.efficient_methods.stand_in import Acting, Objective, StandInWeights
from caprese.efficient_methods.tokens import Tokens
from caprese.errors import CapreseError
from caprese.limits import Count, Seed, Some
from caprese.models import Site
from caprese.models.attention import read_attention


def _keep(value: Any) -> float | list[int]:
    if value and isinstance(value, list) and all(isinstance(v, int) and not isinstance(v, bool) for v in value):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ValueError("a fraction from 0 (none) to below 1, or a list of layers that keep their attention")
    return float(value)


def _heads(value: Any) -> float | list[str]:
    if isinstance(value, float) and 0 < value < 1:
        return value
    found = value.split() if isinstance(value, str) else value
    fits = isinstance(found, list) and all(isinstance(v, str) and re.fullmatch(r"\d{1,4}/\d{1,4}", v) for v in found)
    if not fits:
        raise ValueError('heads as "layer/head", such as "3/0" or "3/0 5/2", or a fraction between 0 and 1')
    return [f"{layer}/{head}" for layer, head in sorted({_numbers(each) for each in found})]


def _numbers(head: str) -> tuple[int, int]:
    """The numbers of a head's layer and of itself."""
    layer, _, number = head.partition("/")
    return int(layer), int(number)


#: tokens that are near, where no window says it
_NEAR = 64


class Settings(Protocol):
    """As much of a recipe's section `alignment` as mixers look at."""

    epochs: int
    """Passes with every mixer alone, on what its attention saw."""
    hidden_epochs: int
    """Passes after those with all mixers in place, learning the dense model's hidden states."""
    matrices: float
    """With every mixer alone: the weight, beside what it gives, of how it mixes tokens."""


class Mamba(Method):
    """Replace attention layers by Mamba-2 mixers started from the attention's weights (arXiv 2408.15237).

    Prompts run through the mixers too: a state is built as the text is read. Everything else stays as it is.
    """

    name: ClassVar[str] = "mamba"
    summary: ClassVar[str] = "Mamba-2 mixers in place of attention layers, started from their weights"
    parts: ClassVar[frozenset[Part]] = frozenset({"mixer"})
    trains: ClassVar[str] = "Mamba mixers"
    dense_prompts: ClassVar[bool] = False
    static_cache: ClassVar[bool] = False
    checkpoint: ClassVar[str] = "granitemoehybrid"

    keep_attention: Annotated[float | list[int], PlainValidator(_keep)] = 0.5
    """Fraction of the layers that keep their attention, or the numbers of those that do; 0 is none."""
    selected: Literal["evenly", "sensitivity", "restored", "far"] = "evenly"
    """How that fraction is selected: spread evenly, or measured by `recover`: sensitivity, the layers whose mixer alone
    costs most; restored, those whose attention gives back most beside mixers everywhere else (arXiv 2512.20569); far,
    those that lose most where they see only what is near, without any training. Heads are selected by the last."""
    probe: Literal["samples", "retrieval"] = "samples"
    """What that is measured on: all held-out samples, or those of retrieval (keys and values) alone, in which what
    fetches shows (arXiv 2602.11374); then prompts have to have some, such as retrieval:distil=0.1."""
    start: Literal["attention", "calibrated", "random"] = "calibrated"
    """What mixers start from: attention's weights; calibrated: also an open gate, a convolution that passes its input,
    and each head's mean attention distance, over which it forgets half; random: nothing."""
    rope: bool = True
    """Whether B and C are rotated and normed as keys and queries were. Default: only with start=calibrated."""
    silu: bool = False
    """Whether SiLU follows the convolution, as in Mamba-2. Default: with the other starts."""
    state: Annotated[int, Field(ge=1, le=16)] = 1
    """How many times as wide as a head its state is; what goes beyond attention's keys and queries starts at random."""
    per_head: bool = False
    """Whether heads that share keys and values get x and B of their own."""
    seed: Seed = 0
    """Of what is random in a mixer's start."""
    train: Literal["mixers", "all"] = "mixers"
    """What learns in replaced layers; all: FFNs and norms too, at a tenth of the mixers' rate."""
    window: Count | None = None
    """Tokens over which replaced layers also attend as they did, in bounded memory; null is none."""
    sinks: Some = 4
    """First tokens of a text that are seen beside a window."""
    window_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Part of the texts for which a layer's window is hidden while mixers learn, or mixers may come to be ignored
    (arXiv 2510.05901)."""
    keep_heads: Annotated[float | list[str], PlainValidator(_heads)] = []
    """Heads that stay attention in replaced layers, as "layer/head", or the fraction of all heads that does."""

    @model_validator(mode="before")
    @classmethod
    def _beside_its_start(cls, given: Any) -> Any:
        """A calibrated start needs rope and no SiLU; others are what they were before there was one."""
        if not isinstance(given, dict) or given.get("start", "calibrated") == "calibrated":
            return given
        return {"rope": False, "silu": True, **given}

    @property
    def acts_on(self) -> frozenset[Part]:
        return self.parts | ({"ffn"} if self.train == "all" else set())

    @property
    def reads_weights(self) -> bool:
        return self.train == "all"

    @model_validator(mode="after")
    def _one_selection(self) -> Self:
        if isinstance(self.keep_heads, float):
            if self.selected != "far":
                raise ValueError("a fraction of heads is selected=far")
        elif self.selected != "evenly" and not (isinstance(self.keep_attention, float) and self.keep_attention):
            raise ValueError(f"selected={self.selected} goes with keep_attention a fraction above 0")
        return self

    @model_validator(mode="after")
    def _one_way_of_staying(self) -> Self:
        if self.keep_heads and self.selected in ("sensitivity", "restored"):
            raise ValueError(f"selected={self.selected} is of whole layers; leave out keep_heads")
        if self.probe != "samples" and self.selected == "evenly":
            raise ValueError(f"probe={self.probe} is what layers or heads are selected by; give selected")
        if self.window_dropout and self.window is None:
            raise ValueError("window_dropout is of a window; give one")
        if self.keep_heads and self.window is not None:
            raise ValueError("keep_heads and window do not go together: heads that stay see all of a text")
        return self

    def heads_of(self, layer: int) -> list[int]:
        """The heads of a layer that stay attention."""
        return [head for of, head in map(_numbers, self._known_heads) if of == layer]

    @property
    def _known_heads(self) -> list[str]:
        """Those that are known."""
        return [] if isinstance(self.keep_heads, float) else self.keep_heads

    def kept(self, count: int) -> int:
        """How many of its layers keep their attention: none only if the fraction is 0, or there is one layer."""
        assert isinstance(self.keep_attention, float)
        layers = len(super().layer_indices(count))
        least = min(1, layers - 1) if self.keep_attention else 0
        return max(least, round(self.keep_attention * layers))

    def layer_indices(self, count: int) -> list[int]:
        """The layers that get a mixer; before sensitivity is measured, as many of them.

        Raises:
            CapreseError: layers that the model does not have, or none left to replace.
        """
        layers = super().layer_indices(count)
        if isinstance(self.keep_attention, list):
            kept = set(self.keep_attention)
            if unknown := sorted(kept - set(range(count))):
                raise CapreseError(f"keep_attention {unknown}: a model of {count} layers has 0-{count - 1}")
        else:
            many = self.kept(count)
            kept = {layers[int((i + 0.5) * len(layers) / many)] for i in range(many)}
        replaced = [layer for layer in layers if layer not in kept]
        if lone := [head for head in self._known_heads if _numbers(head)[0] not in replaced]:
            raise CapreseError(f"keep_heads {', '.join(lone)}: these layers are not replaced")
        if not replaced:
            raise CapreseError("keep_attention leaves no layer to replace; keep fewer")
        return replaced

    def install(
        self, site: Site, config: Any, phases: Acting, choice: torch.Tensor | None = None
    ) -> Callable[[], None]:
        """A mixer in place of a layer's attention."""
        if self.undecided:
            raise CapreseError(
                f"mamba:selected={self.selected} is measured by caprese recover; here, give keep_attention the layers, "
                "or keep_heads the heads"
            )
        self._check_heads(site, config)
        replacement = Replacement(site, config, phases, self)
        replacement.train(site.layer.training)
        replacement.put_on(site)
        # and no closure: a deep copy of the model then has its own
        return functools.partial(replacement.take_off, site.layer, site.attention_name)

    def _check_heads(self, site: Site, config: Any) -> None:
        stay, heads = self.heads_of(site.index), read_attention(site.attention(), config).heads
        if unknown := [head for head in stay if head >= heads]:
            raise CapreseError(f"keep_heads {site.index}/{unknown[0]}: a layer has heads 0-{heads - 1}")
        if len(stay) == heads:
            raise CapreseError(f"keep_heads has all heads of layer {site.index}; name it in keep_attention")

    def stand_in_weights(self, site: Site, config: Any) -> StandInWeights:
        self._check_heads(site, config)
        attention = site.attention()
        facts = read_attention(attention, config, self.rope)
        tensors: dict[str, Any] = {name: t.to("meta") for name, t in vars(facts).items() if isinstance(t, torch.Tensor)}
        stay = self.heads_of(site.index)
        with torch.device("meta"):
            whole = replace(facts, **tensors)
            mixer = Mixer(taken_over(whole, self, site.index), 1e-6, self)
            stays = [whole.of(stay)] if stay else [whole] if self.window is not None else []
        new, old = (sum(p.numel() for p in module.parameters()) for module in (mixer, attention))
        parts = parts_of(site).values() if self.train == "all" else ()
        thawed = sum(p.numel() for part in parts for p in part.parameters(recurse=False))
        return StandInWeights(new + thawed, new + sum(each.weights for each in stays), old)

    @property
    def undecided(self) -> bool:
        return self.selected != "evenly"

    @property
    def measured_on(self) -> str | None:
        return None if self.probe == "samples" else self.probe

    @property
    def candidates_learn(self) -> bool:
        return self.selected != "far"

    def candidates(self) -> Mamba:
        everywhere: dict[str, Any] = {"selected": "evenly", "probe": "samples", "keep_attention": 0.0, "keep_heads": []}
        return self.model_copy(
            update={**everywhere, "window": self.window or _NEAR} if self.selected == "far" else everywhere
        )

    def trials(self, model: nn.Module) -> Iterator[Trial]:
        found = {at.layer: at for at in replacements(model)}
        for layer, at in found.items():
            if self.selected == "sensitivity":
                yield layer, only(model, {layer})
            elif self.selected == "restored":
                yield layer, only(model, set(found) - {layer})
            elif isinstance(self.keep_heads, float):
                for head in range(at.mixer.heads):
                    yield f"{layer}/{head}", near(model, {layer: {head}})
            else:
                yield layer, near(model, {layer: range(at.mixer.heads)})

    def decided(self, cost: Mapping[Hashable, float], count: int) -> Mamba:
        """Attention stays where a mixer costs most, or where giving attention back leaves least."""
        rising, settled = sorted(cost, key=cost.__getitem__), {"selected": "evenly", "probe": "samples"}
        if isinstance(self.keep_heads, float):
            heads = _heads(rising[-max(1, round(self.keep_heads * len(rising))) :])
            assert isinstance(heads, list)
            chosen, there = (Counter(_numbers(head)[0] for head in each) for each in (heads, map(str, cost)))
            whole = {layer for layer in chosen if chosen[layer] == there[layer]}  # stays as it is, without a mixer
            replaced = self.layer_indices(count)
            kept = {layer for layer in super().layer_indices(count) if layer not in replaced}
            update = {"keep_heads": [head for head in heads if _numbers(head)[0] not in whole]}
            return self.model_copy(update={**settled, **update, "keep_attention": sorted(whole | kept)})
        many = self.kept(count)
        stay = rising[:many] if self.selected == "restored" else rising[len(rising) - many :]
        return self.model_copy(update={**settled, "keep_attention": sorted(map(int, map(str, stay)))})

    def prepare(self, model: nn.Module, tokens: Tokens) -> None:
        if self.start == "calibrated":
            match_decay(model, tokens)
        match_scale(model, tokens)

    def objectives(self, settings: Settings) -> list[Objective]:
        alone = functools.partial(alignment, matrices=settings.matrices)
        both = [
            Objective("alignment", settings.epochs, alone, "mixers", alone=True),
            Objective("hidden_states", settings.hidden_epochs, hidden_alignment, "hidden states", alone=False),
        ]
        return [objective for objective in both if objective.epochs]

    def in_words(self) -> str:
        kept, heads = self.keep_attention, self.keep_heads
        of = f"{kept:.0%}" if isinstance(kept, float) else f"layers {', '.join(map(str, kept))}:"
        more = f", heads {', '.join(heads)}" if isinstance(heads, list) and heads else ""
        more += "" if self.window is None else f", a window of {self.window}"
        return f"{self.name} ({of} attention{more})"
