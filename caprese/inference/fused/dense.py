"""The dense model's own layers over a few tokens in one call on a CPU: what verifies drafts.

torch's products of a few rows take up to twice as long as of one, though the weights are read once; and between them
there is Python. In float32 alone, where sums taken in another order differ in the last bits and no more.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from caprese import kernels
from caprese.efficient_methods.rounded import RoundedModule
from caprese.inference.fused.layer import PROJECTIONS, Plan, close, global_hooks, look_on
from caprese.kernels import DecoderLayer, DecoderLayers, LayerWeights, Projection, WholeFFN

_LANES = 16
# what layers and norms compute with beside their tensors
_NUMBERS = ("variance_epsilon", "scaling", "head_dim")


class DenseLayers:
    """Layers as the base model has them, whose weights are read where they lie.

    Attributes:
        made: what C is given; None until it is needed, and again when what it was made of changed.
        copies: biases that C reads under one another, and what they are copies of.
        of: the modules, and the places and versions of the tensors, that it was made of.
    """

    def __init__(self, plans: Sequence[Plan]) -> None:
        self.plans = list(plans)
        self.made: DecoderLayers | None = None
        self.of: list[Any] = []
        self.copies: list[tuple[torch.Tensor, list[torch.Tensor]]] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> DenseLayers:
        return DenseLayers(copy.deepcopy(self.plans, memo))

    def layers(self, norm: Any, rotary: Any) -> DecoderLayers | None:
        """What C is given, up to date; None where it is not for these layers, or something looks on at them."""
        if global_hooks():
            return None
        modules = [module for plan in self.plans for module in self._modules(plan)]
        if any(_changed(module) for module in modules):
            return None
        tensors = [t for module in [*modules, norm] for t in module._parameters.values() if t is not None]
        tensors += [t for t in rotary._buffers.values() if t is not None]
        numbers = [getattr(module, name, None) for module in [*modules, norm] for name in _NUMBERS]
        versions = [0 if t.is_inference() else t._version for t in tensors]
        of = [*modules, *map(type, modules), norm, rotary, *numbers, *map(torch.Tensor.data_ptr, tensors), *versions]
        if self.of != of:
            self.made, self.of = self._make(norm), of
        for copied, parts in self.copies:  # may have changed in place, which is not always counted
            torch.cat([part.detach() for part in parts], out=copied)
        return self.made

    def _modules(self, plan: Plan) -> list[Any]:
        layer, ffn = plan.layer, plan.wrapper.view
        attention = layer.self_attn
        own = [layer.input_layernorm, layer.post_attention_layernorm, *(getattr(attention, n) for n in PROJECTIONS)]
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
            norms = layer.input_layernorm, layer.post_attention_layernorm
            if any(getattr(each, "variance_epsilon", None) is None for each in (*norms, norm)):
                return None
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


def _changed(module: Any) -> bool:
    """Whether something looks on at a module, or runs in its place."""
    hooks = module._forward_hooks, module._forward_pre_hooks
    return any(map(look_on, hooks)) or "forward" in vars(module) or module.training
