"""apply and remove: exact inverses."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from caprese.efficient_methods.base import Method
from caprese.efficient_methods.phases import Phases
from caprese.efficient_methods.wrapper import EfficientFFN, RecoverySlot
from caprese.errors import CapreseError
from caprese.models import find_ffns, unwrap

M = TypeVar("M", bound=nn.Module)


def applied_ffns(model: nn.Module) -> dict[str, EfficientFFN]:
    """The wrapped FFNs of a model by module name, in layer order; empty if no method is applied."""
    return {name: m for name, m in unwrap(model).named_modules() if isinstance(m, EfficientFFN)}


def apply(model: M, method: Method) -> M:
    """Put an efficient method on a model's FFNs, in place; returns the model.

    Generation then runs prompts dense and generated tokens efficient. Weights are neither copied nor changed.

    Raises:
        CapreseError: an unsupported model, layers out of range, or a method already applied.
    """
    if applied_ffns(model):
        raise CapreseError("a method is already applied to this model; caprese.remove(model) first")
    sites = find_ffns(model)
    phases = Phases()
    for i in method.layer_indices(len(sites)):
        site = sites[i]
        wrapper = EfficientFFN(site.ffn, method, phases, i)
        wrapper.train(site.ffn.module.training)
        setattr(site.parent, site.attribute, wrapper)
    phases.attach(unwrap(model).get_decoder())
    return model


def remove(model: nn.Module) -> nn.Module:
    """Undo `apply` exactly; a PeftModel around it is unloaded first. Returns the bare transformers model.

    Raises:
        CapreseError: no method is applied.
    """
    wrappers = applied_ffns(model)
    if not wrappers:
        raise CapreseError("no efficient method is applied to this model; nothing to remove")
    if unload := getattr(model, "unload", None):
        model = unload()
    base = unwrap(model)
    if any(type(w.recovery) is not RecoverySlot for w in wrappers.values()):
        raise CapreseError("a recovery adapter still sits in this model; give caprese.remove the PeftModel around it")
    for name, wrapper in wrappers.items():
        parent, _, attribute = name.rpartition(".")
        setattr(base.get_submodule(parent), attribute, wrapper.ffn)
        wrapper.phases.detach()
    return base
