"""apply and remove: exact inverses."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from caprese.efficient_methods.base import Method
from caprese.efficient_methods.compose import compose
from caprese.efficient_methods.hooks import attach
from caprese.efficient_methods.mamba import Mamba, Replacement
from caprese.efficient_methods.passes import Phases
from caprese.efficient_methods.wrapper import EfficientFFN, RecoverySlot
from caprese.errors import CapreseError
from caprese.models import Site, find_ffns, unwrap

M = TypeVar("M", bound=nn.Module)
#: choices made from samples, by "method.layer"
Calibration = Mapping[str, torch.Tensor]


def applied_ffns(model: nn.Module) -> dict[str, EfficientFFN]:
    """The wrapped FFNs of a model by module name, in layer order; empty if no method is applied."""
    return {name: m for name, m in unwrap(model).named_modules() if isinstance(m, EfficientFFN)}


def apply(
    model: M,
    methods: Method | Sequence[Method],
    *,
    calibration: Calibration | None = None,
    reselect_every: int | None = None,
) -> M:
    """Put efficient methods on a model, in place; returns the model.

    Generation then runs prompts dense and generated tokens efficient. The model's weights are neither copied nor
    changed (static and quantised methods make their own).

    Args:
        methods: one, or several that go together.
        calibration: what `calibrate` returned, for methods that learn from samples.
        reselect_every: generated tokens after which they go through the dense model once, in parallel, and the choice
            is made anew; None never.

    Raises:
        CapreseError: an unsupported model, layers out of range, methods that do not compose, calibration missing or
            made for another model, or a method already applied.
    """
    if applied_ffns(model):
        raise CapreseError("a method is already applied to this model; caprese.remove(model) first")
    chosen = compose(methods)
    sites = find_ffns(model)
    layers = methods_by_layer(chosen, len(sites))
    facts = {i: _fixed(own, i, sites[i], calibration) for i, own in layers.items()}
    learners = {i: [m for m in own if "prompt" in m.learns] for i, own in layers.items()}
    phases = Phases(chosen, learners)
    phases.reselect(reselect_every)
    try:
        for i, own in layers.items():
            wrapper = EfficientFFN(sites[i], own, facts[i], phases)
            wrapper.train(sites[i].layer.training)
            sites[i].replace(wrapper)
            phases.undo += attention_hooks(sites[i], wrapper)
            for method in own:
                if isinstance(method, Mamba):
                    phases.undo.append(put_mixer(sites[i], unwrap(model).config, method, phases))
        phases.undo += attach(unwrap(model), phases)
    except BaseException:  # such as a missing bitsandbytes: the model goes back as it came
        _restore(model, phases)
        raise
    return model


def put_mixer(site: Site, config: Any, method: Mamba, phases: Phases) -> Callable[[], None]:
    """A mixer in place of a layer's attention; returns the undoing."""
    if method.selected == "sensitivity":
        raise CapreseError(
            "mamba:selected=sensitivity is measured by caprese recover; here, give keep_attention the layers"
        )
    attention = site.attention()
    replacement = Replacement(site, config, method, phases)
    replacement.train(site.layer.training)
    setattr(site.layer, site.attention_name, replacement)
    return functools.partial(setattr, site.layer, site.attention_name, attention)


def methods_by_layer(methods: Sequence[Method], count: int) -> dict[int, list[Method]]:
    """What acts on each layer of a model of `count` layers, in order."""
    each = [method.by_layer(count) for method in methods]
    return {i: [own[i] for own in each if i in own] for i in range(count) if any(i in own for own in each)}


def _fixed(methods: list[Method], layer: int, site: Site, calibration: Calibration | None) -> dict[str, torch.Tensor]:
    """The choices of one layer that were made from samples."""
    fixed = {}
    width = site.ffn.width
    for method in methods:
        if "samples" not in method.learns:
            continue
        choice = None if calibration is None else calibration.get(f"{method.name}.{layer}")
        if choice is None:
            raise CapreseError(
                f"{method.name} chooses from samples and has none for layer {layer}: "
                "caprese.apply(model, methods, calibration=caprese.calibrate(model, methods, rows))"
            )
        if not method.fits(choice, width, len(site.attention_linears())):
            raise CapreseError(
                f"this calibration of {method.name} was made for another model or with other settings; calibrate again "
                "with these: caprese.calibrate(model, methods, rows)"
            )
        fixed[method.name] = choice.to(site.ffn.device)
        if "width" in method.acts_on:
            width = choice.shape[-1]
    return fixed


def attention_hooks(site: Site, wrapper: EfficientFFN) -> list[Callable[[], None]]:
    """Let methods that act on attention change what its linear layers see of generated tokens; returns the undoing."""
    undo: list[Callable[[], None]] = []
    methods = [m for m in wrapper.methods if "attention" in m.acts_on]
    if not methods:
        return undo

    for number, linear in enumerate(site.attention_linears()):
        undo.append(
            linear.register_forward_pre_hook(functools.partial(_before_attention, wrapper, methods, number)).remove
        )
    return undo


def _before_attention(
    wrapper: EfficientFFN, methods: list[Method], number: int, _: nn.Module, args: tuple[Any, ...]
) -> tuple[Any, ...] | None:
    decodes = wrapper.phases.compiled and torch.compiler.is_compiling()
    current = wrapper.phases.current
    if not decodes and (current is None or current.completion is None or not wrapper.phases.acts_on(wrapper.layer)):
        return None
    x = args[0]
    for method in methods:
        x = method.attention_input(x, number, getattr(wrapper, f"fixed_{method.name}", None))
    if current is not None and current.prompt is not None:
        assert current.completion is not None
        x = torch.where(current.completion.unsqueeze(-1), x, args[0])
    return (x, *args[1:])


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
    _restore(base, next(iter(wrappers.values())).phases)
    return base


def _restore(model: nn.Module, phases: Phases) -> None:
    for wrapper in applied_ffns(model).values():
        if wrapper.fused is not None:
            wrapper.fused.restore()
        wrapper.site.restore()
    for undo in phases.undo:
        undo()
    phases.undo.clear()
