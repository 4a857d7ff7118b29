"""FFNs and norms that learn beside the mixers, while the model's own weights stay for the teacher.

Each linear layer and norm computes with weights of its own where its layer acts: the model's, and what training made of
them. They are kept in float32 as mixers are, at a fraction of whose learning rate they are trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from caprese.efficient_methods.hooks import mixed
from caprese.models import Site

#: of the mixers' learning rate; arXiv 2512.20569 has 0.07, and it was tuned on nothing here
RATE = 0.1


class Owner(Protocol):
    """Who has the weights."""

    def own(self, name: str) -> Mapping[str, torch.Tensor] | None:
        """Those of a module by its name in the decoder layer; None where the model's are to be used."""
        ...


class Thawed(nn.Module):
    """Mixed into the class of a linear layer or a norm.

    Attributes:
        by: the owner, which is no module of it, the name it has there, its own class, and the `forward` that accelerate
            set on it, if it did.
    """

    by: tuple[Owner, str, type[nn.Module], Any]

    @staticmethod
    def put_on(module: nn.Module, owner: Owner, name: str) -> None:
        """Have a module compute with what `owner` has of it."""
        self: Any = module
        kind: Any = type(self)
        hooked = vars(self).pop("forward", None)
        self.__class__ = mixed(Thawed, kind)
        vars(self)["by"] = owner, name, kind, hooked

    def take_off(self) -> None:
        """Undo `put_on`."""
        *_, kind, hooked = vars(self).pop("by")
        self.__class__ = kind
        if hooked is not None:
            vars(self)["forward"] = hooked

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        owner, name, _, hooked = self.by
        forward = super().forward if hooked is None else hooked
        own = owner.own(name)
        if own is None:
            return forward(*args, **kwargs)
        module: Any = self
        known = module._parameters  # at every token, where a context manager is most of the time
        module._parameters = {n: own[n].to(p.dtype) if n in own else p for n, p in known.items()}
        try:
            return forward(*args, **kwargs)
        finally:
            module._parameters = known

    @contextmanager
    def shown(self, own: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Inside, it is an ordinary module with these parameters."""
        self_: Any = self
        thawed, self_.__class__ = type(self), self.by[2]
        try:
            with _replaced(self, own):
                yield
        finally:
            self_.__class__ = thawed


@contextmanager
def _replaced(module: Any, own: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Inside, a module's parameters are others, in its own type."""
    known = module._parameters
    module._parameters = {n: own[n].to(p.dtype) if n in own else p for n, p in known.items()}
    try:
        yield
    finally:
        module._parameters = known


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
    return nn.ParameterDict(
        {
            key_of(name, own): nn.Parameter(parameter.detach().float().clone(), requires_grad=False)
            for name, module in parts.items()
            for own, parameter in module.named_parameters(recurse=False)
        }
    )
