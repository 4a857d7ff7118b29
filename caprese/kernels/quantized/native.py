"""What runs on a CPU in C, products and the steps of mixers: compiled once for a machine by its C compiler.

Plain C on vectors, called by address: no header of torch's is compiled, so it takes some ten seconds and is kept in
the cache directory. It runs on the OpenMP that torch has loaded, and with as many threads as torch.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from caprese.files import cache_dir

_HERE = Path(__file__).parent
SOURCES = (_HERE / "rows.c", _HERE / "layer.c", _HERE.parent / "scan" / "step.c")
_HEADERS = (_HERE / "codes.h", _HERE / "whole.h", _HERE / "products.h", _HERE / "ffn.h")
_FLAGS = ("-O3", "-fopenmp", "-shared", "-fPIC", "-std=gnu11")
_LIBRARIES = ("-lm",)
#: activations that the whole FFN knows, as `ffn.h` counts them
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


def _processor() -> str:
    """What tells machines apart for which other code is made."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


@functools.cache
def library() -> Any:
    """The compiled functions; None where there is no compiler, or it fails."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or platform.system() == "Windows":
        return None
    tuned = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    command = [*compiler.split(), *_FLAGS, tuned]
    facts = "\n".join([*(file.read_text() for file in (*_HEADERS, *SOURCES)), *command, *_LIBRARIES, _processor()])
    at = cache_dir() / "kernels" / f"rows-{hashlib.sha256(facts.encode()).hexdigest()[:16]}.so"
    try:
        if not at.exists():
            at.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=at.parent) as apart:
                made = Path(apart) / at.name
                whole = [*command, "-x", "c", "-", "-o", str(made), *_LIBRARIES]
                both = "".join(f'#include "{source}"\n' for source in SOURCES)  # once, what they share
                subprocess.run(whole, check=True, capture_output=True, timeout=300, input=both.encode())
                made.replace(at)
        found = ctypes.CDLL(str(at))
    except (OSError, subprocess.SubprocessError):
        return None
    p, i, n = ctypes.c_void_p, ctypes.c_int, ctypes.c_long
    for function in (found.caprese_products, found.caprese_sums):
        function.argtypes = [i, p, p, p, n, n, p, p, i, n]
    found.caprese_ffn.argtypes = [p, p, p, n]
    found.caprese_layer_begin.argtypes = [p, p, p, p, n, p, p, p, n, n]
    found.caprese_layer_end.argtypes = [p, p, p, p, p, p, n, p, n, p, n]
    found.caprese_convolve.argtypes = [p, p, p, p, n, n, n, i]
    found.caprese_step.argtypes = [p, p, p, p, p, p, p, n, n, n, n]
    found.caprese_layers.argtypes = [p, n, p, ctypes.c_float, p, p, p, n, n, p, n, p, n, n]
    return found


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


def call(name: str, *arguments: float | None) -> None:
    """Run a function of the library.

    Raises:
        MemoryError: there was none.
    """
    if getattr(library(), name)(*arguments):
        raise MemoryError("no memory for one token's products")
