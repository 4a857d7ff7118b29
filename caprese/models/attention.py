"""An attention layer's weights seen from outside, however its family spells them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from caprese.errors import CapreseError
from caprese.models.linear import linear_weights


@dataclass(frozen=True)
class Attention:
    """What softmax attention is made of, one row an output channel.

    q [H d, D], k and v [G d, D], out [D, H d], with H query heads, G key and value heads, d channels a head. `scaling`
    is what q k is multiplied by. `lost` names what is not in these weights.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor
    q_bias: torch.Tensor | None
    k_bias: torch.Tensor | None
    v_bias: torch.Tensor | None
    out_bias: torch.Tensor | None
    heads: int
    groups: int
    head_dim: int
    scaling: float
    lost: tuple[str, ...] = field(default=())
    norms: tuple[nn.Module, nn.Module] | None = None
    """Of queries and keys, where they are read apart from the rows."""
    rotate: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None
    """Rope: (q, k, cos, sin, unsqueeze_dim=1) -> q and k [B, H, T, d], where it is read."""
    sliding: int | None = None
    """Tokens that a token sees, where that is not all."""
    cap: float | None = None
    """Of the scores before softmax, if they have one."""

    @property
    def weights(self) -> int:
        """How many there are, biases of q, k and v included."""
        parts = self.q, self.k, self.v, self.out, self.q_bias, self.k_bias, self.v_bias
        return sum(t.numel() for t in parts if t is not None)

    def of(self, heads: Sequence[int]) -> Attention:
        """These heads alone, each with keys and values of its own.

        Raises:
            CapreseError: norms over all heads at once, which no part of them can have.
        """
        if self.norms is not None and self.norms[0].get_parameter("weight").numel() != self.head_dim:
            raise CapreseError("queries and keys of this model are normed over all heads, so that none can stand alone")
        own = [head * self.groups // self.heads for head in heads]
        parts: dict[str, Any] = {}
        for name, which in (("q", heads), ("k", own), ("v", own), ("q_bias", heads), ("k_bias", own), ("v_bias", own)):
            rows = getattr(self, name)
            if rows is not None:
                parts[name] = rows.unflatten(0, (-1, self.head_dim))[list(which)].flatten(0, 1)
        parts["out"] = self.out.unflatten(1, (-1, self.head_dim))[:, list(heads)].flatten(1)
        return replace(self, heads=len(heads), groups=len(heads), **parts)


def read_attention(module: nn.Module, config: Any, rope: bool = False) -> Attention:
    """The weights of one attention module of a supported family.

    Args:
        rope: also read how queries and keys are normed and rotated. Without it, norms become part of the rows by their
            weights; that they normalise, and rope, are among `lost`.

    Raises:
        CapreseError: packed weights, or an attention that is none of the known ones.
    """
    m: Any = module
    head_dim = getattr(m, "head_dim", None) or getattr(m, "head_size", None)
    if not head_dim:
        raise CapreseError(f"{type(m).__name__} is no attention that caprese knows")
    if hasattr(m, "q_proj"):
        (q, qb), (k, kb), (v, vb) = (linear_weights(getattr(m, f"{n}_proj")) for n in "qkv")
        out, ob = linear_weights(m.o_proj if hasattr(m, "o_proj") else m.out_proj)
    elif hasattr(m, "qkv_proj"):
        whole, bias = linear_weights(m.qkv_proj)
        out, ob = linear_weights(m.o_proj)
        groups = (len(whole) - out.shape[1]) // 2
        q, k, v = whole.split([out.shape[1], groups, groups])
        qb, kb, vb = (None,) * 3 if bias is None else bias.split([out.shape[1], groups, groups])
    elif hasattr(m, "c_attn"):
        whole, bias = linear_weights(m.c_attn)
        q, k, v = whole.chunk(3)
        qb, kb, vb = (None,) * 3 if bias is None else bias.chunk(3)
        out, ob = linear_weights(m.c_proj)
    elif hasattr(m, "query_key_value"):  # by head: its q, k and v rows
        whole, bias = linear_weights(m.query_key_value)
        q, k, v = (t.flatten(0, 1) for t in whole.unflatten(0, (-1, 3, head_dim)).unbind(1))
        qb, kb, vb = (
            (None,) * 3 if bias is None else (t.flatten() for t in bias.unflatten(0, (-1, 3, head_dim)).unbind(1))
        )
        out, ob = linear_weights(m.dense)
    else:
        raise CapreseError(f"{type(m).__name__} is no attention that caprese knows")
    lost = []
    rows = {"q": (q, qb), "k": (k, kb)}
    norms = (m.q_norm, m.k_norm) if rope and getattr(m, "q_norm", None) is not None else None
    for name, (weight, bias) in rows.items():
        norm = getattr(m, f"{name}_norm", None)
        if norm is not None and norms is None:
            size = norm.weight.numel()
            factor = norm(torch.ones(size, dtype=weight.dtype, device=weight.device))
            factor = factor.repeat(len(weight) // size)
            rows[name] = (weight * factor[:, None], None if bias is None else bias * factor)
            lost.append(f"{name}_norm (its weights are kept)")
    (q, qb), (k, kb) = rows["q"], rows["k"]
    rotate = None
    if getattr(config, "rope_parameters", None) and getattr(m, "use_rope", True):
        rotate = getattr(sys.modules[type(m).__module__], "apply_rotary_pos_emb", None) if rope else None
        if rotate is None:
            lost.append("rope")
    everywhere = None if getattr(config, "layer_types", None) else getattr(config, "sliding_window", None)
    sliding = getattr(m, "sliding_window", everywhere) or None
    if sliding:
        lost.append("sliding window")
    cap = getattr(m, "attn_logit_softcapping", None)
    if cap:
        lost.append("soft cap")
    scaling = getattr(m, "scaling", None)
    scaling = head_dim**-0.5 if scaling is None else float(scaling)
    sizes = len(q) // head_dim, len(k) // head_dim, head_dim
    return Attention(q, k, v, out, qb, kb, vb, ob, *sizes, scaling, tuple(lost), norms, rotate, sliding, cap)
