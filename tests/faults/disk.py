"""Disks that are full, read-only or take no large files; two runs at once; jumping clocks; gradients that are NaN."""

from __future__ import annotations

import ctypes
import os
import random
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from faults.jobs import House, Job, Result
from faults.processes import call_both
from faults.table import Table

_NEWUSER, _NEWNS, _RDONLY, _REMOUNT = 0x10000000, 0x00020000, 1, 32


def disks(house: House, table: Table, count: int, seed: int) -> None:
    """A limit for files and a size of the disk anywhere between nothing and what a job writes, `count` of each."""
    rng = random.Random(seed)
    if not may_mount():
        table.leave_out("disk full, read-only", "this machine lets nobody mount")
    jobs = [job for job in house.jobs() if job.name != "push"]
    for at in range(count):
        job = jobs[at % len(jobs)]
        want, _, place = house.unbroken(job)
        sizes = [p.stat().st_size for p in place.rglob("*") if p.is_file()]
        few, room = rng.randrange(max(sizes)), sum(sizes) + (1 << 20)
        before = room if "--overwrite" in job.name else 0  # of what is replaced
        size = before + rng.randrange(sum(sizes))
        _try(house, table, job, want, "file size limit", partial(_limit, few))
        if may_mount():
            _try(house, table, job, want, "disk full", partial(small_disk, size))
            _try(house, table, job, want, "read-only", partial(small_disk, 4 * room, flags=_RDONLY))


def moments(house: House, table: Table, count: int, seed: int) -> None:
    """Two runs at once, clocks that jump, gradients that are NaN."""
    rng = random.Random(seed)
    jobs = [job for job in house.jobs() if job.name != "push"]
    for at in range(count):
        job = jobs[at % len(jobs)]
        want, seconds, _ = house.unbroken(job)
        _try(house, table, job, want, "the clock jumps", partial(_jumping, rng.randrange(2**31)), must=True)
        if job.name.startswith("recover"):
            _try(house, table, job, want, "a gradient that is NaN", partial(_no_number, rng.randrange(8)))
        out = house.new_directory(f"two {job.name}")
        job.before(out)
        both = call_both(job.written(out), rng.uniform(0, seconds))
        done = [ended for ended in both if ended.code == 0]
        table.require("two at once", job.name, bool(done), f"neither came to its end: {both}")
        for ended in both:
            table.note("two at once", job.name, ended, job, out, want)


def _try(
    house: House, table: Table, job: Job, want: Result, kind: str, first: Callable[[Path], None], must: bool = False
) -> None:
    """A job under what `first` does to its process; where that stopped it, once more without."""
    out = house.new_directory(job.name)
    job.before(out)
    whole = job.allowed(out, want)
    ended = job.run(out, first=lambda: first(out))
    table.note(kind, job.name, ended, job, out, want, must=must, whole=whole)
    if ended.code != 0:
        again = job.run(out)
        table.note(f"after: {kind}", job.name, again, job, out, want, must=True)
    shutil.rmtree(out.parent)


def _limit(size: int, _: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def may_mount() -> bool:
    """Whether this process may make a file system of its own, as only some machines allow."""
    with tempfile.TemporaryDirectory() as place:
        process = os.fork()
        if process == 0:
            try:
                _mount(Path(place), 1 << 20)
                os._exit(0)
            except OSError:
                os._exit(1)
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0


def small_disk(size: int, out: Path, flags: int = 0) -> None:
    """What `out` lies in is a disk of `size` bytes for this process; what is on it at the end stays when it is gone."""
    place = out.parent
    held = place.with_name(f"{place.name}-held")
    shutil.copytree(place, held, symlinks=True)
    _mount(place, size)
    shutil.copytree(held, place, symlinks=True, dirs_exist_ok=True)
    if flags:
        _call("mount", b"tmpfs", os.fsencode(place), b"tmpfs", flags | _REMOUNT, b"")
    process = os.fork()
    if process == 0:
        return
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    shutil.rmtree(held)
    shutil.copytree(place, held, symlinks=True)
    _call("umount", os.fsencode(place))
    shutil.rmtree(place)
    held.rename(place)
    os._exit(code if code >= 0 else 70)


def _mount(place: Path, size: int) -> None:
    user, group = os.getuid(), os.getgid()
    _call("unshare", _NEWUSER | _NEWNS)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    pages = -(-max(size, 1) // 4096) + 1
    _call("mount", b"tmpfs", os.fsencode(place), b"tmpfs", 0, f"size={4096 * pages}".encode())


def _call(name: str, *arguments: int | bytes) -> None:
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def _jumping(seed: int, _: Path) -> None:
    """Now and then the clock is days ahead or behind."""
    clock, rng = time.time, random.Random(seed)
    time.time = lambda: clock() + rng.choice((0, 0, -90000, 90000, 3e7))


def _no_number(step: int, _: Path) -> None:
    """From one step on every gradient is no number."""
    backward, left = torch.Tensor.backward, [step]

    def broken(loss: torch.Tensor, *arguments: object, **more: object) -> None:
        left[0] -= 1
        backward(loss * float("nan") if left[0] < 0 else loss, *arguments, **more)

    torch.Tensor.backward = broken  # type: ignore[method-assign]
