"""The products on a CPU: `rows.c`, compiled once for a machine by its C compiler.

Plain C on vectors, called by address: no header of torch's is compiled, so it takes two seconds and is kept in the
cache directory. It runs on the OpenMP that torch has loaded, and with as many threads as torch.
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
from pathlib import Path
from typing import Any

import torch

from caprese.files import cache_dir

SOURCE = Path(__file__).parent / "rows.c"
# sums may be taken in another order; not -ffast-math, which would round denormals to zero in the whole process
_FLAGS = (
    "-O3",
    "-fassociative-math",
    "-fno-signed-zeros",
    "-fno-trapping-math",
    "-fopenmp",
    "-shared",
    "-fPIC",
    "-std=gnu11",
)


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
    facts = "\n".join([SOURCE.read_text(), *command, _processor()])
    at = cache_dir() / "kernels" / f"rows-{hashlib.sha256(facts.encode()).hexdigest()[:16]}.so"
    try:
        if not at.exists():
            at.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=at.parent) as apart:
                made = Path(apart) / at.name
                subprocess.run([*command, str(SOURCE), "-o", str(made)], check=True, capture_output=True, timeout=120)
                made.replace(at)
        found = ctypes.CDLL(str(at))
    except (OSError, subprocess.SubprocessError):
        return None
    for function in (found.caprese_products, found.caprese_sums):
        function.argtypes = [
            ctypes.c_int,
            *[ctypes.c_void_p] * 3,
            *[ctypes.c_long] * 2,
            *[ctypes.c_void_p] * 2,
            ctypes.c_long,
        ]
    found.caprese_products.restype, found.caprese_sums.restype = None, ctypes.c_int
    return found


def products(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """x [B, C] -> [B, k]; see `kernels.quantized.products`."""
    wide = x.to(torch.float32).contiguous()
    count = len(codes) if rows is None else len(rows)
    y = torch.empty(len(x), count)
    library().caprese_products(*_arguments(codes, scales, rows, count, wide.shape[1], wide, y))
    return y.to(x.dtype)


def sums(z: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """z [B, k] -> [B, C]; see `kernels.quantized.sums`."""
    wide = z.to(torch.float32).contiguous()
    columns = codes.shape[1] * (1 if codes.dtype == torch.int8 else 2)
    y = torch.empty(len(z), columns)
    if library().caprese_sums(*_arguments(codes, scales, rows, wide.shape[1], columns, wide, y)):
        raise MemoryError("no memory for one token's sums")
    return y.to(z.dtype)


def _arguments(
    codes: torch.Tensor,
    scales: torch.Tensor,
    rows: torch.Tensor | None,
    count: int,
    columns: int,
    x: torch.Tensor,
    y: torch.Tensor,
) -> tuple[int | None, ...]:
    bits = 8 if codes.dtype == torch.int8 else 4
    where = None if rows is None else rows.data_ptr()
    return bits, codes.data_ptr(), scales.data_ptr(), where, count, columns, x.data_ptr(), y.data_ptr(), len(x)
