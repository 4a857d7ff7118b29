"""What a method trains in the place of a part of the model, and how it is told apart from the rest.

The part itself stays, for the teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from caprese.efficient_methods.tokens import Tokens
from caprese.models import find_ffns, unwrap
from caprese.models.residency import resident


class Acting(Protocol):
    """What a stand-in is told of the pass that runs: as much of `passes.Phases` as it looks at."""

    dense: bool
    """Whether the teacher runs."""
    current: Any
    """Which tokens are prompt and which completion (`passes.Pass`); None where that does not matter."""

    def acts_on(self, layer: int) -> bool:
        """Whether a layer acts now."""
        ...


class StandInWeights(NamedTuple):
    """How many weights there are of what stands in for a part of a layer."""

    trained: int
    read: int
    """By a token, what stays of the part among them."""
    spared: int
    """Of the part itself."""


class StandIn(nn.Module):
    """Called as the original is; runs what is trained in its place, or the original where the layer is not to act."""

    layer: int
    lost: tuple[str, ...] = ()
    """What of the original is not in its place, in a report's words."""

    @property
    def original(self) -> nn.Module:
        """The model's own module."""
        raise NotImplementedError

    @property
    def trained(self) -> nn.Module:
        """What is trained, and saved beside the adapter."""
        raise NotImplementedError

    @property
    def reads(self) -> int:
        """Weights that a token reads of it, in the place of `original`'s."""
        return sum(p.numel() for p in self.trained.parameters())

    def rate_of(self, name: str) -> float:
        """At which part of the learning rate a parameter of `trained` learns."""
        return 1.0

    def untrained(self) -> AbstractContextManager[None]:
        """Inside, it is what it is compared with, which needs no training."""
        raise NotImplementedError

    def settle(self, dtype: torch.dtype) -> None:
        """Nothing is to be trained any more: take the type in which it is to run beside a base of `dtype`."""

    def shown(self) -> AbstractContextManager[None]:
        """Inside, modules of the model that learned beside it have what they learned for their parameters."""
        return nullcontext()

    def checkpoint_settings(self, config: Any) -> dict[str, Any]:
        """What it adds to the config of a checkpoint that holds it (see `Method.checkpoint`), of a base of `config`.

        Raises:
            CapreseError: such a checkpoint cannot.
        """
        raise NotImplementedError

    def checkpoint_state(self) -> dict[str, torch.Tensor]:
        """Its parameters by their names in a layer of that checkpoint."""
        raise NotImplementedError


@dataclass(frozen=True)
class Objective:
    """What stand-ins learn before all that is trained is trained end to end."""

    name: str
    """Of the stage."""
    epochs: int
    """Passes over the samples."""
    error: Callable[[nn.Module, Tokens], torch.Tensor]
    """What is made small, of the applied model and samples: relative squared errors by layer, [layers]."""
    what: str
    """Whose error it is, in a report's words."""
    alone: bool
    """Whether every stand-in learns beside the dense model, and no gradient goes from layer to layer."""


def stand_ins(model: nn.Module) -> list[StandIn]:
    """The stand-ins of a model, in layer order."""
    return [m for m in unwrap(model).modules() if isinstance(m, StandIn)]


def stand_in_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What of them is trained and saved, by "layer.name"."""
    return {f"{at.layer}.{name}": p for at in stand_ins(model) for name, p in at.trained.named_parameters()}


def settle(model: nn.Module) -> None:
    """Have stand-ins run in the type of the model they stand in; see `StandIn.settle`."""
    for at in stand_ins(model):
        at.settle(unwrap(model).dtype)


@contextmanager
def untrained(model: nn.Module) -> Iterator[None]:
    """Inside, stand-ins are what they are compared with, which needs no training."""
    sites = find_ffns(model)
    with ExitStack() as stack:
        for at in stand_ins(model):
            with resident(sites[at.layer].layer):  # they are made of what they replace
                stack.enter_context(at.untrained())
        yield
