"""Files of finished and of half-finished directories damaged, one at a time, and then used by all who read them."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from faults.jobs import REPO, WRITTEN, House, Job, Result, chosen
from faults.processes import Ended
from faults.table import Table

#: where a run is killed: in the n-th write of a file whose name begins so
HALVES = {
    "griffin": (("train-0000", 2), ("moments", 1), ("layerwise", 1), ("end_to_end", 3), ("recovered", 1)),
    "hybrid": (("sensitivity", 2), ("alignment", 1), ("hidden_states", 1), ("round-1", 1), ("report.json", 1)),
}
AFTER = "after: what the line says"
DAMAGES: dict[str, Callable[[bytes, bytes, random.Random], bytes | None]] = {
    "a flipped bit": lambda data, other, rng: flipped(data, rng),
    "truncated": lambda data, other, rng: data[: rng.randrange(len(data))] if data else None,
    "emptied": lambda data, other, rng: b"" if data else None,
    "another run's": lambda data, other, rng: other if other != data else None,
    "removed": lambda data, other, rng: b"",
}


def flipped(data: bytes, rng: random.Random) -> bytes | None:
    if not data:
        return None
    changed = bytearray(data)
    changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


@dataclass(frozen=True)
class Damaged:
    """A directory to damage, another run's, who reads it, and what makes it."""

    name: str
    directory: Path
    other: Path
    uses: list[Job]
    maker: Job


def damages(house: House, table: Table, count: int, seed: int, names: tuple[str, ...] = ()) -> None:
    """`count` damages, spread over places, files and kinds; each is then met by one of those who read that place."""
    rng = random.Random(seed)
    places = [make() for make in chosen(places_of(house), names)]
    at = house.room / "damaged" / "out"
    want = {place.name: dict(_unbroken(house, place, at)) for place in places}
    queue = [
        (place, path, kind)
        for place in places
        for path in sorted(p.relative_to(place.directory) for p in place.directory.rglob("*") if p.is_file())
        for kind in DAMAGES
    ]
    done, followed = 0, set[tuple[str, str, str]]()
    while done < count:
        rng.shuffle(queue)
        for place, path, kind in queue:
            data, twin = (place.directory / path).read_bytes(), place.other / path
            if kind == "another run's" and not twin.is_file():
                continue
            damaged = DAMAGES[kind](data, twin.read_bytes() if twin.is_file() else b"", rng)
            if damaged is None:
                continue
            use = rng.choice(place.uses)
            _fresh(house, place, at)
            (at / path).write_bytes(damaged)
            if kind == "removed":
                (at / path).unlink()
            expected = want[place.name][use.name]
            whole = use.allowed(at, expected)
            ended = use.run(at)
            what = f"{place.name}: {use.name}"
            line = table.note(kind, what, ended, use, at, expected, whole=whole, where=f"{path}: ")
            if line is not None and (place.name, use.name, line) not in followed:
                followed.add((place.name, use.name, line))
                ended, again = _remedied(place, use, at, ended), _made_again(use)
                table.note(AFTER, what, ended, again, at, _lasting(expected), must=True, where=f"{path}: ")
            done += 1
            table.damages += 1
            if done % 20 == 0:
                print(f"{done} of {count} damages: {table.total()}", file=sys.stderr, flush=True)
            if done >= count:
                break


def _unbroken(house: House, place: Damaged, at: Path) -> Iterator[tuple[str, Result]]:
    for use in place.uses:
        _fresh(house, place, at)
        ended = use.run(at)
        assert ended.code == 0, (place.name, use.name, ended.error)
        yield use.name, use.result(at, ended)


def _remedied(place: Damaged, use: Job, at: Path, ended: Ended) -> Ended:
    """How `use` ends once what its line says has been done: files deleted, or the directory made again."""
    for _ in range(4):  # what took damage along may be named next
        line = ended.line
        named = {Path(path) for path in re.findall(rf"{re.escape(str(at))}[\w./-]*", line)}
        if "delete" in line and "recover again" not in line:
            for path in named - {at}:
                path.unlink(missing_ok=True)
        elif "--overwrite" in line:
            ended = Job(place.maker.name, [*place.maker.arguments, "--overwrite"], place.maker.result).run(at)
        elif use is not place.maker:
            ended = place.maker.run(at)
            ended = ended if ended.code == 0 else _remedied(place, place.maker, at, ended)
        ended = use.run(at)
        if ended.code == 0:
            break
    return ended


def _made_again(use: Job) -> Job:
    """What reads a directory that was made anew, and so has other pages: their times differ."""
    return replace(use, result=lambda out, ended: _lasting(use.result(out, ended)))


def _lasting(result: Result) -> Result:
    return {name: value for name, value in result.items() if not name.startswith(WRITTEN)}


def _fresh(house: House, place: Damaged, at: Path) -> None:
    house.hub.repos.clear()
    shutil.rmtree(at.parent, ignore_errors=True)
    at.parent.mkdir()
    shutil.copytree(place.directory, at)


def places_of(house: House) -> dict[str, Callable[[], Damaged]]:
    """By the name of each directory to damage, what makes it."""
    found: dict[str, Callable[[], Damaged]] = {}
    for method in ("griffin", "static", "hybrid"):
        found[f"finished {method}"] = partial(_finished, house, method, f"finished {method}")
    for method, moments in HALVES.items():
        for file, count in moments:
            found[f"half {method} at {file}"] = partial(_half, house, method, file, count, f"half {method} at {file}")
    for job in ("scale", "eval --tasks"):
        found[f"finished {job}"] = partial(_done, house, job, f"finished {job}")
    return found


def _finished(house: House, method: str, name: str) -> Damaged:
    readers = [house.recover(method), *_readers(house, method)]
    return Damaged(name, house.adapter(method), house.adapter(method, seed=1), readers, readers[0])


def _half(house: House, method: str, file: str, count: int, name: str) -> Damaged:
    """Directories as a kill in that write leaves them."""
    made = []
    for seed in (0, 1):
        made.append(house.new_directory(name))
        ended = house.recover(method, seed).run(made[-1], first=lambda: dying(file, count))
        assert ended.code == -signal.SIGKILL, (name, ended)
    job = house.recover(method)
    return Damaged(name, *made, [job], job)


def _done(house: House, name: str, place: str) -> Damaged:
    job = next(job for job in house.jobs() if job.name == name)
    made, other = house.unbroken(job)[2], house.new_directory(f"other {name}")
    assert Job(name, [*job.arguments, "--seed", "7"], job.result).run(other).code == 0
    return Damaged(place, made, other, [job], job)


def _readers(house: House, name: str) -> list[Job]:
    both = ["--model", str(house.base), "--adapter", "{out}", "--json"]
    few = ["--samples", "2", "--latency-tokens", "0", "--prompts", "gym:simple_equations"]
    return [
        Job("info", ["info", "{out}", "--json"], _printed),
        Job("generate", ["generate", *both, "--prompt", "1+1", "--max-new-tokens", "8"], _text),
        Job("eval", ["eval", *both, *few, "--max-new-tokens", "8"], _quality),
        Job("push", ["push", "{out}", REPO, "--json"], house.pushed, whole=house.pushed),
    ]


def _printed(out: Path, ended: Ended) -> Result:
    return dict(json.loads(ended.said))


def _text(out: Path, ended: Ended) -> Result:
    return {"text": json.loads(ended.said)["text"]}


def _quality(out: Path, ended: Ended) -> Result:
    told = json.loads(ended.said)
    return {key: told[key] for key in ("quality", "recovered_fraction")}


def dying(name: str, count: int) -> None:
    """From now on this process dies in its `count`-th write of a file whose name begins with `name`."""
    replace, left = os.replace, [count]

    def replacing(source: str | Path, target: str | Path) -> None:
        if Path(target).name.startswith(name):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = replacing  # type: ignore[assignment]
