"""FFNs and norms that learn beside the mixers, while the model's own weights stay for the teacher.

Each linear layer and norm computes with weights of its own where its layer acts: the model's, and what training made of
them. They are kept in float32 as mixers are, at a fraction of whose learning rate they are trained.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from caprese.models import Site

#: of the mixers' learning rate
RATE = 0.1


class Owner(Protocol):
    """Who has the weights."""

    def own(self, name: str) -> Mapping[str, torch.Tensor] | None:
        """Those of a module by its name in the decoder layer; None where the model's are to be used."""
        ...


class Thawed(nn.Module):
    """Mixed into the class of a linear layer or a norm."""

    own_class: ClassVar[type[nn.Module]]
    by: tuple[Owner, str]

    @staticmethod
    def put_on(module: nn.Module, owner: Owner, name: str) -> Callable[[], None]:
        """Have a module compute with what `owner` has of it; returns the undoing."""
        self: Any = module
        before: Any = type(self)
        self.__class__ = _thawed(before)
        vars(self)["by"] = (owner, name)  # and the owner is no module of it

        def undo() -> None:
            self.__class__ = before
            del vars(self)["by"]

        return undo

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        owner, name = self.by
        own = owner.own(name)
        if own is None:
            return super().forward(*args, **kwargs)
        with _replaced(self, own):
            return super().forward(*args, **kwargs)

    @contextmanager
    def shown(self, own: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Inside, it is an ordinary module with these parameters."""
        thawed, self.__class__ = type(self), self.own_class  # type: ignore[assignment]
        try:
            with _replaced(self, own):
                yield
        finally:
            self.__class__ = thawed


@contextmanager
def _replaced(module: Any, own: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Inside, a module's parameters are others, in its own type."""
    known = module._parameters
    module._parameters = {n: own[n].to(p.dtype) if n in own else p for n, p in known.items()}
    try:
        yield
    finally:
        module._parameters = known


@functools.cache
def _thawed(kind: Hashable) -> type[Thawed]:
    """The class of a module of this kind, thawed."""
    assert isinstance(kind, type)
    return type(kind.__name__, (Thawed, kind), {"__module__": kind.__module__, "own_class": kind})


def parts_of(site: Site) -> dict[str, nn.Module]:
    """The linear layers of a layer's FFN and its norms, by name in the decoder layer."""
    linears = {site.path(part): module for part, module in site.ffn.linears().items()}
    mine = {id(module) for module in linears.values()}
    norms = {
        name: module
        for name, module in site.layer.named_children()
        if module is not site.ffn.module and name != site.attention_name and id(module) not in mine
        if any(True for _ in module.parameters(recurse=False))
    }
    return {**linears, **norms}


def key_of(name: str, parameter: str) -> str:
    """What a parameter is called among those of a mixer, which take no dots."""
    return f"{name}.{parameter}".replace(".", "/")


def copies_of(parts: Mapping[str, nn.Module]) -> nn.ParameterDict:
    """What is trained of these modules, as it starts."""
    made = nn.ParameterDict()
    for name, module in parts.items():
        for own, parameter in module.named_parameters(recurse=False):
            made[key_of(name, own)] = nn.Parameter(parameter.detach().float().clone(), requires_grad=False)
            made[key_of(name, own)].relative_rate = RATE
    return made
