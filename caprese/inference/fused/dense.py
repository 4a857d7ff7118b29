"""The dense model's own layers over a few tokens in one call on a CPU: what verifies drafts.

torch's products of a few rows take up to twice as long as of one, though the weights are read once; and between them
there is Python. In float32 alone, where sums taken in another order differ in the last bits and no more.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from caprese import kernels
from caprese.efficient_methods.rounded import RoundedModule
from caprese.inference.fused.layer import PROJECTIONS, Plan, close, look_on
from caprese.kernels import DecoderLayer, DecoderLayers, LayerWeights, Projection, WholeFFN

_LANES = 16
# what attention and norms compute with beside their tensors
_SCALING, _EPSILON = attrgetter("scaling", "head_dim"), attrgetter("variance_epsilon")
_TRAINING, _SHAPE = attrgetter("training"), attrgetter("shape")


class DenseLayers:
    """Layers as the base model has them, whose weights are read where they lie.

    Attributes:
        made: what C is given; None until it is needed, and again when what it was made of changed.
        copies: biases that C reads under one another, and what they are copies of.
        of: the modules, and the places and versions of the tensors, that it was made of.
        flat: what may have changed since, in flat lists; None where C is not for these layers as they are.
        facts: what was in them when all of it was last gone through.
    """

    def __init__(self, plans: Sequence[Plan]) -> None:
        self.plans = list(plans)
        self.made: DecoderLayers | None = None
        self.of: list[Any] = []
        self.copies: list[tuple[torch.Tensor, list[torch.Tensor]]] = []
        self.flat: _Flat | None = None
        self.facts: list[Any] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> DenseLayers:
        return DenseLayers(copy.deepcopy(self.plans, memo))

    def layers(self, norm: Any, rotary: Any) -> DecoderLayers | None:
        """What C is given, up to date; None where it is not for these layers, or something looks on at them."""
        if self.flat is None or self.flat.facts(norm, rotary) != self.facts:
            self._go_through(norm, rotary)
        if self.flat is None:
            return None
        for copied, parts in self.copies:  # may have changed in place, which is not always counted
            torch.cat([part.detach() for part in parts], out=copied)
        return self.made

    def _go_through(self, norm: Any, rotary: Any) -> None:
        """Look at all that matters, and make anew what is not up to date."""
        self.flat = self.facts = None
        modules = [module for plan in self.plans for module in self._modules(plan)]
        norms = [norm, *(each for plan in self.plans for each in _norms(plan.layer))]
        known = all(getattr(each, "variance_epsilon", None) is not None for each in norms)
        if not known or any(map(_changed, modules)):
            return
        flat = _Flat(self.plans, [*modules, norm], rotary)
        facts = flat.facts(norm, rotary)
        of = [*modules, *flat.given(norm, rotary)]
        if self.of != of:
            self.made, self.of = self._make(norm), of
        self.flat, self.facts = flat, facts

    def _modules(self, plan: Plan) -> list[Any]:
        layer, ffn = plan.layer, plan.wrapper.view
        attention = layer.self_attn
        own = [*_norms(layer), *(getattr(attention, n) for n in PROJECTIONS)]
        act = ffn.part("act")
        return [*own, *ffn.linears().values(), *([act] if isinstance(act, nn.Module) else []), attention, plan.wrapper]

    @torch.no_grad()
    def _make(self, norm: Any) -> DecoderLayers | None:
        self.copies = []
        made: list[DecoderLayer] = []
        ffns: list[WholeFFN] = []
        for plan in self.plans:
            layer, ffn = plan.layer, plan.wrapper.view
            attention, linears = layer.self_attn, ffn.linears()
            q, k, v, o = (getattr(attention, name) for name in PROJECTIONS)
            several = [q, k, v, o, *linears.values()]
            by_row = [at for at in several if at is not linears["down"]]
            if not all(map(_plain, several)) or not all(at.weight.is_contiguous() for at in by_row):
                return None
            act = kernels.activation_name(ffn.act)
            if ffn.fused or ffn.width % _LANES or act is None or not plan.layer.input_layernorm.weight.is_cpu:
                return None
            if not kernels.runs_whole(torch.empty(1, ffn.hidden_size), act):
                return None
            norms = _norms(layer)
            weights = LayerWeights(
                _projection(q),
                _projection(k),
                _projection(v),
                _projection(o),
                norm=norms[0].weight,
                ffn_norm=norms[1].weight,
                eps=(norms[0].variance_epsilon, norms[1].variance_epsilon),
                size=attention.head_dim,
                scaling=attention.scaling,
            )
            made.append(DecoderLayer(weights, torch.float32))
            ffns.append(_whole(linears, act))
            if "gate" in linears and ffns[-1].bias is not None:
                self.copies.append((ffns[-1].bias, [linears["gate"].bias, linears["up"].bias]))
        layers = DecoderLayers(made, norm.weight, norm.variance_epsilon)
        for i, ffn in enumerate(ffns):
            layers.put_ffn(i, (ffn, ffn.structure(torch.float32)))
        return layers if self._is_right(ffns) else None

    def _is_right(self, ffns: list[WholeFFN]) -> bool:
        """Whether FFNs compute what their modules do; the rest was compared when layers were planned."""
        for plan, ffn in zip(self.plans, ffns, strict=True):
            view = plan.wrapper.view
            x = torch.randn(2, view.hidden_size, generator=torch.Generator().manual_seed(0))
            if not close(kernels.few_tokens(x, ffn), view.down(view.neurons(x)[1])):
                return False
        return True


class _Flat:
    """What may change between two passes: all of it has to come from memory each time, so it is few, flat lists."""

    def __init__(self, plans: Sequence[Plan], modules: Sequence[Any], rotary: Any) -> None:
        """modules: those that C computes in place of, the last norm behind them."""
        layers = [plan.layer for plan in plans]
        self.modules = modules
        self.attention = [layer.self_attn for layer in layers]
        self.norms = [*(norm for layer in layers for norm in _norms(layer)), modules[-1]]
        ffns = [plan.wrapper for plan in plans]
        within = [*layers, *self.attention, *ffns, *(ffn.view.module for ffn in ffns)]
        self.places = [part._modules for part in within]
        self.hooks = [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self.homes = [*(module._parameters for module in modules), rotary._buffers]
        # held, so that no other comes to lie there
        self.tensors = self._tensors()

    def _tensors(self) -> list[torch.Tensor]:
        return [t for home in self.homes for t in home.values() if t is not None]

    def given(self, norm: Any, rotary: Any) -> list[Any]:
        """What C was made of."""
        tensors = self._tensors()
        return [
            norm,
            rotary,
            getattr(rotary, "attention_scaling", None),
            [*map(type, self.modules)],
            [*map(_SCALING, self.attention)],
            [*map(_EPSILON, self.norms)],
            [*map(id, tensors)],
            [*map(torch.Tensor.data_ptr, tensors)],
            [*map(_SHAPE, tensors)],
            [*map(torch.Tensor.stride, tensors)],
            [0 if t.is_inference() else t._version for t in tensors],
        ]

    def facts(self, norm: Any, rotary: Any) -> list[Any]:
        """What is equal in two passes if nothing changed between them that C has to be told of, or kept from."""
        return [
            [*map(_TRAINING, self.modules)],
            ["forward" in own for own in map(vars, self.modules)],
            [*map(len, self.hooks)],
            [*map(list, map(dict.values, self.places))],
            *self.given(norm, rotary),
        ]


def _whole(linears: dict[str, Any], act: str) -> WholeFFN:
    up, down, gate = linears["up"], linears["down"], linears.get("gate")
    bias = None
    if up.bias is not None:
        bias = up.bias.float() if gate is None else torch.cat([gate.bias, up.bias]).float()
    last = None if down.bias is None else down.bias.float()
    first, beside = (up.weight, None) if gate is None else (gate.weight, up.weight)
    second = down.weight.detach()  # with gradients it would be copied elsewhere
    across = second.is_contiguous()  # else it lies by neuron, for steps that read it in place
    return WholeFFN(
        first.detach(),
        second if across else second.T,
        act,
        gate is not None,
        None if beside is None else beside.detach(),
        bias=bias,
        last=last,
        across=across,
    )


def _plain(linear: Any) -> bool:
    """Whether a linear layer is nothing else, in float32, and lies by row, or the other way round."""
    rounded = isinstance(linear, RoundedModule) and nn.Linear in type(linear).__bases__
    if not rounded and type(linear) is not nn.Linear:
        return False
    weight = linear.weight
    return weight.dtype == torch.float32 and (weight.is_contiguous() or weight.T.is_contiguous())


def _projection(linear: nn.Linear) -> Projection:
    return Projection(linear.weight, linear.bias)


def _norms(layer: Any) -> tuple[Any, Any]:
    return layer.input_layernorm, layer.post_attention_layernorm


def _changed(module: Any) -> bool:
    """Whether something looks on at a module, or runs in its place."""
    hooks = module._forward_hooks, module._forward_pre_hooks
    return any(map(look_on, hooks)) or "forward" in vars(module) or module.training
