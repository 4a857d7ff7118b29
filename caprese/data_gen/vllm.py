"""vLLM on this machine: found, started for as long as it is needed, and stopped; in its own process, never imported."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import IO, Any

import torch
from accelerate import PartialState
from torch import nn
from transformers import PreTrainedTokenizerBase

from caprese.data_gen.completer import Advance, Asked, Completer
from caprese.data_gen.endpoint import Endpoint
from caprese.data_gen.samples import Samples
from caprese.errors import CapreseError
from caprese.models import base_of, device_of, unwrap
from caprese.progress import say

#: names the Python that has vLLM
VLLM_PYTHON = "CAPRESE_VLLM_PYTHON"
_NAME = "caprese-teacher"
# seconds that a Python has to answer, a server has to start (it may compile), and one has to stop
_PATIENCE, _START, _STOP = 60, 1200, 20
_FOUND = 77
_DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG
# of our environment, what another Python would go wrong by
_OURS = {"PYTHONPATH", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
_OURS |= {"VLLM_API_KEY"}  # it would want one of us
# GiB for KV caches on a CPU, where vLLM would take half of the machine's memory
_KV_GIB = "2"


def find_vllm() -> str:
    """The Python that has vLLM: $CAPRESE_VLLM_PYTHON, or this one.

    Raises:
        CapreseError: neither has it.
    """
    python = os.environ.get(VLLM_PYTHON)
    if python is None:
        if importlib.util.find_spec("vllm") is not None:
            return sys.executable
        raise CapreseError(f"vLLM is not installed here: make vllm, and set {VLLM_PYTHON} to .venv-vllm/bin/python")
    look = f"import importlib.util; raise SystemExit({_FOUND} if importlib.util.find_spec('vllm') else 1)"
    try:
        asked = subprocess.run([python, "-c", look], capture_output=True, timeout=_PATIENCE)
        found = asked.returncode == _FOUND  # what is no Python does not end so
    except (OSError, subprocess.TimeoutExpired):
        found = False
    if not found:
        raise CapreseError(f"{VLLM_PYTHON} is {python}, which is no Python that has vLLM; make vllm sets one up")
    return python


@contextmanager
def serving(config: Samples, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Iterator[Completer]:
    """A teacher in vLLM on this machine; it is started when it is first asked, and stopped at the end."""
    teacher = _Served(config, model, tokenizer)
    try:
        yield teacher
    finally:
        teacher.stop()


class _Served(Endpoint):
    """An endpoint whose server is started when it is first asked."""

    def __init__(self, config: Samples, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        url = f"http://127.0.0.1:{self._port}"
        super().__init__(url, config.model_copy(update={"teacher_model": _NAME}), model, tokenizer)
        self._process: subprocess.Popen[str] | None = None
        self._log: IO[str] | None = None

    def complete(
        self, asked: Iterable[Asked], config: Samples, advance: Advance | None = None
    ) -> Generator[list[list[int]], None, None]:
        """See `Completer.complete`.

        Raises:
            CapreseError: vLLM is not installed, does not start with this model, or stops; several processes would
                each start one.
        """
        try:
            yield from super().complete(asked, config, advance)
        except CapreseError as error:
            if self._process is not None and self._process.poll() is not None:
                raise self._ended() from error
            raise

    def _connect(self) -> Any:
        client = super()._connect()
        if self._process is None:
            self._start()
        return client

    def _start(self) -> None:
        if PartialState().num_processes > 1:
            raise CapreseError(
                "each of several processes would start a vLLM of its own; start one (vllm serve) and give its address "
                "as `teacher`"
            )
        base, device = base_of(self.model), device_of(self.model).type
        on_cpu = device == "cpu"
        dtype = base.dtype or unwrap(self.model).dtype
        if torch.is_autocast_enabled(device):  # what the model's own products would be in
            dtype = torch.get_autocast_dtype(device)
        # builds for CPUs have no working `vllm` command
        words = ["-m", "vllm.entrypoints.openai.api_server", "--model", base.source]
        words += ["--served-model-name", _NAME]
        words += ["--host", "127.0.0.1", "--port", str(self._port), "--generation-config", "vllm"]
        words += ["--dtype", str(dtype).removeprefix("torch.")]
        words += ["--revision", base.revision] if base.revision else []
        environment = {name: value for name, value in os.environ.items() if name not in _OURS}
        environment |= {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
        words += ["--max-model-len", "auto"]  # as much of the context as there is memory for
        if on_cpu:
            # compiling takes minutes and gives little here; a prompt in parts, with a seed, stops vLLM 0.32 on CPUs
            words += ["--enforce-eager", "--no-enable-chunked-prefill"]
            environment.setdefault("VLLM_CPU_KVCACHE_SPACE", _KV_GIB)
        elif torch.cuda.is_available():  # beside the base that is loaded here
            free, whole = torch.cuda.mem_get_info()
            words += ["--gpu-memory-utilization", f"{0.9 * free / whole:.2f}"]
        say(f"starting vLLM with {base}")
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - as long as the process
        self._process = subprocess.Popen(
            [find_vllm(), *words],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            start_new_session=True,
            preexec_fn=_dying_with_parent(),
        )
        until = time.monotonic() + _START
        while not self._healthy():
            if self._process.poll() is not None:
                raise self._ended()
            if time.monotonic() > until:
                raise CapreseError(
                    f"vLLM has not started within {_START // 60} minutes; start it yourself (vllm serve) and give its "
                    "address as `teacher`"
                )
            time.sleep(0.5)

    def _healthy(self) -> bool:
        try:
            ask = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
            with ask(f"http://127.0.0.1:{self._port}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def _ended(self) -> CapreseError:
        assert self._log is not None and self._process is not None
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read().splitlines() if line.strip()]
        errors = [line for line in lines if re.search(r"\w(Error|Exception): ", line)]
        telling = errors[:1] or lines[-1:] or ["no message"]  # the first is the cause of those after it
        return CapreseError(
            f"vLLM ended (exit {self._process.returncode}: {telling[0][-300:]}); draw the samples here instead: leave "
            "out `teacher`"
        )

    def stop(self) -> None:
        """End the server and its engine, if it was started."""
        if self._process is None:
            return
        for how in (self._process.terminate, partial(_end_all, self._process.pid)):
            how()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP)
        self._process.kill()
        assert self._log is not None
        self._log.close()
        self._process = None


def _end_all(process: int) -> None:
    """What a server started and left behind."""
    if os.name == "posix":
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process, signal.SIGKILL)


def _dying_with_parent() -> Callable[[], object] | None:
    """Done in a new process: a server whose starter was killed would hold its memory for ever. Where Linux is."""
    if sys.platform != "linux":
        return None
    return partial(ctypes.CDLL(None).prctl, _DIES_WITH_PARENT, signal.SIGTERM)
