"""Base + methods + recovery adapter: what was saved is put on its base again."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Literal

import torch
from peft import PeftModel
from torch import nn

from caprese.adapters.adapter import Adapter
from caprese.adapters.branch import check_unadapted, empty_slots
from caprese.adapters.hub import again
from caprese.adapters.saving import calibration_of, stand_ins_of
from caprese.adapters.sidecar import CONFIG, STAND_INS
from caprese.adapters.student import OneStudent
from caprese.efficient_methods import (
    applied_ffns,
    apply,
    check_reselect,
    drop_dense,
    phases_of,
    remove,
    settle,
    stand_in_parameters,
)
from caprese.efficient_methods.settings import Prefill
from caprese.errors import CapreseError
from caprese.models import unwrap


def load(
    base: str | nn.Module,
    adapter: str | os.PathLike[str] | Adapter,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str = "auto",
    reselect_every: int | Literal["saved"] | None = "saved",
    prefill: Prefill | Literal["saved"] = "saved",
    keep_dense: bool = True,
) -> PeftModel:
    """Base + methods + recovery adapter, ready for `generate`.

    Args:
        base: a model, or the name of one (see `load_base`); of a hub id, the revision the adapter was made for.
        adapter: a directory `save` or `recover` wrote, a hub id, or what `Adapter.open` made of either.
        revision: of the adapter, on the hub.
        reselect_every: generated tokens between two reselections; "saved" as the adapter was made, None never.
        prefill: how prompts run (see `apply`); "saved" as the adapter was made.
        keep_dense: keep the dense weights beside what methods store anew; False calls `drop_dense`.

    Raises:
        CapreseError: wrong base, one with an adapter on it, damaged files, unknown method, or dense weights that
            prompts need and are not to be kept.
    """
    if not isinstance(adapter, Adapter):
        adapter = Adapter.open(adapter, revision)
    methods = adapter.methods
    adapter.weights()  # PEFT reads them again, and asks no digest
    calibration, stand_ins = adapter.calibration(), adapter.stand_ins()
    if isinstance(base, str):
        base, _ = adapter.load_base(base, dtype=dtype, device=device)
    check_unadapted(base)
    adapter.check_base(base)
    every = check_reselect(adapter.sidecar.reselect_every if reselect_every == "saved" else reselect_every)
    prefill = adapter.sidecar.prefill if prefill == "saved" else prefill
    applied = applied_ffns(base)
    if applied and phases_of(base).methods != methods:
        raise CapreseError("another method is applied to this model; caprese.remove(model) first")
    known = calibration_of(applied)
    if applied and not (
        known.keys() == calibration.keys()
        and all(torch.equal(choice, calibration[name].to(choice.dtype)) for name, choice in known.items())
    ):
        raise CapreseError("this method is applied with another calibration; caprese.remove(model) first")
    if applied and any(
        not torch.equal(value, stand_ins[name].to(value.dtype))
        for name, value in stand_ins_of(base).items()
        if name in stand_ins
    ):
        raise CapreseError(
            "this model has what another adapter trained in place of its parts; caprese.remove(model) first"
        )
    if applied and phases_of(base).prefill != prefill:
        raise CapreseError(
            f"prompts run {phases_of(base).prefill} on this model, and {prefill} for {adapter}; "
            "caprese.remove(model) first"
        )
    if not applied:
        apply(base, methods, calibration=calibration, reselect_every=every, prefill=prefill)
    try:
        _check_slots(base, adapter)
        _set_stand_ins(base, stand_ins, adapter)
        model = PeftModel.from_pretrained(base, str(adapter.directory))
        if stand_ins:
            OneStudent.put_on(model, adapter.sidecar.mixers_sha256)
        settle(model)
        unwrap(model).eval()
        if not keep_dense:
            drop_dense(model)
        if applied:
            phases_of(base).reselect(every)
    except BaseException as error:
        empty_slots(base)  # the base goes back as it came
        if not applied:
            remove(base)
        if isinstance(error, CapreseError) or not isinstance(error, Exception):
            raise
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CapreseError(f"{CONFIG} of {adapter} is damaged ({first}); {again(adapter)}") from error
    return model


def _check_slots(model: nn.Module, adapter: Adapter) -> None:
    """PEFT leaves out what finds no slot, and starts a slot without tensors at zero."""
    slots = {f"{name}.recovery" for name in applied_ffns(model)}
    lost, unfilled = adapter.branches.keys() - slots, slots - adapter.branches.keys()
    # who trains with PEFT may leave slots empty: then its configuration says so, and is as it was saved
    if lost or (unfilled and adapter.sidecar.digest is None):
        where = min(lost or unfilled)
        raise CapreseError(
            f"{adapter} has {'a branch for' if lost else 'no branch for'} {where}, and its methods say otherwise; "
            + again(adapter)
        )


def _set_stand_ins(model: nn.Module, saved: Mapping[str, torch.Tensor], adapter: Adapter) -> None:
    with torch.no_grad():
        own = stand_in_parameters(model)
        if own.keys() != saved.keys() or any(own[name].shape != t.shape for name, t in saved.items()):
            raise CapreseError(f"{STAND_INS} of {adapter} does not fit its methods; {again(adapter)}")
        for name, value in saved.items():
            own[name].copy_(value)
