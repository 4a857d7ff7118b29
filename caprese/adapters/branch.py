"""The recovery branch x L R: an ordinary PEFT LoRA adapter in the slots of an applied model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from caprese.adapters.lora import lora_config
from caprese.adapters.student import OneStudent
from caprese.efficient_methods import applied_ffns, idle_branches, phases_of, stand_in_parameters, stand_ins
from caprese.errors import CapreseError
from caprese.models import base_of, unwrap

ADAPTER = "default"
# in the names of the branches' parameters, and of no other LoRA's
_BRANCH = ".recovery.lora_"


def attach_adapter(model: nn.Module, ranks: int | Sequence[int], bias: bool = False) -> PeftModel:
    """Fill the slots of an applied model with a trainable branch that starts at zero.

    Args:
        ranks: one rank for all applied layers, or one for each of them.
        bias: also learn a vector [D] per layer (free at inference).

    Raises:
        CapreseError: no method applied, an adapter on the model already, a rank outside 1..D, or the wrong number of
            ranks.
    """
    check_unadapted(model)
    ffns = applied_ffns(model)
    if not ffns:
        raise CapreseError("a recovery adapter needs an applied method: caprese.apply(model, caprese.Griffin()) first")
    each = [ranks] * len(ffns) if isinstance(ranks, int) else list(ranks)
    hidden = next(iter(ffns.values())).view.hidden_size
    if len(each) != len(ffns):
        raise CapreseError(f"{len(each)} ranks were given for {len(ffns)} applied layers")
    for rank in each:
        if not 1 <= rank <= hidden:
            raise CapreseError(f"rank {rank} does not fit a hidden size of {hidden}: choose 1 to {hidden}")
    base = base_of(model)
    with warnings.catch_warnings():
        for known in (".*lora_bias.*", ".*base_model_name_or_path.*renamed.*"):  # both meant
            warnings.filterwarnings("ignore", message=known)
        config = lora_config({f"{name}.recovery": rank for name, rank in zip(ffns, each, strict=True)}, bias)
        config.base_model_name_or_path, config.revision = base.model_id, base.revision
        adapted = get_peft_model(model, config)
    config.base_model_name_or_path = base.model_id
    config.inference_mode = False
    if stand_ins(model):
        OneStudent.put_on(adapted, None)
    return adapted


def check_unadapted(model: nn.Module) -> None:
    """Refuse a model with an adapter on it, for a recovery adapter goes on first.

    Raises:
        CapreseError: naming where it is.
    """
    adapted = [name for name, module in unwrap(model).named_modules() if hasattr(module, "adapter_layer_names")]
    if adapted:
        raise CapreseError(
            f"this model carries an adapter already ({adapted[0]}), and a recovery adapter goes on first: merge it, "
            "model = model.merge_and_unload(), or put it on afterwards, model.load_adapter(directory, adapter_name)"
        )


def empty_slots(model: nn.Module) -> None:
    """Take a half-attached adapter out of the slots of an applied model, so that `remove` can go on."""
    for wrapper in applied_ffns(model).values():
        wrapper.recovery = getattr(wrapper.recovery, "base_layer", wrapper.recovery)


@contextmanager
def without_branches(model: nn.Module) -> Iterator[None]:
    """Inside, the slots add nothing; adapters elsewhere, such as a task's own, stay as they are."""
    off: list[Any] = [
        w.recovery for w in applied_ffns(model).values() if not getattr(w.recovery, "disable_adapters", True)
    ]
    for recovery in off:
        recovery.enable_adapters(False)
    try:
        yield
    finally:
        for recovery in off:
            recovery.enable_adapters(True)


def branch_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What is trained: the parameters of recovery branches and stand-ins, in layer order.

    Branches stay at zero where they have nothing to give back.
    """
    idle = idle_branches(phases_of(model).methods)
    return [p for n, p in _learned(model) if not (idle and _BRANCH in n)]


def get_branches(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the weights of branches and stand-ins by name, on the CPU."""
    return {n: p.detach().cpu().clone() for n, p in _learned(model)}


def _learned(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    own = {id(p) for p in stand_in_parameters(model).values()}
    return [(n, p) for n, p in unwrap(model).named_parameters() if _BRANCH in n or id(p) in own]


def set_branches(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Write back what `get_branches` gave."""
    parameters = dict(unwrap(model).named_parameters())
    with torch.no_grad():
        for name, value in weights.items():
            parameters[name].copy_(value)


def set_branch(recovery: nn.Module, left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    """Put L [D, r], R [r, D] and the bias [D] into one slot's branch."""
    with torch.no_grad():
        recovery.lora_A[ADAPTER].weight.copy_(left.T)  # type: ignore[index, union-attr]
        recovery.lora_B[ADAPTER].weight.copy_(right.T)  # type: ignore[index, union-attr]
        if bias is not None:
            recovery.lora_B[ADAPTER].bias.copy_(bias)  # type: ignore[index, union-attr]
