"""One of two processes of a training dies."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

from faults.jobs import House, Job
from faults.processes import Ended
from faults.table import Table

MARK = "CAPRESE_FAULTS_RUN"


def ranks(house: House, table: Table, count: int, seed: int) -> None:
    """`count` times one rank of two dies somewhere; both then begin again."""
    rng = random.Random(seed)
    job = house.recover("griffin")
    out = house.new_directory("two ranks")
    begin = time.monotonic()
    ended, _ = _together(job, out)
    assert ended.code == 0, ended.error
    want, seconds = job.result(out, ended), time.monotonic() - begin
    done = 0
    while done < count:
        out = house.new_directory("two ranks")
        died, struck = _together(job, out, rng.uniform(0.4, 0.9) * seconds, rng.randrange(2))
        if not struck:  # they were done before
            continue
        done += 1
        noticed = died.code is not None and died.code != 0
        table.require("a rank dies", job.name, noticed, f"the other did not notice: {died.code}")
        again, _ = _together(job, out)
        table.note("a rank dies", job.name, again, job, out, want, must=True)


def _together(job: Job, out: Path, dies_after: float | None = None, rank: int = 0) -> tuple[Ended, bool]:
    """Two ranks, of which one is killed after so many seconds, and whether it still was there."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "caprese"]
    begin, mark, struck = time.monotonic(), uuid.uuid4().hex, False
    environment = {**os.environ, MARK: mark}
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as error:
        run = subprocess.Popen(
            [*command, *job.written(out)], stdout=said, stderr=error, start_new_session=True, env=environment
        )
        if dies_after is not None:
            time.sleep(dies_after)
            for found in _processes(mark, rank):
                os.kill(found, signal.SIGKILL)
                struck = True
        try:
            code = run.wait(timeout=300)
        except subprocess.TimeoutExpired:
            for left in [run.pid, *_processes(mark)]:
                os.kill(left, signal.SIGKILL)
            code = None
        texts = []
        for file in (said, error):
            file.seek(0)
            texts.append(file.read())
    return Ended(code, texts[0], texts[1], time.monotonic() - begin), struck


def _processes(mark: str, rank: int | None = None) -> list[int]:
    """Those of one run, by what its environment holds; of a rank alone, or all."""
    found, wanted = [], [f"{MARK}={mark}"] + ([f"LOCAL_RANK={rank}"] if rank is not None else [])
    for each in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            held = (each / "environ").read_bytes().decode(errors="replace").split("\0")
            if all(pair in held for pair in wanted):
                found.append(int(each.name))
    return found
