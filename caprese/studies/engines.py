"""Models as other engines run them, timed beside ours: each in a process of its own, which is told when to run."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from caprese.errors import CapreseError
from caprese.exports.gguf import check_llama_cpp

_WORKER = Path(__file__).parent / "llama_cpp_worker.py"


class LlamaCpp:
    """One GGUF in llama.cpp, on as many threads as torch has; greedy, one sequence."""

    def __init__(self, name: str, path: Path, prompt: Sequence[int], threads: int) -> None:
        """
        Args:
            name: of its row.
            prompt: ids, which it reads at once.

        Raises:
            CapreseError: llama-cpp-python is not installed, or the file cannot be used.
        """
        check_llama_cpp()
        self.name, self.path = name, path
        self.times: list[float] = []
        self._errors: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the process
        command = [sys.executable, str(_WORKER), str(path), str(threads)]
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._errors}
        self._process = subprocess.Popen(command, text=True, **pipes)
        self._ask([int(i) for i in prompt])

    def advance(self) -> float:
        """Milliseconds that the next token takes.

        Raises:
            CapreseError: the process ended.
        """
        return float(self._ask(1)[0])

    def close(self) -> None:
        """End its process."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def _ask(self, question: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # what it said before it ended is read below
        answer = self._process.stdout.readline()
        if answer:
            return json.loads(answer)
        code = self._process.wait()
        self._errors.seek(0)
        said = [line for line in self._errors.read().splitlines() if line.strip()]
        self.close()
        raise CapreseError(f"llama.cpp ended with {self.path.name} (exit {code}: {said[-1] if said else 'no message'})")
