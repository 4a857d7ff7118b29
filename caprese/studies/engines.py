"""Models as other engines run them, timed beside ours: each in a process of its own, which is told when to run."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from caprese.data_gen.vllm import find_vllm
from caprese.errors import CapreseError
from caprese.exports.compressed import SCHEMES, check_scheme
from caprese.exports.gguf import OUTTYPES, QUANTISED, check_llama_cpp

_HERE = Path(__file__).parent
#: by engine, the types that the dense model can be made as, and which are without saying
_TYPES: Mapping[str, tuple[Sequence[str], Sequence[str]]] = {
    "llama.cpp": ((*OUTTYPES, *QUANTISED), ("q8_0", "q4_0", "q4_k_m")),
    "vllm": (("bfloat16", *SCHEMES), ("bfloat16", "w4a16", "w8a8")),
}


class Engine:
    """A GGUF in llama.cpp, or a checkpoint's directory in vLLM, on torch's count of threads; greedy, one sequence."""

    def __init__(self, name: str, path: Path, prompt: Sequence[int], threads: int) -> None:
        """
        Args:
            name: of its row.
            prompt: ids, which it reads at once.

        Raises:
            CapreseError: the engine is not installed.
        """
        self.name, self.path = name, path
        self.engine = "vLLM" if path.is_dir() else "llama.cpp"
        if path.is_dir():
            command = [find_vllm(), str(_HERE / "vllm_worker.py")]
        else:
            check_llama_cpp()
            command = [sys.executable, str(_HERE / "llama_cpp_worker.py")]
        self.times: list[float] = []
        self._errors: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the process
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._errors}
        self._process = subprocess.Popen([*command, str(path), str(threads)], text=True, **pipes)
        self._send([int(i) for i in prompt])
        self._starting = True

    @property
    def bytes(self) -> int:
        """Of the weights as they are stored."""
        files = self.path.glob("*.safetensors") if self.path.is_dir() else [self.path]
        return sum(file.stat().st_size for file in files)

    def wait(self) -> None:
        """Until it has read the prompt; several start at once.

        Raises:
            CapreseError: the engine does not take what is there.
        """
        if self._starting:
            self._answer()
            self._starting = False

    def advance(self) -> float:
        """Milliseconds that the next token takes.

        Raises:
            CapreseError: the process ended.
        """
        self.wait()
        self._send(1)
        return float(self._answer()[0])

    def close(self) -> None:
        """End its process, if that was not done."""
        if self._errors.closed:
            return
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def _send(self, question: Any) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # what it said before it ended is read with the answer
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        answer = self._process.stdout.readline()
        if answer:
            return json.loads(answer)
        code = self._process.wait()
        self._errors.seek(0)
        said = [line for line in self._errors.read().splitlines() if line.strip()]
        self.close()
        last = said[-1] if said else "no message"
        raise CapreseError(f"{self.engine} ended with {self.path.name} (exit {code}: {last})")


def engine_types(engines: str | None, types: str | None) -> dict[str, list[str]]:
    """By engine, the types that the dense model is made as.

    Args:
        engines, types: names with commas; a type goes to the engine that has it, None is what each has without saying.

    Raises:
        CapreseError: there is no such engine or type, or it is not installed.
    """
    if engines is None:
        return {}
    names = engines.split(",")
    if unknown := [name for name in names if name not in _TYPES]:
        raise CapreseError(f"no engine {unknown[0]!r} runs beside ours: {', '.join(_TYPES)}")
    asked = None if types is None else types.split(",")
    found = {}
    for name in names:
        known, usual = _TYPES[name]
        found[name] = list(usual) if asked is None else [kind for kind in asked if kind in known]
        if not found[name]:
            raise CapreseError(f"no type of {types} is {name}'s: {', '.join(known)}")
        if name == "vllm":
            find_vllm()
        else:
            check_llama_cpp()
        for kind in found[name]:
            if kind in SCHEMES:
                check_scheme(kind)
    if unknown := [kind for kind in asked or () if not any(kind in kinds for kinds in found.values())]:
        raise CapreseError(f"no type {unknown[0]!r} of {engines}: " + "; ".join(", ".join(_TYPES[n][0]) for n in names))
    return found
