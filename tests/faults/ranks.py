"""One of two processes of a training dies."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from faults.jobs import House, Job
from faults.processes import Ended
from faults.table import Table


def ranks(house: House, table: Table, count: int, seed: int) -> None:
    """`count` times one rank of two dies somewhere; both then begin again."""
    rng = random.Random(seed)
    job = house.recover("griffin")
    out = house.place("two ranks")
    begin = time.monotonic()
    ended = _together(job, out)
    assert ended.code == 0, ended.error
    want, seconds = job.result(out, ended), time.monotonic() - begin
    for _ in range(count):
        out = house.place("two ranks")
        died = _together(job, out, rng.uniform(0.5, 1) * seconds, rng.randrange(2))
        table.require("a rank dies", job.name, died.code != 0, "the other did not notice")
        again = _together(job, out)
        table.note("a rank dies", job.name, again, job, out, want)


def _together(job: Job, out: Path, dies_after: float | None = None, rank: int = 0) -> Ended:
    """Two ranks, of which one is killed after so many seconds."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "caprese"]
    begin = time.monotonic()
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as error:
        run = subprocess.Popen([*command, *job.written(out)], stdout=said, stderr=error, start_new_session=True)
        if dies_after is not None:
            time.sleep(dies_after)
            if (found := _process_of(rank)) is not None:
                os.kill(found, signal.SIGKILL)
        try:
            code = run.wait(timeout=300)
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)
            code = None
        texts = []
        for file in (said, error):
            file.seek(0)
            texts.append(file.read())
    return Ended(code, texts[0], texts[1], time.monotonic() - begin)


def _process_of(rank: int) -> int | None:
    """The process that has this rank, of those that are here."""
    for each in Path("/proc").glob("[0-9]*"):
        try:
            if f"\0LOCAL_RANK={rank}\0".encode() in b"\0" + (each / "environ").read_bytes() + b"\0":
                return int(each.name)
        except OSError:
            continue
    return None
