"""Commands in processes of their own, forked from one that has imported all of it: a start takes no time."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import caprese.recovery.recover  # noqa: F401  # what children need, imported once
from caprese.cli import run as command_line


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        code: its exit code; minus a signal's number where one killed it, None where it was still at work at the limit.
    """

    code: int | None
    said: str
    error: str
    seconds: float

    @property
    def one_line(self) -> bool:
        """Whether what went wrong was said as users are to read it: once, at the end."""
        lines = self.error.strip().splitlines()
        said = [line for line in lines if line.startswith("error: ")]
        return len(said) == 1 and lines[-1] == said[0] and "Traceback" not in self.error

    @property
    def line(self) -> str:
        """The last line that it wrote of what went wrong."""
        return (self.error.strip().splitlines() or [""])[-1]


Doing = Callable[[], object]


def call(
    arguments: list[str],
    *,
    first: Doing | None = None,
    kill_after: float | None = None,
    limit: float = 120,
) -> Ended:
    """`caprese arguments` to its end.

    Args:
        first: done in the new process before the command.
        kill_after: seconds after which the process and its children are killed.
        limit: seconds after which it counts as hung.
    """
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="caprese-faults-") as room:
        process = start(arguments, Path(room), first)
        code = _wait(process, begin + min(limit, kill_after if kill_after is not None else limit))
        if code is None:
            if kill_after is None:  # hung: where
                os.kill(process, signal.SIGUSR1)
                time.sleep(1)
            os.killpg(process, signal.SIGKILL)
            code = _wait(process, time.monotonic() + limit)
            if kill_after is None:
                code = None
        said, error = ((Path(room) / name).read_text(errors="replace") for name in ("out", "err"))
    return Ended(code, said, error, time.monotonic() - begin)


def call_both(arguments: list[str], apart: float, limit: float = 120) -> list[Ended]:
    """The same command twice, the second `apart` seconds after the first."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="caprese-faults-") as first, tempfile.TemporaryDirectory() as second:
        rooms = [Path(first), Path(second)]
        processes = [start(arguments, rooms[0])]
        time.sleep(apart)
        processes.append(start(arguments, rooms[1]))
        codes = [_wait(process, begin + limit) for process in processes]
        for process, code in zip(processes, codes, strict=True):
            if code is None:
                os.killpg(process, signal.SIGKILL)
        said = [[(room / name).read_text(errors="replace") for name in ("out", "err")] for room in rooms]
    took = time.monotonic() - begin
    return [Ended(code, *each, took) for code, each in zip(codes, said, strict=True)]


def start(arguments: list[str], room: Path, first: Doing | None = None) -> int:
    """The process of `caprese arguments`, whose output goes to files `out` and `err` in `room`."""
    sys.stdout.flush()
    sys.stderr.flush()
    streams = [os.open(room / name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC) for name in ("out", "err")]
    process = os.fork()
    if process:
        with contextlib.suppress(OSError):  # whichever of the two is first
            os.setpgid(process, process)
        for stream in streams:
            os.close(stream)
        return process
    code = 70
    try:
        os.setpgid(0, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for stream, number in zip(streams, (1, 2), strict=True):
            os.dup2(stream, number)
        faulthandler.register(signal.SIGUSR1, file=2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.environ["COLUMNS"] = "10000"  # a line is a line
        if first is not None:
            first()
        sys.argv = ["caprese", *arguments]
        command_line()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except Exception:
                code = code or 1
        os._exit(code)


def _wait(process: int, until: float) -> int | None:
    while True:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= until:
            return None
        time.sleep(0.005)
