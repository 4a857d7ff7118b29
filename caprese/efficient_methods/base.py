"""The shape every efficient method has: a config whose fields are documented where they stand, and a few functions.

A method *looks* at tokens (`statistic`, additive over tokens, so that chunks, second turns and calibration samples all
add up), *chooses* once from what it saw (per sequence from the prompt, or once for all from samples), and then takes
away: by building another FFN (`transform`), by zeroing inputs (`inputs`), or by dropping neurons of each generated
token (`keep`). Or it puts something to be trained in the place of a part of the model (`install`), says how that is
trained (`objectives`) and what cannot be done beside it.

A method answers for itself: what plans, reports, bench and export need to know of it is asked here, not by its name.
Every function has a default that does nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from caprese.efficient_methods.reads import Reads
from caprese.efficient_methods.settings import Layers, Sparsity
from caprese.efficient_methods.stand_in import Acting, Objective, StandInWeights
from caprese.efficient_methods.tokens import Tokens
from caprese.errors import CapreseError
from caprese.kernels import PackedFFN
from caprese.limits import LONGEST
from caprese.models import FFN, Site

#: something that is measured, by what it is called
Trial = tuple[Hashable, AbstractContextManager[None]]
Source = Literal["prompt", "samples"]
Part = Literal["width", "weights", "rows", "neurons", "inputs", "attention", "projections", "head", "mixer", "ffn"]


class Block(Protocol):
    """A decoder layer on calibration samples."""

    sizes: list[int]
    """Weights of each of the attention's linear layers."""

    def error(self, choice: torch.Tensor) -> float:
        """||y - y_eff||^2 / ||y||^2 of the layer's output with this method at `choice`, on completion tokens."""
        ...


class Method(BaseModel):
    """Base class of the efficient methods.

    Shapes: x is [B, T, D]; a and z (see `models.FFN`) are [B, T, F]; masks [B, T].
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, str_max_length=LONGEST, frozen=True)
    name: ClassVar[str]
    summary: ClassVar[str] = ""
    """One line for `caprese methods`."""
    parts: ClassVar[frozenset[Part]] = frozenset()
    """What it acts on: width (one fixed set of neurons), weights (how they are stored), rows (neurons by sequence),
    neurons (by token), inputs (input channels by token), attention (the same of its linear layers), projections (how
    their weights are stored), head (the language model head's), mixer (what stands in for attention), ffn (its weights
    are trained). Two methods on one part do not compose."""

    trains: ClassVar[str] = ""
    """What it puts in the place of a part of the model and trains, in a report's words ("mixers"): that gives
    back what was taken. Where a method trains nothing, branches do."""
    dense_prompts: ClassVar[bool] = True
    """Whether prompts run as in the dense model, so that both have one KV cache for them."""
    static_cache: ClassVar[bool] = True
    """Whether it decodes with a static KV cache, compiled."""
    packs: ClassVar[bool] = False
    """Whether it stores FFN weights so that the neurons cannot be told apart any more."""
    no_reselection: ClassVar[str] = ""
    """Why generated tokens cannot pass through the dense model again; empty where they can."""
    checkpoint: ClassVar[str] = ""
    """The model type in transformers whose checkpoints hold what it trains."""

    layers: Layers = "all"
    """Which decoder layers: "all", "first-half", or a list of layer numbers from 0."""

    @property
    def acts_on(self) -> frozenset[Part]:
        """`parts`, or what is left of them with these settings."""
        return self.parts

    def check(self) -> None:
        """Raise CapreseError if something that the method needs is not installed."""

    @property
    def learns(self) -> frozenset[Source]:
        """What `statistic` is summed over: each prompt, calibration samples, both, or nothing."""
        return frozenset()

    @property
    def reads_weights(self) -> bool:
        """Whether it reads or copies FFN weights by row, which packed ones and those with an adapter do not allow."""
        return False

    def layer_indices(self, count: int) -> list[int]:
        """The layers of a model of `count` layers that this method acts on.

        Raises:
            CapreseError: a number out of range, twice, or an empty list.
        """
        if self.layers == "all":
            return list(range(count))
        if self.layers == "first-half":
            return list(range(math.ceil(count / 2)))
        chosen = sorted(self.layers)
        if not chosen or len(set(chosen)) != len(chosen) or chosen[0] < 0 or chosen[-1] >= count:
            raise CapreseError(
                f"layers {self.layers} do not fit a model of {count} layers: numbers 0-{count - 1}, each once"
            )
        return chosen

    def by_layer(self, count: int) -> dict[int, Method]:
        """This method as it is on each of its layers, in a model of `count` layers.

        Raises:
            CapreseError: see `layer_indices`.
        """
        return dict.fromkeys(self.layer_indices(count), self)

    def statistic(self, x: torch.Tensor, a: torch.Tensor, z: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """What the method learns from the tokens where `mask` is true; [B, S], additive over tokens."""
        raise NotImplementedError

    def choose(self, statistic: torch.Tensor, ffn: FFN | PackedFFN) -> torch.Tensor:
        """The choice for each sequence, [B, ...], from the summed statistic [B, S] and the FFN it is made in."""
        raise NotImplementedError

    def attention_statistic(self, inputs: list[torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
        """The same from the inputs of the attention's linear layers, each [B, T, ...]; asked of methods that act on
        attention or its projections and learn from samples, and put behind `statistic`."""
        raise NotImplementedError

    def calibrated(self, statistic: torch.Tensor, ffn: FFN | PackedFFN) -> torch.Tensor:
        """What is kept of the samples' summed statistic [1, S]: the choice, or what each prompt's is joined to."""
        return self.choose(statistic, ffn)

    def joined(self, statistic: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        """The statistic of each prompt [B, S] with what `calibrated` kept, for methods that learn from both."""
        return statistic

    def fit(self, statistic: torch.Tensor, ffn: FFN | PackedFFN, block: Block) -> torch.Tensor:
        """`calibrated`, for methods that want to see what a choice does to the layer's output on samples."""
        return self.calibrated(statistic, ffn)

    def fits(self, choice: torch.Tensor, width: int, attention: int) -> bool:
        """Whether a choice from samples can have been made with these settings, in an FFN of `width` neurons beside
        `attention` linear layers."""
        return "width" not in self.acts_on or int(choice.max()) < width

    def transform(self, ffn: FFN | PackedFFN, choice: torch.Tensor | None) -> FFN | PackedFFN:
        """The FFN that generated tokens go through in place of `ffn`; called once, by `apply`."""
        return ffn

    def inputs(
        self, x: torch.Tensor, x_up: torch.Tensor, choice: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What gate and up see of x [B, T, D]."""
        return x, x_up

    def keep(self, a: torch.Tensor, z: torch.Tensor, choice: torch.Tensor | None) -> torch.Tensor | None:
        """Which neurons of each token are computed with; bool, broadcastable to [B, T, F]; None is all."""
        return None

    def attention_input(self, x: torch.Tensor, number: int, choice: torch.Tensor | None) -> torch.Tensor:
        """What the attention's linear layer `number` (see `Family.attention`) sees of x [B, T, ...]."""
        return x

    def reads(self, reads: Reads) -> Reads:
        """What is left to read of an FFN, after the methods before this one."""
        return reads

    @property
    def attention_density(self) -> float:
        """Fraction of the attention's linear weights that is still read; packed ones as 16-bit weights."""
        return 1.0

    @property
    def head_density(self) -> float:
        """The same of the language model head."""
        return 1.0

    def at_batch(self, batch: int) -> Method:
        """A method that reads as much as this one does when `batch` sequences decode together."""
        return self

    def install(
        self, site: Site, config: Any, phases: Acting, choice: torch.Tensor | None = None
    ) -> Callable[[], None]:
        """Put what it trains into one layer, a `StandIn`, or something in the place of its attention's linear layers;
        returns the undoing.

        Args:
            config: the model's.
            phases: what the layers share; it knows which of them are to act.
            choice: this layer's, of methods that learn from samples.

        Raises:
            CapreseError: the method is not settled yet (see `undecided`), or the layer is not of a kind it knows.
        """
        return lambda: None

    def install_head(self, model: Any, phases: Any) -> Callable[[], None]:
        """Put something in the place of the language model head; returns the undoing.

        Args:
            model: the bare model.
            phases: what its layers share.
        """
        return lambda: None

    def stand_in_weights(self, site: Site, config: Any) -> StandInWeights:
        """Weights of what `install` puts into one layer."""
        return StandInWeights(0, 0, 0)

    @property
    def undecided(self) -> bool:
        """Whether its layers are still to be chosen, by what `trials` cost; `recover` measures that."""
        return False

    def candidates(self) -> Method:
        """This method on every layer that may be chosen."""
        return self

    @property
    def candidates_learn(self) -> bool:
        """Whether what `candidates` trains is aligned a little before trials."""
        return True

    @property
    def measured_on(self) -> str | None:
        """The kind of prompts ("retrieval") whose held-out samples trials are measured on; None is all of them."""
        return None

    def trials(self, model: nn.Module) -> Iterator[Trial]:
        """What is measured of `model`, which has `candidates` applied: for each, KL(dense || efficient) is asked for
        inside its context."""
        yield from ()

    def decided(self, cost: Mapping[Hashable, float], count: int) -> Method:
        """This method on the layers that are best, in a model of `count` layers.

        Args:
            cost: by what the trials are called, their KL per token.
        """
        return self

    def prepare(self, model: nn.Module, tokens: Tokens) -> None:
        """Look at one batch of samples before anything trains; `model` has this method applied."""

    def objectives(self, settings: Any) -> list[Objective]:
        """What its stand-ins learn, one after the other, before everything is trained end to end.

        Args:
            settings: the section `alignment` of a recipe.
        """
        return []

    @property
    def no_checkpoint(self) -> str:
        """Why no ordinary checkpoint computes what it does; empty where one can."""
        if "weights" in self.acts_on:
            return "packs the FFN weights"
        return "decides anew for each prompt or token" if self.acts_on - {"width", "mixer", "ffn"} else ""

    def in_words(self) -> str:
        """As a report says it: "griffin 50%"."""
        sparsity = getattr(self, "sparsity", None)
        if isinstance(sparsity, list):
            return f"{self.name} {sum(sparsity) / len(sparsity):.0%} on average"
        return self.name if sparsity is None else f"{self.name} {sparsity:.0%}"

    def __str__(self) -> str:
        """As a recipe's `method` says it, by what differs from the defaults: "teal:0.4:where=attention"."""
        facts = self.model_dump(mode="json", exclude_defaults=True, exclude={"layers", "sparsity"})
        sparsity = getattr(self, "sparsity", None)
        words = [self.name]
        if isinstance(sparsity, float):
            words.append(f"{sparsity:g}")
        elif sparsity is not None:
            words.append(f"{sum(sparsity) / len(sparsity):.3g} mean")
        return ":".join([*words, *(f"{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in facts.items())])


class Sparse(Method):
    """A method with a sparsity."""

    sparsity: Sparsity = 0.5
    """Fraction removed, in (0, 1); a list gives one for each layer the method acts on, in layer order."""

    def by_layer(self, count: int) -> dict[int, Method]:
        indices = self.layer_indices(count)
        if not isinstance(self.sparsity, list):
            return dict.fromkeys(indices, self)
        if len(self.sparsity) != len(indices):
            raise CapreseError(f"{self.name}: {len(self.sparsity)} sparsities were given for {len(indices)} layers")
        return {i: self.model_copy(update={"sparsity": s}) for i, s in zip(indices, self.sparsity, strict=True)}

    @property
    def level(self) -> float:
        """The sparsity of one layer.

        Raises:
            CapreseError: there is a list; ask a method from `by_layer`.
        """
        if isinstance(self.sparsity, list):
            raise CapreseError(f"{self.name} has one sparsity for each layer; ask by_layer(count)[i]")
        return self.sparsity

    def at_batch(self, batch: int) -> Method:
        """What none of the sequences needs is not read: where each chooses for itself, `sparsity` to the power of
        `batch`."""
        if "width" in self.acts_on or getattr(self, "shared_choice", False):
            return self
        powers = [s**batch for s in self.sparsity] if isinstance(self.sparsity, list) else self.sparsity**batch
        return self.model_copy(update={"sparsity": powers})

    def kept(self, width: int) -> int:
        """How many of `width` neurons are kept."""
        return min(width, max(1, round((1 - self.level) * width)))


class FromPrompt(Sparse):
    """A method that chooses from each prompt."""

    shared_choice: bool = False
    """One choice for all sequences of a batch, from their summed statistic: less faithful, and fast for large batches,
    whose separate choices would together need most of the weights again."""

    @property
    def learns(self) -> frozenset[Source]:
        return frozenset({"prompt"})
