"""What runs on a CPU in C: compiled once for a machine by its C compiler.

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
from pathlib import Path
from typing import Any

import torch

from caprese.files import cache_dir

_HERE = Path(__file__).parent
_QUANTIZED = _HERE / "quantized"
SOURCES = (_QUANTIZED / "rows.c", _QUANTIZED / "layer.c", _HERE / "scan" / "step.c", _HERE / "near.c")
_HEADERS = tuple(_QUANTIZED / name for name in ("codes.h", "whole.h", "products.h", "ffn.h"))
_FLAGS = ("-O3", "-fopenmp", "-shared", "-fPIC", "-std=gnu11")
_LIBRARIES = ("-lm",)


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
    found.caprese_attend.argtypes = [*[p] * 6, *[n] * 9, ctypes.c_float]
    found.caprese_layers.argtypes = [p, n, p, ctypes.c_float, p, p, p, n, n, p, n, p, n, n]
    return found


def fits(*tensors: torch.Tensor) -> bool:
    """Whether C takes them, where it reads numbers as float32, and there is any."""
    return all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors) and library() is not None


def call(name: str, *arguments: float | None) -> None:
    """Run a function of the library.

    Raises:
        MemoryError: there was none.
    """
    if getattr(library(), name)(*arguments):
        raise MemoryError("no memory for one token's products")
