"""Products, whole FFNs and their shapes as C reads them; see `kernels.native`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch

from caprese.kernels.native import call, library

__all__ = ["ACTIVATIONS", "FFN", "Weight", "bits_of", "call", "library", "products", "run_ffn", "sums", "whole_ffn"]

#: activations that the whole FFN knows, as `ffn.h` counts them
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


def products(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """x [B, C] -> [B, k]; see `kernels.quantized.products`."""
    count, columns = len(codes) if rows is None else len(rows), x.shape[1]
    dtype = x.dtype
    x, kind = _plain(x)
    y = x.new_empty(len(x), count)
    where = codes.data_ptr(), scales.data_ptr(), _address(rows)
    call("caprese_products", _BITS[codes.dtype], *where, count, columns, x.data_ptr(), y.data_ptr(), kind, len(x))
    return y if y.dtype == dtype else y.to(dtype)


def sums(z: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """z [B, k] -> [B, C]; see `kernels.quantized.sums`."""
    bits = _BITS[codes.dtype]
    columns = codes.shape[1] * (2 if bits == 4 else 1)
    dtype = z.dtype
    z, kind = _plain(z)
    y = z.new_empty(len(z), columns)
    where = codes.data_ptr(), scales.data_ptr(), _address(rows)
    call("caprese_sums", bits, *where, z.shape[1], columns, z.data_ptr(), y.data_ptr(), kind, len(z))
    return y if y.dtype == dtype else y.to(dtype)


def whole_ffn(x: torch.Tensor, *ffn: Any) -> torch.Tensor:
    """x [B, D] -> [B, D]; ffn: `kernels.quantized.WholeFFN.arguments`."""
    dtype = x.dtype
    x, kind = _plain(x)
    y = run_ffn(x, FFN.of(ffn, kind))
    return y if y.dtype == dtype else y.to(dtype)


def run_ffn(x: torch.Tensor, whole: FFN) -> torch.Tensor:
    """x [B, D] of the type that C reads -> [B, D]."""
    y = torch.empty_like(x)
    call("caprese_ffn", ctypes.addressof(whole), x.data_ptr(), y.data_ptr(), len(x))
    return y


class Weight(ctypes.Structure):
    """`weight` of codes.h."""

    _fields_ = (
        ("bits", ctypes.c_int),
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("columns", ctypes.c_long),
        ("first", ctypes.c_long),
    )

    @classmethod
    def of(
        cls, codes: torch.Tensor, scales: torch.Tensor | None, rows: torch.Tensor | None = None, first: int = 0
    ) -> Weight:
        bits = _BITS[codes.dtype]
        columns = codes.shape[1] * (2 if bits == 4 else 1)
        return cls(bits, codes.data_ptr(), _address(scales), _address(rows), columns, first)


class FFN(ctypes.Structure):
    """`ffn` of ffn.h."""

    _fields_ = (
        *((name, Weight) for name in ("gate", "up", "down", "left", "right")),
        *((name, ctypes.c_long) for name in ("count", "rank", "apart")),
        *((name, ctypes.c_int) for name in ("gated", "act", "type", "across")),
        *((name, ctypes.c_void_p) for name in ("bias", "keep", "threshold", "last")),
        ("width", ctypes.c_long),
    )

    @classmethod
    def of(cls, arguments: Sequence[Any], kind: int, across: bool = False) -> FFN:
        """arguments: of `kernels.quantized.WholeFFN`, to live as long as this; kind: bits of the inputs' type."""
        codes, scales, beside, *second, rows, bias, keep, threshold, left, right, last, act, gated = arguments
        first: tuple[torch.Tensor, torch.Tensor | None] = codes, scales
        width = second[0].shape[1] if across else len(second[0])
        gate = Weight.of(*first, rows)
        up = Weight.of(*first, rows, width) if beside is None else Weight.of(beside, None, rows)
        branch = [Weight() if part is None else Weight.of(part, None) for part in (left, right)]
        count, rank = width if rows is None else len(rows), 0 if left is None else len(left)
        apart = 0 if threshold is None or threshold.numel() == 1 else 1
        more = _address(bias), _address(keep), _address(threshold), _address(last)
        down = Weight.of(second[0], second[1], rows)
        return cls(gate, up, down, *branch, count, rank, apart, gated, act, kind, across, *more, width)


_BITS = {torch.uint8: 4, torch.int8: 8, torch.bfloat16: 16, torch.float32: 32}


def bits_of(dtype: torch.dtype) -> int:
    """How C tells types apart."""
    return _BITS[dtype]


def _plain(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Inputs as C reads them, and their bits."""
    if x.dtype == torch.bfloat16:
        return x.contiguous(), 16
    return x.float().contiguous(), 32


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
