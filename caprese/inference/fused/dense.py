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
from caprese.inference.fused.layer import Plan, close, global_hooks, look_on
from caprese.kernels import DecoderLayer, DecoderLayers, LayerWeights, Projection, WholeFFN

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_LANES = 16


class DenseLayers:
    """Layers as the base model has them, whose weights are read where they lie.

    Attributes:
        made: what C is given; None until it is needed, and again when what it was made of changed.
        of: the tensors and modules that it was made of.
        never: whether these layers are of another kind.
    """

    def __init__(self, plans: Sequence[Plan]) -> None:
        self.plans = list(plans)
        self.made: DecoderLayers | None = None
        self.of: list[Any] = []
        self.never = False

    def __deepcopy__(self, memo: dict[int, Any]) -> DenseLayers:
        return DenseLayers(copy.deepcopy(self.plans, memo))

    def layers(self, norm: Any) -> DecoderLayers | None:
        """What C is given, up to date; None where it is not for these layers, or something looks on at them."""
        if self.never or global_hooks():
            return None
        modules = [module for plan in self.plans for module in self._modules(plan)]
        if any(_changed(module) for module in modules):
            return None
        tensors = [t for module in [*modules, norm] for t in module._parameters.values() if t is not None]
        of = [*modules, *(t.data_ptr() for t in tensors)]
        if self.made is None or self.of != of:
            self.made, self.of = self._make(norm), of
            self.never = self.made is None
        return self.made

    def _modules(self, plan: Plan) -> list[Any]:
        layer, ffn = plan.layer, plan.wrapper.view
        attention = layer.self_attn
        own = [layer.input_layernorm, layer.post_attention_layernorm, *(getattr(attention, n) for n in _PROJECTIONS)]
        return [*own, *ffn.linears().values(), attention, plan.wrapper]

    @torch.no_grad()
    def _make(self, norm: Any) -> DecoderLayers | None:
        made: list[DecoderLayer] = []
        ffns: list[WholeFFN] = []
        for plan in self.plans:
            layer, ffn = plan.layer, plan.wrapper.view
            attention, linears = layer.self_attn, ffn.linears()
            q, k, v, o = (getattr(attention, name) for name in _PROJECTIONS)
            several = [q, k, v, o, *linears.values()]
            if any(not isinstance(at, nn.Linear) or at.weight.dtype != torch.float32 for at in several):
                return None
            act = kernels.activation_name(ffn.act)
            if ffn.fused or ffn.width % _LANES or act is None or not plan.layer.input_layernorm.weight.is_cpu:
                return None
            if not kernels.runs_whole(torch.empty(1, ffn.hidden_size), act):
                return None
            norms = layer.input_layernorm, layer.post_attention_layernorm
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
        layers = DecoderLayers(made, norm.weight, norm.variance_epsilon)
        for i, ffn in enumerate(ffns):
            layers.put_ffn(i, (ffn, ffn.structure(torch.float32)))
        return layers if self._is_right(ffns) else None

    def _is_right(self, ffns: list[WholeFFN]) -> bool:
        """Whether a layer's FFN computes what its module does; the rest was compared when layers were planned."""
        view = self.plans[0].wrapper.view
        x = torch.randn(2, view.hidden_size, generator=torch.Generator().manual_seed(0))
        return close(kernels.few_tokens(x, ffns[0]), view.down(view.neurons(x)[1]))


def _whole(linears: dict[str, Any], act: str) -> WholeFFN:
    up, down, gate = linears["up"], linears["down"], linears.get("gate")
    bias = None
    if up.bias is not None:
        bias = up.bias.float() if gate is None else torch.cat([gate.bias, up.bias]).float()
    last = None if down.bias is None else down.bias.float()
    first, beside = (up.weight, None) if gate is None else (gate.weight, up.weight)
    # detached: a tensor with gradients would be copied elsewhere
    return WholeFFN(
        first.detach(),
        down.weight.detach(),
        act,
        gate is not None,
        None if beside is None else beside.detach(),
        bias=bias,
        last=last,
        across=True,
    )


def _projection(linear: nn.Linear) -> Projection:
    return Projection(linear.weight, linear.bias)


def _changed(module: Any) -> bool:
    """Whether something looks on at a module, or runs in its place."""
    hooks = module._forward_hooks, module._forward_pre_hooks
    return any(map(look_on, hooks)) or "forward" in vars(module) or module.training
