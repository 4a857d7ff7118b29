"""Where prompts come from: a reasoning-gym task, chains of arithmetic, a JSONL or Parquet file, a `datasets` name."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from caprese.data_gen.chains import chains
from caprese.errors import CapreseError

# Rows of a streamed dataset that are held to draw the next one from.
_BUFFER = 10_000


@dataclass(frozen=True)
class Prompt:
    text: str
    answer: str | None = None
    #: the reasoning-gym item it comes from, which its task's own scorer wants to see
    item: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)


def load_prompts(
    source: str, count: int, seed: int, column: str = "prompt", exclude: Collection[str] = ()
) -> list[Prompt]:
    """Up to `count` distinct prompts, drawn and ordered by the seed; a smaller count gives the first of a larger one's.

    Args:
        source: "gym:TASK", "chains:SPLIT", a .jsonl or .parquet file, or the name of a dataset ("openai/gsm8k:train").
        column: where a file or dataset has the prompt; the answer is in "answer" if there is such a column.
        exclude: prompts not to give.

    Raises:
        CapreseError: unknown source or task, a bad row, an empty prompt, or no prompt at all.
    """
    if source.startswith("gym:"):
        size = 2 * (count + len(exclude)) + 100
        rows: Iterable[tuple[int, dict[str, Any]]] = enumerate(_gym(source[4:], size, seed))
        column = "question"
    elif source.startswith("chains:"):
        rows = enumerate({"question": c.question, "answer": c.answer} for c in chains(source[7:], seed))
        column = "question"
    elif source.endswith((".jsonl", ".parquet")) or Path(source).exists():
        rows = list(enumerate(_file(Path(source))))
        random.Random(seed).shuffle(rows)
    else:
        rows = enumerate(_dataset(source, seed))
    seen: dict[str, Prompt] = {}
    excluded = False
    for number, row in rows:
        text = row.get(column)
        if not isinstance(text, str):
            raise CapreseError(
                f"{source}, row {number + 1}: no text in column {column!r} (columns: {', '.join(row)}); see --column"
            )
        if not text.strip():
            raise CapreseError(f"{source}, row {number + 1}: the prompt is empty; remove the row")
        if text in exclude:
            excluded = True
            continue
        answer = row.get("answer")
        item = row if source.startswith("gym:") else None
        seen.setdefault(text, Prompt(text, None if answer is None else str(answer), item))
        if len(seen) >= count:
            break
    if not seen:
        raise CapreseError(
            f"{source} holds no prompts" + (" but those the adapter was trained on; give others" if excluded else "")
        )
    return list(seen.values())


def _gym(task: str, size: int, seed: int) -> Iterator[dict[str, Any]]:
    try:
        import reasoning_gym
    except ImportError as error:
        raise CapreseError("prompts from gym: need reasoning-gym; pip install reasoning-gym") from error
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        near = [name for name in sorted(DATASETS) if any(part in name for part in task.split("_"))][:5]
        raise CapreseError(
            f"reasoning-gym has no task {task!r}" + (f"; did you mean {', '.join(near)}?" if near else "")
        )
    # many tasks draw item i from seed + i, so that neighbouring seeds would give nearly the same items
    far = int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:4], "big") >> 1
    dataset = reasoning_gym.create_dataset(task, size=size, seed=far)
    return (dataset[i] for i in range(size))


def _file(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        raise CapreseError(f"no prompt file at {path}")
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            yield from pyarrow.parquet.read_table(path).to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise CapreseError(f"{path} is not a readable Parquet file ({error}); write it again") from error
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise CapreseError(f"{path}, line {number}: not UTF-8 text; save the file as UTF-8") from error
            except json.JSONDecodeError as error:
                raise CapreseError(
                    f"{path}, line {number}: not JSON ({error.msg}); one object with a 'prompt' per line"
                ) from error
            if not isinstance(row, dict):
                raise CapreseError(f"{path}, line {number}: not an object; one object with a 'prompt' per line")
            yield row


def _dataset(name: str, seed: int) -> Iterator[dict[str, Any]]:
    from datasets import load_dataset

    path, _, split = name.partition(":")
    try:
        rows = load_dataset(path, split=split or "train", streaming=True)
        yield from rows.shuffle(seed=seed, buffer_size=_BUFFER)
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CapreseError(
            f"prompts {name!r}: neither gym:TASK, nor a .jsonl/.parquet file, nor a dataset that can be loaded "
            f"({first})"
        ) from error
