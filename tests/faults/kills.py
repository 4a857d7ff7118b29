"""Jobs killed at random moments, again and again, and then left to finish."""

from __future__ import annotations

import random
import shutil
import signal
import sys

from faults.jobs import House, Job, Result, chosen
from faults.table import Table


def kills(house: House, table: Table, count: int, seed: int, names: tuple[str, ...] = ()) -> None:
    """`count` kills over all jobs, or those whose names start so: one to three of a job before it may finish."""
    rng = random.Random(seed)
    jobs = chosen({job.name: job for job in house.jobs()}, names)
    done = 0
    while done < count:
        for job in jobs:
            killed = _one(house, job, rng, table)
            done += killed
            table.kills += killed
        print(f"{done} of {count} kills: {table.total()}", file=sys.stderr, flush=True)


def _one(house: House, job: Job, rng: random.Random, table: Table) -> int:
    want, seconds, _ = house.unbroken(job)
    out = house.new_directory(job.name)
    job.before(out)
    whole = job.allowed(out, want)
    times, killed, lost = rng.randint(1, 3), 0, []
    for _ in range(times):
        held = job.kept(out)
        ended = job.run(out, kill_after=rng.uniform(0, seconds))
        killed += ended.code == -signal.SIGKILL
        lost += _lost(held, job.kept(out))
        if (found := job.whole(out)) not in whole:
            lost.append(f"half of it is there: {sorted(found)}")
    held = job.kept(out)
    ended = job.run(out)
    lost += _lost(held, job.kept(out))
    table.note("kill -9", job.name, ended, job, out, want, tries=killed, lost=lost, must=True)
    shutil.rmtree(out.parent)
    return killed


def _lost(before: Result, after: Result) -> list[str]:
    """What was finished and is gone, or was made anew."""
    return [name for name, stamp in before.items() if after.get(name) != stamp]
