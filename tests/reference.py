"""What caprese should compute, written from the papers in plain float64: one full pass without a KV cache.

Nothing here comes from caprese but the classes that hold a method's settings. Every token of a sequence is labelled:
prompt tokens are dense and are learned from; completion tokens are efficient, and know the prompt tokens of their own
and of earlier passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import MethodType

import numpy as np
import torch
from families import tiny
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from caprese.efficient_methods import Cats, Griffin, Method, Static, Teal


@dataclass
class Token:
    """One token of a sequence and the pass it went through, by number."""

    id: int
    prompt: bool
    time: int
    column: int = 0
    """Its place in the KV cache, pads counted; the reference does not look at it."""
    weight: int = 1
    """How often it counts in a choice that the batch shares; 0 in a copy of a sequence that was learned from once."""


@dataclass
class Given:
    """What was not learned from prompts."""

    methods: Sequence[Method]
    choices: dict[str, torch.Tensor] = field(default_factory=dict)
    """By "method.layer": static's neurons, the thresholds of TEAL and of calibrated CATS."""
    branches: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    """L [D, r] and R [r, D] by layer."""
    packed: Callable[[torch.Tensor], torch.Tensor] | None = None
    """The rounding of a quantised weight [out, in]."""


# --- A float64 model -------------------------------------------------------------------------------------------------


def _attention(module, query, key, value, attention_mask, scaling=None, softcap=None, **_):
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is not None:
        scores = scores + attention_mask
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register("float64", _attention)
AttentionMaskInterface.register("float64", ALL_MASK_ATTENTION_FUNCTIONS["eager"])


def _rms_norm(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    eps = self.variance_epsilon if hasattr(self, "variance_epsilon") else self.eps
    weight = 1 + self.weight if type(self).__name__.startswith("Gemma") else self.weight
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def float64_model(kind: str) -> PreTrainedModel:
    """A tiny model of a family, and nothing in it computes in less (transformers' norms and softmax are float32)."""
    model = tiny(kind, torch.float64)
    model.set_attn_implementation("float64")
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(_rms_norm, module)
    return model


# --- Its FFNs --------------------------------------------------------------------------------------------------------

ACT: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "relu": lambda x: x.clamp_min(0),
    "gelu": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
}
ACT["gelu_new"] = ACT["gelu_pytorch_tanh"] = ACT["gelu_tanh"]


@dataclass
class Neurons:
    """An FFN with a neuron a row: gate (none in a plain FFN) and up [F, D], down [D, F], with biases."""

    gate: torch.Tensor | None
    gate_bias: torch.Tensor | float
    up: torch.Tensor
    up_bias: torch.Tensor | float
    down: torch.Tensor
    down_bias: torch.Tensor | float
    act: Callable[[torch.Tensor], torch.Tensor]

    def of(self, x: torch.Tensor, x_up: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """a = act(gate(x)) and z = a * up(x)."""
        if self.gate is None:
            a = self.act(x @ self.up.T + self.up_bias)
            return a, a
        a = self.act(x @ self.gate.T + self.gate_bias)
        return a, a * ((x if x_up is None else x_up) @ self.up.T + self.up_bias)

    def out(self, z: torch.Tensor) -> torch.Tensor:
        return z @ self.down.T + self.down_bias

    def only(self, rows: torch.Tensor) -> Neurons:
        def cut(t):
            return t[rows] if isinstance(t, torch.Tensor) else t

        parts = cut(self.gate), cut(self.gate_bias), cut(self.up), cut(self.up_bias)
        return Neurons(*parts, self.down[:, rows], self.down_bias, self.act)

    def rounded(self, packed: Callable[[torch.Tensor], torch.Tensor]) -> Neurons:
        gate = None if self.gate is None else packed(self.gate)
        parts = gate, self.gate_bias, packed(self.up), self.up_bias, packed(self.down)
        return Neurons(*parts, self.down_bias, self.act)


LAYERS = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers", "opt": "model.decoder.layers"}


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    return model.get_submodule(LAYERS.get(model.config.model_type, "model.layers"))


def _bias(linear: nn.Module) -> torch.Tensor | float:
    return 0.0 if linear.bias is None else linear.bias


def neurons(model: PreTrainedModel, layer: nn.Module) -> Neurons:
    kind, config = model.config.model_type, model.config
    if kind == "gpt2":
        up, down = layer.mlp.c_fc, layer.mlp.c_proj
        act = ACT[config.activation_function]
        return Neurons(None, 0.0, up.weight.T, up.bias, down.weight.T, down.bias, act)
    if kind == "gpt_neox":
        up, down = layer.mlp.dense_h_to_4h, layer.mlp.dense_4h_to_h
        return Neurons(None, 0.0, up.weight, up.bias, down.weight, down.bias, ACT[config.hidden_act])
    if kind == "opt":
        up, down = layer.fc1, layer.fc2
        act = ACT[config.activation_function]
        return Neurons(None, 0.0, up.weight, up.bias, down.weight, down.bias, act)
    mlp = layer.mlp
    act = ACT[getattr(config, "hidden_activation", None) or config.hidden_act]
    if kind == "phi3":
        width = config.intermediate_size
        both, down = mlp.gate_up_proj.weight, mlp.down_proj
        return Neurons(both[:width], 0.0, both[width:], 0.0, down.weight, 0.0, act)
    gate, up, down = mlp.gate_proj, mlp.up_proj, mlp.down_proj
    return Neurons(gate.weight, _bias(gate), up.weight, _bias(up), down.weight, _bias(down), act)


def attention_linears(model: PreTrainedModel, layer: nn.Module) -> list[nn.Module]:
    kind = model.config.model_type
    if kind == "gpt2":
        return [layer.attn.c_attn, layer.attn.c_proj]
    if kind == "gpt_neox":
        return [layer.attention.query_key_value, layer.attention.dense]
    own = layer.self_attn
    if kind == "phi3":
        return [own.qkv_proj, own.o_proj]
    return [own.q_proj, own.k_proj, own.v_proj, own.out_proj if kind == "opt" else own.o_proj]


# --- The methods -----------------------------------------------------------------------------------------------------


def griffin_rows(
    z: torch.Tensor,
    weight: torch.Tensor,
    sparsity: float,
    more: torch.Tensor | float = 0.0,
    size: float | torch.Tensor = 1,
) -> torch.Tensor:
    """The k neurons with the largest s_j = || z_ij / ||z_i|| || over tokens i; of equal ones the first. z [n, F].

    `more` is added to s squared, and then it is multiplied by `size` squared.
    """
    norms = z.norm(dim=1, keepdim=True)
    relative = torch.where(norms > 0, z / norms.clamp_min(1e-300), torch.zeros_like(z))
    s = ((relative.square() * weight[:, None]).sum(0) + more).sqrt() * size
    width = z.shape[1]
    k = min(width, max(1, round((1 - sparsity) * width)))
    first = sorted(range(width), key=lambda j: (-float(s[j]), j))[:k]
    return torch.tensor(sorted(first))


def log_quantile(values: np.ndarray, fraction: float) -> np.float32:
    """The value under which floor(fraction * n) of n magnitudes lie, as far as bins can tell: a bin is a float32
    exponent and 6 bits of mantissa, from 2^-40 to 2^24, and values are taken as evenly spread within it."""
    drop = math.floor(fraction * len(values))
    if drop == 0:
        return np.float32(0)
    lowest = (127 - 40) << 6
    bits = np.abs(values).astype(np.float32).view(np.int32)
    bins = np.sort(np.clip((bits >> 17) - lowest, 0, 64 * 64 - 1))
    own = bins[drop]  # the smallest value that stays lies here
    below, count = int((bins < own).sum()), int((bins == own).sum())
    low, high = (np.array([own, own + 1], dtype=np.int32) + lowest << 17).view(np.float32)
    return low + (high - low) * np.float32((drop - below) / count)


def of_layer(method: Method, layer: int, count: int) -> float | None:
    """The sparsity of a method on a layer; None if it does not act there."""
    indices = (
        list(range(count))
        if method.layers == "all"
        else list(range((count + 1) // 2))
        if method.layers == "first-half"
        else sorted(method.layers)
    )
    if layer not in indices:
        return None
    sparsity = getattr(method, "sparsity", 0.0)
    return sparsity[indices.index(layer)] if isinstance(sparsity, list) else sparsity


@dataclass
class Labels:
    """Of tokens [B, T]; pads are neither."""

    prompt: torch.Tensor
    completion: torch.Tensor
    time: torch.Tensor
    weight: torch.Tensor


class ReferenceFFN:
    """One layer."""

    def __init__(self, dense: Neurons, given: Given, layer: int, count: int, labels: Labels) -> None:
        self.dense, self.labels, self.given, self.layer = dense, labels, given, layer
        self.methods = [(m, s) for m in given.methods if (s := of_layer(m, layer, count)) is not None]
        self.rows = next((self._choice(m)[0] for m, _ in self.methods if isinstance(m, Static)), None)
        self.left = dense if self.rows is None else dense.only(self.rows)
        if given.packed is not None and any(m.name in ("nf4", "int8") for m, _ in self.methods):
            self.left = self.left.rounded(given.packed)

    def _choice(self, method: Method) -> torch.Tensor:
        return self.given.choices[f"{method.name}.{self.layer}"]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = x.view(*self.labels.prompt.shape, -1)
        a, z = self.dense.of(x)
        y = self.dense.out(z)
        if not self.methods:
            return y
        if self.rows is not None:
            a, z = a[..., self.rows], z[..., self.rows]
        for b in range(len(x)):
            turns = sorted({int(t) for t in self.labels.time[self.labels.prompt]})
            times = self.labels.time[b]
            for first, end in zip([-1, *turns], [*turns, None], strict=True):
                mine = self.labels.completion[b] & (times >= first)
                if end is not None:
                    mine = mine & (times < end)
                if mine.any():
                    known = self.labels.prompt & (self.labels.time <= first)
                    y[b, mine] = self._efficient(x[b, mine], b, known, a, z)
        return y

    def _known(self, method: Method, b: int, known: torch.Tensor, values: torch.Tensor):
        """What a method has seen: the tokens of its own sequence, or of all, each with its weight."""
        if method.shared_choice:
            return values[known], self.labels.weight[known]
        return values[b][known[b]], torch.ones(int(known[b].sum()), dtype=torch.int64)

    def _efficient(self, x: torch.Tensor, b: int, known: torch.Tensor, a: torch.Tensor, z: torch.Tensor):
        """FF_eff(x) + x L R for x [n, D]; a and z are those of all tokens."""
        gate = up = x
        keeps: list[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = []
        for method, sparsity in self.methods:
            if isinstance(method, Teal) and method.where != "attention":
                limits = self._choice(method)[0].double()
                gate, up = (torch.where(x.abs() >= limit, x, torch.zeros_like(x)) for limit in limits[:2])
                keeps.append(lambda _, own, limit=limits[2]: own.abs() >= limit)
            elif isinstance(method, Griffin):
                more = method.prior * self._choice(method)[0].double() if method.prior else 0.0
                size = self.left.down.norm(dim=0) if method.score == "output" else 1
                rows = griffin_rows(*self._known(method, b, known, z), sparsity, more, size)
                mask = torch.zeros(z.shape[-1], dtype=torch.bool)
                mask[rows] = True
                keeps.append(lambda _, own, mask=mask: mask.expand_as(own))
            elif isinstance(method, Cats):
                if method.threshold == "prompt":
                    values, weight = self._known(method, b, known, a)
                    values = values.repeat_interleave(weight, 0).detach().numpy().flatten()
                    tau = float(log_quantile(values, sparsity))
                else:
                    tau = float(self._choice(method))
                keeps.append(lambda own, _, tau=tau: own.abs() >= tau)
        own_a, own_z = self.left.of(gate, up)
        kept = torch.ones_like(own_z, dtype=torch.bool)
        for keep in keeps:
            kept &= keep(own_a, own_z)
        y = self.left.out(torch.where(kept, own_z, torch.zeros_like(own_z)))
        if self.layer in self.given.branches:
            left, right = self.given.branches[self.layer]
            y = y + x @ left @ right
        return y


@contextmanager
def installed(model: PreTrainedModel, given: Given, labels: Labels):
    """The reference in the place of every FFN, and TEAL's thresholds in front of the attention's linear layers."""
    with ExitStack() as stack:
        layers = layers_of(model)
        for i, layer in enumerate(layers):
            ffn = ReferenceFFN(neurons(model, layer), given, i, len(layers), labels)
            if model.config.model_type == "opt":
                seen: dict[str, torch.Tensor] = {}
                stack.callback(
                    layer.fc1.register_forward_pre_hook(lambda _, args, seen=seen: seen.update(x=args[0])).remove
                )

                def after(_, args, output, seen=seen, ffn=ffn):
                    return ffn(seen["x"]).view(output.shape)

                stack.callback(layer.fc2.register_forward_hook(after).remove)
            else:
                stack.callback(
                    layer.mlp.register_forward_hook(
                        lambda _, args, output, ffn=ffn: ffn(args[0]).view(output.shape)
                    ).remove
                )
            for method in given.methods:
                if not isinstance(method, Teal) or method.where == "ffn" or of_layer(method, i, len(layers)) is None:
                    continue
                limits = given.choices[f"teal.{i}"][0, 3:].double()
                for limit, linear in zip(limits, attention_linears(model, layer), strict=True):

                    def before(_, args, limit=limit):
                        drop = labels.completion[..., None] & (args[0].abs() < limit)
                        return (args[0].masked_fill(drop, 0), *args[1:])

                    stack.callback(linear.register_forward_pre_hook(before).remove)
        yield


@torch.no_grad()
def logits(model: PreTrainedModel, rows: Sequence[Sequence[Token]], given: Given) -> list[torch.Tensor]:
    """The logits of every token, [T, V] for each sequence, by the dense `model` with the reference in it."""
    width = max(len(row) for row in rows)

    def table(value: Callable[[Token], int], dtype: torch.dtype = torch.long) -> torch.Tensor:
        return torch.tensor([[value(t) for t in row] + [0] * (width - len(row)) for row in rows], dtype=dtype)

    labels = Labels(
        table(lambda t: t.prompt, torch.bool),
        table(lambda t: not t.prompt, torch.bool),
        table(lambda t: t.time),
        table(lambda t: t.weight),
    )
    positions = torch.arange(width).expand(len(rows), -1)
    with installed(model, given, labels):
        # pads stand behind, where a causal model cannot see them
        out = model(input_ids=table(lambda t: t.id), position_ids=positions, use_cache=False).logits
    return [out[b, : len(row)] for b, row in enumerate(rows)]
