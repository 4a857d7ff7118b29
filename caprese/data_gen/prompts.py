"""Where prompts come from: a reasoning-gym task, chains of arithmetic, a JSONL or Parquet file, a `datasets` name."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import random
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from caprese.data_gen.chains import KINDS, chains
from caprese.errors import CapreseError
from caprese.models import broken, encode_prompt

#: Where a chat template says what day it is: samples are the same whenever they are drawn.
TODAY = datetime.date(2024, 7, 26)
# Rows of a streamed dataset that are held to draw the next one from.
_BUFFER = 10_000


Encode = Callable[[str], Sequence[int]]
"""A prompt's text -> its token ids, as the model is asked."""


def encoder(tokenizer: PreTrainedTokenizerBase, instruction: str, chat_template: bool) -> Encode:
    """How prompts become token ids (see `encode_prompt`)."""
    return lambda text: encode_prompt(tokenizer, text, instruction, chat_template, TODAY)


@dataclass(frozen=True)
class Prompt:
    text: str
    answer: str | None = None
    #: the reasoning-gym item it comes from, which its task's own scorer wants to see
    item: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)
    #: its token ids, as the model is asked; empty if there was no tokenizer to ask
    ids: Sequence[int] = field(default=(), compare=False, repr=False)
    #: the kind of prompts it is of
    source: str = field(default="", compare=False)


def load_prompts(
    source: str,
    count: int,
    seed: int,
    column: str = "prompt",
    exclude: Collection[str] = (),
    encode: Encode | None = None,
) -> list[Prompt]:
    """Up to `count` distinct prompts, drawn and ordered by the seed; a smaller count gives the first of a larger one's.

    Args:
        source: "gym:TASK", "chains:SPLIT" (or fetching, local, retrieval), a .jsonl or .parquet file, or the name
            of a dataset ("openai/gsm8k:train").
        column: where a file or dataset has the prompt, as text or as a list of one user message; the answer is in
            "answer" if there is such a column.
        exclude: prompts not to give.
        encode: what gives prompts their token ids; without it they are one if they differ in white space around them.

    Raises:
        CapreseError: unknown source or task, a bad row, an empty prompt, or no prompt at all.
    """
    size = 2 * (count + len(exclude)) + 100
    kind, colon, split = source.partition(":")
    if source.startswith("gym:"):
        rows: Iterable[tuple[int, dict[str, Any]]] = enumerate(_gym(source[4:], size, seed))
        column = "question"
    elif colon and kind in KINDS:
        drawn = islice(chains(split, seed, kind=kind), size)
        rows = enumerate({"question": c.question, "answer": c.answer} for c in drawn)
        column = "question"
    elif source.endswith((".jsonl", ".parquet")) or os.path.exists(source):  # unlike pathlib's, it takes any string
        rows = list(enumerate(_file(Path(source))))
        random.Random(seed).shuffle(rows)
    else:
        rows = enumerate(_dataset(source, seed))

    prompts = (
        Prompt(*_read(row, column, f"{source}, row {number + 1}"), row if source.startswith("gym:") else None)
        for number, row in rows
    )
    found, excluded = distinct(prompts, count, exclude, encode)
    if not found:
        raise CapreseError(
            f"{source} holds no prompts" + (" but those the adapter was trained on; give others" if excluded else "")
        )
    return found


def distinct(
    prompts: Iterable[Prompt], count: int, exclude: Collection[str] = (), encode: Encode | None = None
) -> tuple[list[Prompt], bool]:
    """The first `count` that differ, with their token ids, and whether any was left out for `exclude`.

    Two prompts are one if they are the same tokens to the model, as those that differ in white space often are.
    """

    def ids_of(text: str) -> tuple[int, ...]:
        return () if encode is None else tuple(encode(text))

    known = {ids_of(text) or text.strip() for text in exclude}
    seen: dict[Hashable, Prompt] = {}
    excluded = False
    for prompt in prompts if count else ():
        ids = ids_of(prompt.text)
        key = ids or prompt.text.strip()
        if key in known:
            excluded = True
            continue
        seen.setdefault(key, replace(prompt, ids=ids))
        if len(seen) >= count:
            break
    return list(seen.values()), excluded


def _read(row: Mapping[str, Any], column: str, place: str) -> tuple[str, str | None]:
    """(prompt, answer if there is one) of a row."""
    text, answer = row.get(column), row.get("answer")
    if isinstance(text, list) and text and all(isinstance(m, dict) and "content" in m for m in text):
        roles = [str(m.get("role")) for m in text]
        if roles != ["user"]:
            raise CapreseError(
                f"{place}: {len(text)} messages ({', '.join(roles)[:80]!a}) in column {column!r}; a prompt is one user "
                "message"
            )
        text = text[0]["content"]
        if isinstance(text, list) and len(text) == 1 and isinstance(text[0], dict):  # in parts
            text = text[0].get("text")
    if not isinstance(text, str):
        kind = "" if text is None else f" but {type(text).__name__}"
        raise CapreseError(
            f"{place}: no text in column {column!r}{kind} (columns: {', '.join(map(_shown, row))}); see `column`"
        )
    if not text.strip():
        raise CapreseError(f"{place}: the prompt is empty; remove the row")
    if answer is not None:
        answer = None if answer != answer else str(answer)  # NaN is how pandas writes that there is none
    for name, value in ((column, text), ("answer", answer)):
        if value is not None and (bad := broken(value)):
            raise CapreseError(f"{place}: {bad} in column {name!r}, no valid text; mend or remove the row")
    return text, answer


def _shown(name: object) -> str:
    """A foreign name as one may print it."""
    return str(name) if str(name).isprintable() else ascii(name)


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
    try:
        dataset = reasoning_gym.create_dataset(task, size=size, seed=far)
    except Exception as error:  # some tasks want settings of their own
        raise CapreseError(f"reasoning-gym does not make {task!r} ({error}); choose another task") from error
    return (dataset[i] for i in range(size))


def _file(path: Path) -> Iterator[dict[str, Any]]:
    if path.is_dir():
        raise CapreseError(f"{path} is a directory; give a .jsonl or .parquet file")
    if not path.is_file():
        raise CapreseError(f"no prompt file at {path}")
    if path.suffix in (".csv", ".tsv"):
        raise CapreseError(f"{path}: prompts are read from .jsonl and .parquet, not from {path.suffix}; convert it")
    try:
        yield from _parquet(path) if path.suffix == ".parquet" else _lines(path)
    except OSError as error:
        raise CapreseError(f"cannot read {path} ({error.strerror or error}); make it readable") from error


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        yield from pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise CapreseError(f"{path} is not a readable Parquet file ({first}); write it again") from error


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    wanted = "one object with a 'prompt' per line"
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            place = f"{path}, line {number}"
            if number == 1 and line.startswith((b"\x1f\x8b", b"PK\x03\x04", b"\x28\xb5\x2f\xfd")):
                raise CapreseError(f"{path} is compressed; unpack it first")
            if b"\0" in line or line.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise CapreseError(f"{place}: not UTF-8 text but UTF-16 or binary; save the file as UTF-8")
            try:
                text = line.decode("utf-8-sig").strip()  # Notepad and PowerShell begin files with a byte order mark
                if not text:
                    continue
                row = json.loads(text, object_pairs_hook=_object)
            except UnicodeDecodeError as error:
                raise CapreseError(f"{place}: not UTF-8 text; save the file as UTF-8") from error
            except (ValueError, RecursionError) as error:
                if text.startswith("["):
                    wanted += ", no list over several lines"
                raise CapreseError(f"{place}: not JSON ({getattr(error, 'msg', error)}); {wanted}") from error
            if not isinstance(row, dict):
                raise CapreseError(f"{place}: not an object but {type(row).__name__}; {wanted}")
            yield row


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, n in Counter(name for name, _ in pairs).items() if n > 1)
        raise ValueError(f"{twice!a} is there twice")
    return found


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
