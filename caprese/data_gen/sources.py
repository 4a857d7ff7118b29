"""Mixtures of prompts: which sources, in which shares."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from caprese.errors import CapreseError

#: the source that needs the model itself: prompts that it writes as its user
OWN = "self"
#: digits of a share, of 1
PLACES = 9


class Source(BaseModel):
    """One kind of prompts."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)

    source: str
    """gym:TASK (reasoning-gym), chains:SPLIT (also fetching, local, retrieval), a .jsonl or .parquet file, a `datasets`
    name, optionally with :SPLIT, or self: the model writes them as its user would."""
    share: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Part of the prompts that are of this kind, relative to the others'."""
    column: str | None = None
    """Column of a file or dataset that holds the prompt; null: that of the samples."""
    instruction: str | None = None
    """Put before each of these prompts; null: that of the samples, and nothing before those of `self`."""

    def __str__(self) -> str:
        return self.source


def read_sources(value: Any) -> tuple[Source, ...]:
    """A mixture from how it is spelled.

    Args:
        value: one source, "gym:gsm_symbolic=0.5,self=0.5", or a list of sources, each as {source, share, column,
            instruction}.

    Raises:
        CapreseError: nothing, a share that is none, an unknown key, or a source twice.
    """
    each: Sequence[Any] = _split(value) if isinstance(value, str) else value if isinstance(value, list | tuple) else ()
    if not each:
        raise CapreseError(
            f"prompts {value!r}: give a source, several with shares (gym:gsm_symbolic=0.5,self=0.5), or a list of "
            "{source, share, column, instruction}"
        )
    try:
        found = tuple(one if isinstance(one, Source) else Source.model_validate(_named(one)) for one in each)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "source"
        raise CapreseError(f"prompts {value!r}: {where}: {first['msg'].lower()}") from error
    keys = [(one.source, one.column) for one in found]
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise CapreseError(f"prompts {value!r}: {twice[0]} is there twice; give it one share")
    total = sum(one.share for one in found)
    for one in found:
        if not math.isfinite(total) or not round(one.share / total, PLACES):
            raise CapreseError(f"prompts {value!r}: the share of {one.source} is too far from the others'")
    if any(not one.source.strip() for one in found):
        raise CapreseError(f"prompts {value!r}: a source without a name")
    return found


def _named(one: Any) -> Any:
    return {"source": one} if isinstance(one, str) else dict(one) if isinstance(one, Mapping) else one


def _split(line: str) -> list[dict[str, Any]]:
    """The sources of a line; a file whose name holds a comma or an equals sign is one source."""
    if os.path.exists(line):  # unlike pathlib's, it takes any string
        return [{"source": line}]
    found = []
    for part in line.split(","):
        name, equals, share = part.strip().rpartition("=")
        found.append({"source": name, "share": share} if equals and _is_number(share) else {"source": part.strip()})
    return found


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def share_out(count: int, shares: Sequence[float]) -> list[int]:
    """`count` divided in proportion to `shares`: whole numbers that add up to it, and never fall as it grows."""
    total = sum(shares)
    taken = [max(0, math.floor(count * share / total) - len(shares)) for share in shares]  # at most what each ends with
    for _ in range(count - sum(taken)):  # the next one goes to whoever is furthest behind
        chosen = min(range(len(shares)), key=lambda i: ((taken[i] + 0.5) * total / shares[i], i))
        taken[chosen] += 1
    return taken


def interleave(groups: Sequence[Sequence[Any]], shares: Sequence[float]) -> list[Any]:
    """All that is in `groups`, evenly mixed: any beginning holds them in about their shares, and is the same whatever
    follows."""
    placed = [((i + 0.5) / shares[g], g, one) for g, group in enumerate(groups) for i, one in enumerate(group)]
    return [one for _, _, one in sorted(placed, key=lambda each: each[:2])]


def name_of(sources: Sequence[Source]) -> str:
    """A mixture in a line: "gym:gsm_symbolic=0.5,self=0.5"."""
    if len(sources) == 1:
        return sources[0].source
    total = math.fsum(one.share for one in sources)
    return ",".join(f"{one.source}={one.share / total:g}" for one in sources)
