"""A checkpoint as one GGUF file for llama.cpp, by its own converter."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from caprese.errors import CapreseError

#: what its converter writes, and what its quantiser makes of that
OUTTYPES = ("f32", "f16", "bf16", "q8_0")
QUANTISED = ("q4_0", "q4_k_m", "q5_k_m", "q6_k")

# In a process of its own, whose messages are kept: it aborts where it cannot go on.
_QUANTISE = """\
import ctypes, sys
import llama_cpp
source, target, kind, threads = sys.argv[1:]
how = llama_cpp.llama_model_quantize_default_params()
how.ftype, how.nthread = getattr(llama_cpp, "LLAMA_FTYPE_MOSTLY_" + kind.upper()), int(threads)
sys.exit(llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(how)))
"""


def find_converter(outtype: str) -> list[str]:
    """The command of llama.cpp's converter, for a GGUF of this type.

    Raises:
        CapreseError: there is no such type, or a tool for it is not here.
    """
    check_outtype(outtype)
    name = "convert_hf_to_gguf.py"
    own = Path(os.environ.get("LLAMA_CPP", "")) / name
    if os.environ.get("LLAMA_CPP") and own.is_file():
        return [sys.executable, str(own)]
    if (script := shutil.which(name)) is not None:
        return [sys.executable, script]
    missing = f" (LLAMA_CPP names {own.parent}, which has none)" if os.environ.get("LLAMA_CPP") else ""
    raise CapreseError(
        f"GGUF needs llama.cpp's {name}: git clone https://github.com/ggml-org/llama.cpp and set LLAMA_CPP to it"
        f"{missing}; or, in a clone of caprese, make llama-cpp, which has it in "
        ".venv/src/llama_cpp_python-*/vendor/llama.cpp"
    )


def check_outtype(outtype: str) -> None:
    """Raise CapreseError if no GGUF of this type can be written here."""
    if outtype not in (*OUTTYPES, *QUANTISED):
        raise CapreseError(f"no GGUF is of type {outtype!r}: {', '.join((*OUTTYPES, *QUANTISED))}")
    if outtype in QUANTISED:
        check_llama_cpp()


def check_llama_cpp() -> None:
    """Raise CapreseError where llama-cpp-python is not installed."""
    if importlib.util.find_spec("llama_cpp") is None:
        raise CapreseError("llama.cpp is not installed here: pip install llama-cpp-python, or make llama-cpp")


def convert(converter: list[str], source: Path, target: Path, outtype: str) -> None:
    """A checkpoint as one file, by llama.cpp's converter and, for the smaller types, its quantiser.

    Raises:
        CapreseError: one of them failed, with what it said last.
    """
    target.parent.mkdir(exist_ok=True)
    if outtype in QUANTISED:
        whole = target.with_name(f".{target.name}-f16")
        convert(converter, source, whole, "f16")
        run = [sys.executable, "-c", _QUANTISE, str(whole), str(target), outtype, str(os.cpu_count() or 1)]
        done = subprocess.run(run, capture_output=True, text=True)
        whole.unlink()
        if done.returncode or not target.is_file():
            raise CapreseError(f"llama.cpp's quantiser failed for {outtype} ({_last(done.stderr)})")
        return
    run = [*converter, str(source), "--outfile", str(target), "--outtype", outtype]
    done = subprocess.run(run, capture_output=True, text=True)
    if done.returncode or not target.is_file():
        raise CapreseError(
            f"llama.cpp's converter failed ({_last(done.stderr)}); the same export with `format=hf` works without it"
        )


def dense_ggufs(model: Any, tokenizer: Any, outtypes: Sequence[str], directory: Path) -> dict[str, Path]:
    """A model of transformers as GGUF files in a directory, by type.

    Raises:
        CapreseError: llama.cpp's tools are not here, or fail.
    """
    source, found = directory / "hf", {}
    model.save_pretrained(source)
    tokenizer.save_pretrained(source)
    for outtype in outtypes:
        found[outtype] = directory / "gguf" / f"dense-{outtype}.gguf"
        convert(find_converter(outtype), source, found[outtype], outtype)
    return found


def _last(said: str) -> str:
    return (said.strip().splitlines() or ["no message"])[-1]
