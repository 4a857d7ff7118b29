"""One linear layer seen from outside: a Linear or Conv1D, one with an adapter on it, or one some library packed."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from caprese.errors import CapreseError

_SIZES = (("in_features", "out_features"), ("infeatures", "outfeatures"), ("nx", "nf"))


def below(module: Any) -> Any:
    """The layer itself, below what PEFT may have put around it."""
    around = getattr(module, "get_base_layer", None)
    return module if around is None else around()


def adapted_layers(model: nn.Module) -> list[Any]:
    """Every module that PEFT has put around another."""
    return [module for module in model.modules() if hasattr(module, "adapter_layer_names")]


def adapter_names(layers: Iterable[Any]) -> set[str]:
    """The names of the adapters on these."""
    return {name for at in layers for kind in at.adapter_layer_names for name in getattr(at, kind)}


def sizes(module: Any) -> tuple[int, int]:
    """Its input and output channels.

    Raises:
        CapreseError: it does not say.
    """
    base = below(module)
    for names in _SIZES:
        found = [getattr(base, name, None) for name in names]
        if all(isinstance(size, int) for size in found):
            return found[0], found[1]  # type: ignore[return-value]
    raise CapreseError(f"{type(base).__name__} is no linear layer that caprese knows; load the base unquantised")


def anchor(module: Any) -> torch.Tensor:
    """The weight, or the first tensor of a packed layer: it tells the device, and the type where that is not packed."""
    base = below(module)
    weight = getattr(base, "weight", None)
    if isinstance(weight, torch.Tensor):
        return weight
    found = next(chain(base.parameters(), base.buffers()), None)
    if found is None:
        raise CapreseError(f"{type(base).__name__} is no linear layer that caprese knows; load the base unquantised")
    return found


def float_type(tensor: torch.Tensor) -> torch.dtype:
    """The type to compute in beside a weight: its own, or float32 where it is packed or of 8 bit."""
    return tensor.dtype if tensor.is_floating_point() and tensor.dtype.itemsize > 1 else torch.float32


def offloaded(module: Any) -> bool:
    """Whether a weight is not where it is computed with: on disk or in CPU memory, and fetched for each call."""
    return any(
        t.is_meta or getattr(getattr(part, "_hf_hook", None), "offload", False)
        for part in module.modules()
        for t in chain(part.parameters(recurse=False), part.buffers(recurse=False))
    )


def why_not_by_row(module: Any) -> str | None:
    """Why the weight cannot be read neuron by neuron, and what to do; None where it can."""
    if below(module) is not module:
        return "carries an adapter that is not merged; merge it first: model = model.merge_and_unload()"
    weight: Any = getattr(module, "weight", None)
    ordinary = type(module).forward in (nn.Linear.forward, Conv1D.forward)
    if not ordinary or type(weight) not in (nn.Parameter, torch.Tensor) or float_type(weight) != weight.dtype:
        return f"is packed ({type(module).__name__}), so that its rows cannot be told apart; load the base unquantised"
    return None


def linear_weights(module: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight [out, in] and bias of a Linear or Conv1D.

    Raises:
        CapreseError: the rows cannot be told apart: the layer is packed, or an adapter is on it.
    """
    if reason := why_not_by_row(module):
        raise CapreseError(f"a linear layer of this model {reason}")
    return (module.weight.T if isinstance(module, Conv1D) else module.weight), module.bias
