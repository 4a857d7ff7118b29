"""Samples on disk: Parquet shards with token ids, the prompt/completion boundary and the settings that made them."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, overload

import pyarrow as pa
import pyarrow.parquet as pq

from caprese.errors import CapreseError
from caprese.files import write_atomic

# Raised whenever the same settings come to give other samples (2: the seed gives the order of prompts; 3: samples say
# what source they are of; 5: one uniform number a draw).
VERSION = 5
# rows that are Python's at a time where all are gone through
_AT_ONCE = 512


@dataclass(frozen=True)
class Sample:
    """One prompt and the teacher's completion of it.

    `input_ids[:prompt_length]` is the prompt, the rest the completion (with its end-of-text token if it ended).
    """

    input_ids: list[int]
    prompt_length: int
    prompt: str
    completion: str
    answer: str | None = None
    source: str = ""
    """The kind of prompts it is of."""

    @property
    def prompt_ids(self) -> list[int]:
        return self.input_ids[: self.prompt_length]

    @property
    def completion_ids(self) -> list[int]:
        return self.input_ids[self.prompt_length :]


_SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("prompt_length", pa.int32()),
        ("prompt", pa.string()),
        ("completion", pa.string()),
        ("answer", pa.string()),
        ("source", pa.string()),
    ]
)


def _digest(rows: list[dict[str, Any]]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(list(row.values())).encode())
    return digest.hexdigest()


def write_shard(path: Path, samples: list[Sample], settings: dict[str, Any]) -> None:
    """Write atomically; `settings` and a digest of the rows go into the schema's metadata."""
    rows = [vars(s) for s in samples]
    facts = {"caprese": json.dumps({"settings": settings, "sha256": _digest(rows)})}
    table = pa.Table.from_pylist(rows, schema=_SCHEMA.with_metadata(facts))
    write_atomic(path, lambda tmp: pq.write_table(table, tmp))


def shard_settings(path: Path) -> dict[str, Any]:
    """What a shard was made with.

    Raises:
        CapreseError: truncated, or no shard of ours.
    """
    try:
        return dict(json.loads(pq.read_schema(path).metadata[b"caprese"])["settings"])
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> CapreseError:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return CapreseError(f"shard {path} is damaged ({first}); delete it, and recover makes it anew")


def read_shard(path: Path, settings: dict[str, Any] | None = None) -> list[Sample]:
    """Read a shard back.

    Args:
        settings: what it should have been made with; None takes any.

    Raises:
        CapreseError: truncated or altered, or made with other settings.
    """
    return list(read_shards([path], [settings]))


def read_shards(paths: Sequence[Path], settings: Sequence[dict[str, Any] | None]) -> Rows:
    """Read shards back as one sequence, each with the settings it should have been made with; see `read_shard`."""
    return Rows([_table(path, asked) for path, asked in zip(paths, settings, strict=True)])


def _table(path: Path, settings: dict[str, Any] | None) -> pa.Table:
    try:
        table = pq.read_table(path)
        facts = json.loads(table.schema.metadata[b"caprese"])
        made_with = dict(facts["settings"])
        rows = table.to_pylist()
        for row in rows:
            Sample(**row)
        if _digest(rows) != facts["sha256"]:
            raise ValueError("its rows were altered")
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise _damaged(path, error) from error
    if settings is not None and made_with != settings:
        differ = ", ".join(k for k in sorted({*settings, *made_with}) if made_with.get(k) != settings.get(k))
        raise CapreseError(
            f"{path.parent} holds samples made with another {differ}; choose another `output`, or give `overwrite=True`"
        )
    return table


class Rows(Sequence[Sample]):
    """Samples as Arrow holds them, a tenth of what they are as Python's lists; one is made when it is asked for."""

    def __init__(self, tables: Sequence[pa.Table]) -> None:
        self.tables = [table for table in tables if len(table)]
        self._ends = list(accumulate(map(len, self.tables)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        at = range(len(self))[index]
        number = bisect_right(self._ends, at)
        table = self.tables[number]
        (row,) = table.slice(at - self._ends[number] + len(table), 1).to_pylist()
        return Sample(**row)

    def __iter__(self) -> Iterator[Sample]:
        for table in self.tables:
            for some in table.to_batches(max_chunksize=_AT_ONCE):
                yield from (Sample(**row) for row in some.to_pylist())


@dataclass(frozen=True)
class Shards:
    """The shards `name-00000.parquet` ... of one split: where they lie and what makes them."""

    directory: Path
    name: str
    settings: Mapping[str, Any]
    """What their samples depend on, "seed" among it."""
    size: int
    """Samples in each but the last."""

    def path(self, number: int) -> Path:
        return self.directory / f"{self.name}-{number:05d}.parquet"

    def chunks(self, count: int) -> list[slice]:
        """Which of `count` samples each shard holds."""
        return [slice(at, min(at + self.size, count)) for at in range(0, count, self.size)]

    def made_with(self, prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
        """What is written into the shard that completes these prompts, as token ids."""
        asked = hashlib.sha256(json.dumps([list(ids) for ids in prompts]).encode()).hexdigest()[:32]
        return {**self.settings, "rows": len(prompts), "prompts": asked}

    def foreign(self, prompts: Sequence[Sequence[int]]) -> list[Path]:
        """Those that are not what would be made of these prompts."""
        found = []
        paths = sorted(self.directory.glob(f"{self.name}-{'[0-9]' * 5}.parquet"))
        numbers = [int(path.stem.rpartition("-")[2]) for path in paths]
        chunks = dict(enumerate(self.chunks(len(prompts))))
        for path, number in zip(paths, numbers, strict=True):
            chunk = chunks.get(number)
            if chunk is None or shard_settings(path) != self.made_with(prompts[chunk]):
                found.append(path)
        return found
