"""Decoder layers in two calls each on a CPU, where they are of the kind that these compute (`kernels.DecoderLayer`).

What is not weights costs a small model more than its weights do: some forty operations a layer. Which layers are of
that kind is found by trying: their attention is run beside ours on the same numbers.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Hashable, Mapping
from typing import Any, cast

import torch
from torch import nn
from transformers import DynamicCache

from caprese import kernels
from caprese.efficient_methods import EfficientFFN
from caprese.efficient_methods.hooks import mixed
from caprese.efficient_methods.memory import PromptMemory
from caprese.efficient_methods.passes import Pass
from caprese.efficient_methods.rounded import RoundedModule
from caprese.errors import CapreseError
from caprese.inference.fused.step import Step
from caprese.kernels import DecoderLayer, LayerWeights, Projection

_PARTS = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
# where transformers' own hooks are from
_INERT = "transformers.utils.output_capturing"
# how far from the layer's own arithmetic, over the largest value; sums are taken in another order
_WITHIN = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


def plan_of(wrapper: EfficientFFN, rotary: Any) -> Plan | None:
    """Have a decoder layer run whole whenever its FFN's step does; None where it is of another kind."""
    layer: Any = wrapper.site.layer
    step: Step = wrapper.fused
    if not step.in_c or not _looks_alike(layer, wrapper):
        return None
    made = Plan(layer)
    if not made.is_right(rotary):
        return None
    before = type(layer)
    layer.__class__ = mixed(WholeLayer, cast(Hashable, before))
    layer.plan = made
    step.undo.append(functools.partial(_take_off, layer, before))  # no closure: a deep copy then has its own
    return made


def _take_off(layer: Any, before: type) -> None:
    layer.__class__ = before
    del layer.plan


class WholeLayer(nn.Module):
    """Mixed into the class of a decoder layer: one more token runs in two calls."""

    plan: Plan

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        y = None if args or torch.compiler.is_compiling() else self.plan.one_token(hidden_states, **kwargs)
        return super().forward(hidden_states, *args, **kwargs) if y is None else y


class Plan:
    """What C is given of a layer; made anew for a copy of the layer."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.wrapper: Any = layer.mlp
        self.parts = self._parts()
        self.hooks = [hooks for part in self.parts for hooks in (part._forward_hooks, part._forward_pre_hooks)]
        self.dtype: torch.dtype = layer.input_layernorm.weight.dtype
        self.weights: DecoderLayer | None = None
        self.moves = 0
        self.filled: Any = None
        self.whole: Any = None  # the FFN, which holds the tensors, and what C reads of it

    def one_token(
        self,
        x: torch.Tensor,
        attention_mask: Any = None,
        past_key_values: Any = None,
        position_embeddings: Any = None,
        output_attentions: bool | None = False,
        **_: Any,
    ) -> torch.Tensor | None:
        """The layer's output; None where the layer itself is to compute it."""
        current = self.wrapper.phases.current
        if current is None or current.prompt is not None or current.shape[1] != 1 or output_attentions:
            return None
        if past_key_values is None or position_embeddings is None or not _fits(attention_mask, len(x)):
            return None
        if x.dtype != self.dtype or x.device.type != "cpu":
            return None
        if any(t.dtype != self.dtype or t.shape[-1] != self.made().size for t in position_embeddings):
            return None
        if global_hooks() or not self.may_run(len(x)) or not self.follow(current):
            return None
        mask = None if attention_mask is None else attention_mask.flatten(1).contiguous()
        return self._run(x, position_embeddings, past_key_values, mask)

    def may_run(self, batch: int) -> bool:
        """Whether a token of `batch` sequences can run whole here: the layer is still what it was, and nothing looks on
        at its parts."""
        wrapper = self.wrapper
        if wrapper.fused is None or not wrapper.can_decode_fused or self.layer.training or batch > kernels.MAX_BATCH:
            return False
        if self._parts() != self.parts or any("forward" in vars(part) for part in self.parts):
            return False
        return not any(map(look_on, self.hooks))

    def follow(self, current: Pass) -> bool:
        """Take over the choice and the branch of this pass; whether one call is enough for them."""
        wrapper, step = self.wrapper, self.wrapper.fused
        if self.moves != step.moves:
            self.weights, self.moves = None, step.moves
        step.follow(current.memory.layer(wrapper.layer), current.shape[0])
        if self.filled != (step, step.fills):
            whole = step.whole()
            self.whole = None if whole is None else (whole, whole.structure(self.dtype))
            self.filled = step, step.fills
        return self.whole is not None

    def _parts(self) -> list[Any]:
        """The modules whose place it takes, the attention's linear layers first."""
        own, inside = self.layer._modules, self.layer.self_attn._modules
        return [*(inside[name] for name in PROJECTIONS), *(own[name] for name in _PARTS)]

    def __deepcopy__(self, memo: dict[int, Any]) -> Plan:
        copied = copy.copy(self)
        memo[id(self)] = copied
        for name in ("layer", "wrapper", "parts", "hooks"):
            setattr(copied, name, copy.deepcopy(getattr(self, name), memo))
        copied.weights = copied.filled = copied.whole = None  # addresses, which are not its own
        return copied

    def made(self) -> DecoderLayer:
        if self.weights is None:
            attention, layer = self.layer.self_attn, self.layer
            norms = layer.input_layernorm, layer.post_attention_layernorm
            q, k, v, o = (_projection(getattr(attention, name)) for name in PROJECTIONS)
            weights = LayerWeights(
                q,
                k,
                v,
                o,
                norm=norms[0].weight,
                ffn_norm=norms[1].weight,
                eps=(norms[0].variance_epsilon, norms[1].variance_epsilon),
                size=attention.head_dim,
                scaling=attention.scaling,
            )
            self.weights = DecoderLayer(weights, self.dtype)
        return self.weights

    def _run(self, x: torch.Tensor, turned: tuple[torch.Tensor, torch.Tensor], cache: Any, mask: Any) -> torch.Tensor:
        """x [B, 1, D] -> [B, 1, D], with the token's keys and values added to the cache."""
        weights = self.made()
        x = x.contiguous()
        q, k, v = weights.begin(x, *turned)
        keys, values = cache.update(k, v, self.layer.self_attn.layer_idx)
        keys, values = (
            t.to(self.dtype) if t.stride(-1) == 1 else t.to(self.dtype).contiguous() for t in (keys, values)
        )
        if mask is not None and mask.shape[1] != keys.shape[2]:
            raise CapreseError(f"the attention mask is of {mask.shape[1]} tokens and the cache of {keys.shape[2]}")
        return weights.end(x, q, keys, values, mask, self.whole[1])

    @torch.no_grad()
    def is_right(self, rotary: Any) -> bool:
        """Whether the layer's attention and norms compute what ours do."""
        layer, dtype, batch = self.layer, self.dtype, 2
        generator = torch.Generator().manual_seed(0)
        size = layer.self_attn.q_proj.in_features
        ours, theirs = DynamicCache(), DynamicCache()
        phases, index = layer.mlp.phases, layer.self_attn.layer_idx
        try:
            weights = self.made()
            for token in range(3):
                x = torch.randn(batch, 1, size, generator=generator).to(dtype)
                turned = rotary(x, torch.tensor([[token], [token + 5]]))
                current = Pass(None, torch.ones(batch, 1, dtype=torch.bool), PromptMemory({}), (batch, 1), token)
                with phases.within(current):
                    wanted = layer.self_attn(
                        hidden_states=layer.input_layernorm(x),
                        position_embeddings=turned,
                        attention_mask=None,
                        past_key_values=theirs,
                    )[0]
                q, k, v = weights.begin(x, *turned)
                got = weights.end(x, q, *ours.update(k, v, index))
                if not close(got, x + wanted):
                    return False
            norm = layer.post_attention_layernorm
            return close(norm(x), rms_normed(norm, x))
        except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError):
            return False  # another kind of layer


def look_on(hooks: Mapping[int, Any]) -> bool:
    """Whether a hook among them sees what a module does. Those that transformers leaves once hidden states were asked
    for see nothing where they are not."""
    return any(getattr(hook, "__module__", "") != _INERT for hook in hooks.values())


def global_hooks() -> bool:
    """Whether there are hooks on all modules."""
    everywhere = nn.modules.module
    return bool(everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks)


def rms_normed(norm: Any, x: torch.Tensor) -> torch.Tensor:
    """x [..., D] as C norms it."""
    wide = x.float()
    by: torch.Tensor = norm.weight.float()
    return (by * wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.variance_epsilon)).to(x.dtype)


def _fits(mask: Any, batch: int) -> bool:
    """Whether it is a mask as C reads them, bool [B or 1, 1, 1, S], or none."""
    if mask is None:
        return True
    plain = isinstance(mask, torch.Tensor) and mask.dtype == torch.bool and mask.dim() == 4
    return plain and mask.shape[1:3] == (1, 1) and len(mask) in (1, batch)


def close(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    if got.shape != wanted.shape:
        return False
    return bool((got.float() - wanted.float()).abs().max() <= _WITHIN[got.dtype] * wanted.float().abs().max())


def _looks_alike(layer: Any, wrapper: EfficientFFN) -> bool:
    """Whether a layer has the parts, and nothing that runs beside them."""
    if {name for name, _ in layer.named_children()} != set(_PARTS) or layer.mlp is not wrapper:
        return False
    attention = layer.self_attn
    if {name for name, _ in attention.named_children()} != set(PROJECTIONS):
        return False
    if layer.input_layernorm.weight.dtype not in _WITHIN:
        return False
    linears = [getattr(attention, name) for name in PROJECTIONS]
    for linear in linears:
        rounded = isinstance(linear, RoundedModule) and nn.Linear in type(linear).__bases__
        if not rounded and (type(linear) is not nn.Linear or linear.weight.dtype != layer.input_layernorm.weight.dtype):
            return False
    parts = [attention, layer.mlp, layer.input_layernorm, layer.post_attention_layernorm, *linears]
    return not any(part._forward_pre_hooks or part._forward_hooks or "forward" in vars(part) for part in parts)


def _projection(linear: Any) -> Projection:
    return Projection(linear.rounded if isinstance(linear, RoundedModule) else linear.weight, linear.bias)
