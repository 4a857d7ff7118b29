"""apply and remove: exact inverses."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from caprese.efficient_methods.base import Method
from caprese.efficient_methods.bases import check_layers
from caprese.efficient_methods.compose import compose
from caprese.efficient_methods.hooks import attach
from caprese.efficient_methods.passes import NO_DENSE, Phases, phases_of
from caprese.efficient_methods.rounded import RoundedModule
from caprese.efficient_methods.settings import Prefill
from caprese.efficient_methods.wrapper import EfficientFFN, RecoverySlot
from caprese.errors import CapreseError
from caprese.models import Site, find_ffns, unwrap
from caprese.models.cache import always_cached
from caprese.models.linear import adapted_layers, adapter_names, below
from caprese.models.parameters import forget_parameters, record_parameters
from caprese.models.residency import resident

M = TypeVar("M", bound=nn.Module)
#: choices made from samples, by "method.layer"
Calibration = Mapping[str, torch.Tensor]


def applied_ffns(model: nn.Module) -> dict[str, EfficientFFN]:
    """The efficient FFNs of a model by module name, in layer order; empty if no method is applied."""
    return {name: m for name, m in unwrap(model).named_modules() if isinstance(m, EfficientFFN)}


def apply(
    model: M,
    methods: Method | Sequence[Method],
    *,
    calibration: Calibration | None = None,
    reselect_every: int | None = None,
    prefill: Prefill = "dense",
) -> M:
    """Put efficient methods on a model, in place; returns the model.

    Generation then runs prompts dense and generated tokens efficient. The model's weights are neither copied nor
    changed (static and quantised methods make their own). What tells the two apart is the KV cache, so a `use_cache` of
    false in the configs is true until `remove`, and `generate(use_cache=False)` says that it runs dense.

    Args:
        methods: one, or several that go together.
        calibration: what `calibrate` returned, for methods that learn from samples.
        reselect_every: generated tokens after which they go through the dense model once, in parallel, and the choice
            is made anew; None never.
        prefill: whether prompts run dense; "efficient": through what is left, as an exported checkpoint runs them; or
            "stored": through all neurons that are not removed for good, in the bits that methods store, for which no
            dense copy is needed.

    Raises:
        CapreseError: an unsupported model, linear layers that a method cannot act on (see `bases.check_layers`),
            layers out of range, methods that do not compose or need dense prompts, calibration missing or made for
            another model, or a method already applied.
    """
    if applied_ffns(model):
        raise CapreseError("a method is already applied to this model; caprese.remove(model) first")
    chosen = compose(methods)
    sites = find_ffns(model)
    layers = methods_by_layer(chosen, len(sites))
    for i, own in layers.items():
        with resident(sites[i].layer):
            check_layers(sites, {i: own})
    facts = {i: _fixed(own, i, sites[i], calibration) for i, own in layers.items()}
    learners = {i: [m for m in own if "prompt" in m.learns] for i, own in layers.items()}
    phases = Phases(chosen, learners)
    phases.reselect(reselect_every)
    phases.run_prompts(prefill)
    record_parameters(model)
    try:
        for i, own in layers.items():
            config = unwrap(model).config
            with resident(sites[i].layer):
                wrapper = EfficientFFN.put_on(sites[i], own, facts[i], phases)
                phases.undo += attention_hooks(sites[i], wrapper)
                phases.undo += [method.install(sites[i], config, phases, facts[i].get(method.name)) for method in own]
        phases.undo += [method.install_head(unwrap(model), phases) for method in chosen]
        phases.undo += attach(unwrap(model), phases)
        phases.undo += always_cached(model)
    except BaseException:  # such as a missing bitsandbytes: the model goes back as it came
        _restore(model, phases)
        raise
    return model


def drop_dense(model: M) -> M:
    """Free the dense weights that methods have stored anew, in place; returns the model.

    There is then no teacher and no way back. What is left in their place has their size, type and device, and holds one
    number, which is none.

    Raises:
        CapreseError: no method is applied, or prompts run dense.
    """
    shared = phases_of(model)
    if shared.dense_prompts:
        raise CapreseError('prompts run dense on this model, with its dense weights; apply with `prefill="stored"`')
    base = unwrap(model)
    spare: list[Any] = [m for m in base.modules() if isinstance(m, RoundedModule)]
    for wrapper in applied_ffns(base).values():
        if wrapper.transformed is not wrapper.view:
            spare += wrapper.view.linears().values()
    for weight in {below(module).weight for module in spare}:
        nothing = torch.full((), torch.nan, dtype=weight.dtype, device=weight.device).expand(weight.shape)
        for at in [m for m in base.modules() if m._parameters.get("weight") is weight]:
            at.weight = nn.Parameter(nothing, requires_grad=False)
    shared.lean = True
    base.register_state_dict_pre_hook(_refuse_to_save)
    return model


def _refuse_to_save(*_: Any) -> None:
    """What stands for the dense weights is never to be saved as weights."""
    raise CapreseError(NO_DENSE)


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
    if not any("attention" in m.acts_on for m in wrapper.methods):
        return []
    hooks = _AttentionHooks(site, wrapper)
    return [site.layer.register_forward_pre_hook(hooks.follow).remove, hooks.remove]


class _AttentionHooks:
    """Hooks before each of an attention's linear layers: what stands there now, also once an adapter is on them."""

    def __init__(self, site: Site, wrapper: EfficientFFN) -> None:
        self.site, self.wrapper = site, wrapper
        self.methods = [m for m in wrapper.methods if "attention" in m.acts_on]
        self.linears: list[nn.Module] = []
        self.handles: list[Any] = []
        self.follow()

    def follow(self, *_: Any) -> None:
        if torch.compiler.is_compiling():
            return
        linears = self.site.attention_linears()
        if len(linears) == len(self.linears) and all(map(operator.is_, linears, self.linears)):
            return
        self.remove()
        self.linears = linears
        for number, linear in enumerate(linears):
            before = functools.partial(_before_attention, self.wrapper, self.methods, number)
            self.handles.append(linear.register_forward_pre_hook(before))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.linears, self.handles = [], []


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
    """Undo `apply` exactly, and take recovery adapters out; what else is on the model stays.

    Returns: the bare transformers model, or `model` itself where it is a PeftModel with other adapters on it.

    Raises:
        CapreseError: no method is applied, or the dense weights were let go.
    """
    wrappers = applied_ffns(model)
    if not wrappers:
        raise CapreseError("no efficient method is applied to this model; nothing to remove")
    if next(iter(wrappers.values())).phases.lean:
        raise CapreseError(NO_DENSE)
    base: Any = unwrap(model)
    slots = [w.recovery for w in wrappers.values()]
    filled = [slot for slot in slots if type(slot) is not RecoverySlot]
    if filled and base is model:
        raise CapreseError("a recovery adapter still sits in this model; give caprese.remove the PeftModel around it")
    others = [layer for layer in adapted_layers(base) if layer not in slots]
    result: Any = model
    if not others and (unload := getattr(model, "unload", None)):
        result = base = unload()
    else:
        for name in adapter_names(filled) - adapter_names(others):
            result.delete_adapter(name)
        for wrapper in wrappers.values():
            wrapper.recovery = below(wrapper.recovery)
        if filled and result.active_adapter not in result.peft_config:
            result.active_adapter = next(iter(result.peft_config))
    _restore(base, next(iter(wrappers.values())).phases)
    return result


def _restore(model: nn.Module, phases: Phases) -> None:
    for wrapper in applied_ffns(model).values():
        wrapper.take_off()
    for undo in phases.undo:
        undo()
    phases.undo.clear()
    forget_parameters(model)
