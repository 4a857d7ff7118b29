"""A base's parameters under the names they have in the bare model, whatever stands before them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from caprese.models.families import Family, family_of, unwrap

# on the bare model, while a method is applied
_RECORD = "caprese_parameters"


class _Place(NamedTuple):
    """Where a parameter is: that holds also when the parameter itself is replaced, or a deep copy made."""

    name: str
    group: str
    module: nn.Module
    attribute: str


def record_parameters(model: nn.Module) -> None:
    """Note where a model's parameters are, before anything is put on it."""
    base = unwrap(model)
    setattr(base, _RECORD, list(_places(base)))


def forget_parameters(model: nn.Module) -> None:
    """Undo `record_parameters`."""
    vars(unwrap(model)).pop(_RECORD, None)


def base_parameters(model: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """(name in the bare model, "ffn" | "attention" | "rest", parameter), also while a method or adapter is applied;
    a shared one once."""
    base = unwrap(model)
    seen: set[int] = set()
    for name, group, module, attribute in vars(base).get(_RECORD) or _places(base):
        parameter = getattr(module, attribute)
        if id(parameter) not in seen:
            seen.add(id(parameter))
            yield name, group, parameter


def count_parameters(model: nn.Module) -> int:
    """Parameters of the base model, shared ones counted once, adapters not counted."""
    return sum(parameter.numel() for _, _, parameter in base_parameters(model))


def active_parameters(model: nn.Module) -> int:
    """Weights of the dense base read for one token: an input embedding that is not also the head is looked up."""
    base = unwrap(model)
    embedding, head = base.get_input_embeddings().weight, base.get_output_embeddings().weight
    return count_parameters(model) - (0 if embedding is head else embedding.numel())


def _places(base: Any) -> Iterator[_Place]:
    family = family_of(base.config)
    for name, module, attribute in _walk(base, ""):
        yield _Place(name, _group(name, family), module, attribute)


def _walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module, str]]:
    """Every parameter in the order of `named_parameters`; what PEFT put around a module is passed through."""
    if (around := getattr(module, "get_base_layer", None)) is not None:
        module = around()
    elif hasattr(module, "modules_to_save"):
        module = module.original_module  # type: ignore[assignment]
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield prefix + name, module, name
    for name, child in module._modules.items():
        if child is not None:
            yield from _walk(child, f"{prefix}{name}.")


def _group(name: str, family: Family) -> str:
    if not name.startswith(f"{family.layers}."):
        return "rest"
    part = name[len(family.layers) + 1 :].split(".")[1]
    if part == family.attention[0].split(".")[0]:
        return "attention"
    return "ffn" if part in ((family.ffn,) if family.ffn else (family.up, family.down)) else "rest"
