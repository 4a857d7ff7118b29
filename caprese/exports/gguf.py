"""A checkpoint as one GGUF file for llama.cpp, by its own converter."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from caprese.errors import CapreseError


def find_converter() -> list[str]:
    """The command of llama.cpp's converter."""
    name = "convert_hf_to_gguf.py"
    own = Path(os.environ.get("LLAMA_CPP", "")) / name
    if os.environ.get("LLAMA_CPP") and own.is_file():
        return [sys.executable, str(own)]
    if (script := shutil.which(name)) is not None:
        return [sys.executable, script]
    raise CapreseError(
        f"GGUF needs llama.cpp's {name}: git clone https://github.com/ggml-org/llama.cpp and set LLAMA_CPP to it"
    )


def convert(converter: list[str], source: Path, target: Path, outtype: str) -> None:
    target.parent.mkdir()
    run = [*converter, str(source), "--outfile", str(target), "--outtype", outtype]
    done = subprocess.run(run, capture_output=True, text=True)
    if done.returncode or not target.is_file():
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise CapreseError(f"llama.cpp's converter failed ({last}); the same export with `format=hf` works without it")
