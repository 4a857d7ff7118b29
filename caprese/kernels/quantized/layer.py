"""Decoder layers of the Llama kind on a CPU: all that one more token needs, in two calls of compiled C, or one for all.

x + attention(norm(x)), then that + FFN(norm(that)); norms by root mean square, positions by rotation of halves, queries
in groups. Between the two calls the caller adds keys and values to its cache; with one, it makes room for them before.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from caprese.kernels.quantized import native
from caprese.kernels.quantized.codes import QuantizedRows


class Projection(NamedTuple):
    """A linear layer."""

    weight: QuantizedRows | torch.Tensor
    bias: torch.Tensor | None


class LayerWeights(NamedTuple):
    """Of a decoder layer with H heads of `size`, and K of keys and values."""

    q: Projection
    """[H size, D]"""
    k: Projection
    """[K size, D]"""
    v: Projection
    o: Projection
    """[D, H size]"""
    norm: torch.Tensor
    """[D]"""
    ffn_norm: torch.Tensor
    eps: tuple[float, float]
    """Of both norms."""
    size: int
    scaling: float
    """Of scores."""


class _Layer(ctypes.Structure):
    """`layer` of layer.c."""

    _fields_ = (
        *((name, native.Weight) for name in "qkvo"),
        *((name, ctypes.c_void_p) for name in ("q_bias", "k_bias", "v_bias", "o_bias", "norm", "ffn_norm")),
        *((name, ctypes.c_long) for name in ("heads", "kv_heads", "size")),
        *((name, ctypes.c_float) for name in ("eps", "ffn_eps", "scaling")),
        ("type", ctypes.c_int),
    )


class _States(ctypes.Structure):
    """`states` of layer.c."""

    _fields_ = (("start", ctypes.c_void_p), *((name, ctypes.c_long) for name in ("sequence", "head", "token")))

    @classmethod
    def of(cls, states: torch.Tensor) -> _States:
        """Keys or values [B, K, S, size]."""
        return cls(states.data_ptr(), *states.stride()[:3])


class _One(ctypes.Structure):
    """`one` of layer.c."""

    _fields_ = (("at", ctypes.c_void_p), ("inside", ctypes.c_void_p), ("keys", _States), ("values", _States))


class DecoderLayer:
    """The weights of a layer, as C reads them. They are read where they lie, and held."""

    def __init__(self, weights: LayerWeights, dtype: torch.dtype) -> None:
        """dtype: of inputs, outputs, keys and values: float32 or bfloat16."""
        q, k, v, o, norm, ffn_norm, eps, size, scaling = weights
        self.dtype, self.size, self.columns = dtype, size, norm.numel()
        self.heads, self.kv_heads = len(q.weight) // size, len(k.weight) // size
        self._held: list[Any] = []
        rows = [native.Weight.of(*self._hold(each.weight)) for each in (q, k, v, o)]
        vectors = [self._vector(t) for t in (q.bias, k.bias, v.bias, o.bias, norm, ffn_norm)]
        kind = native.bits_of(dtype)
        self._layer = _Layer(*rows, *vectors, self.heads, self.kv_heads, size, *eps, scaling, kind)
        self._address = ctypes.addressof(self._layer)

    def _hold(self, weight: QuantizedRows | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        pair = (weight.codes, weight.scales) if isinstance(weight, QuantizedRows) else (weight.detach(), None)
        self._held += pair  # a module or parameter that is moved lets go of what it had
        return pair

    def _vector(self, values: torch.Tensor | None) -> int | None:
        if values is None:
            return None
        self._held.append(values.detach().float().contiguous())
        return int(self._held[-1].data_ptr())

    def begin(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x [B, 1, D], cos and sin [B or 1, 1, size] -> q [B, H, 1, size], k and v [B, K, 1, size]."""
        batch, cos, sin = len(x), cos.contiguous(), sin.contiguous()
        q = x.new_empty(batch, self.heads, 1, self.size)
        k, v = x.new_empty(batch, self.kv_heads, 1, self.size), x.new_empty(batch, self.kv_heads, 1, self.size)
        apart = self.size if len(cos) > 1 else 0
        where = x.data_ptr(), cos.data_ptr(), sin.data_ptr()
        new = [_States.of(t) for t in (k, v)]
        out = q.data_ptr(), *map(ctypes.addressof, new)
        native.call("caprese_layer_begin", self._address, *where, apart, *out, 0, batch)
        return q, k, v

    def end(
        self,
        x: torch.Tensor,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor | None = None,
        ffn: native.FFN | None = None,
    ) -> torch.Tensor:
        """The layer's output [B, 1, D].

        Args:
            x, q: as in `begin`.
            keys, values: [B, K, S, size], any strides but the last's.
            mask: bool [B or 1, S]: what of them is seen.
            ffn: without, the sum that the FFN's norm would see.
        """
        y = torch.empty_like(x)
        states = [_States.of(t) for t in (keys, values)]
        apart = 0 if mask is None or len(mask) == 1 else mask.stride(0)
        native.call(
            "caprese_layer_end",
            self._address,
            None if ffn is None else ctypes.addressof(ffn),
            x.data_ptr(),
            q.data_ptr(),
            *map(ctypes.addressof, states),
            keys.shape[2],
            None if mask is None else mask.data_ptr(),
            apart,
            y.data_ptr(),
            len(x),
        )
        return y


def _gone() -> None:
    """A reference to nothing."""


class DecoderLayers:
    """Layers that follow one another and the norm behind them, in one call."""

    def __init__(self, layers: Sequence[DecoderLayer], norm: torch.Tensor, eps: float) -> None:
        """
        Args:
            layers: of the same sizes and type.
            norm, eps: of what is behind them, [D].
        """
        self.layers = list(layers)
        self._norm, self._eps = norm.detach().float().contiguous(), eps
        self._each = (_One * len(layers))()
        for one, layer in zip(self._each, self.layers, strict=True):
            one.at = layer._address
        self._ffns: list[Any] = [None] * len(layers)  # what is read there lives as long
        self._states: list[Any] = []
        self.forget()

    def put_ffn(self, index: int, ffn: tuple[Any, native.FFN]) -> None:
        """What runs in a layer from now on: what holds the tensors, and what C reads of it."""
        self._ffns[index], self._each[index].inside = ffn, ctypes.addressof(ffn[1])

    def forget(self) -> None:
        """Know no keys and values."""
        self._states = [(_gone, _gone)] * len(self.layers)

    def knows(self, index: int, keys: torch.Tensor, values: torch.Tensor) -> bool:
        """Whether these are what `put_states` was given last."""
        known = self._states[index]
        return known[0]() is keys and known[1]() is values

    def put_states(self, index: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Where a layer's keys and values [B, K, S or more, size] lie from now on; they are not held."""
        one, self._states[index] = self._each[index], (weakref.ref(keys), weakref.ref(values))
        one.keys, one.values = _States.of(keys), _States.of(values)

    def run(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        tokens: int,
        mask: torch.Tensor | None = None,
        span: int = 1,
    ) -> torch.Tensor:
        """x [B, 1, D], cos and sin [B or 1, 1, size] -> [B, 1, D].

        Args:
            tokens: S, how many keys and values there are of those put last, which live; the last of them are written.
            mask: bool [B or 1, S].
            span: tokens of each sequence that are read at once: B is then `span` times the number of sequences, those
                of one following one another, and keys, values and mask are of the sequences.
        """
        y, cos, sin = torch.empty_like(x), cos.contiguous(), sin.contiguous()
        native.call(
            "caprese_layers",
            ctypes.addressof(self._each),
            len(self.layers),
            self._norm.data_ptr(),
            self._eps,
            x.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            cos.shape[-1] if len(cos) > 1 else 0,
            tokens,
            None if mask is None else mask.data_ptr(),
            0 if mask is None or len(mask) == 1 else mask.stride(0),
            y.data_ptr(),
            len(x),
            span,
        )
        return y
