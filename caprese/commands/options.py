"""What several verbs take, and how it is read."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import typer

from caprese.errors import CapreseError

Model = Annotated[str, typer.Option("--model", "-m", help="Alias, hub id or local directory.")]
Adapter = Annotated[
    str, typer.Option("--adapter", "-a", help="Recovery adapter: a directory, or a hub id, user/name or user/name@rev.")
]
Private = Annotated[
    bool | None,
    typer.Option("--private/--public", help="Of a repository that is made new; default as the account's."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON to stdout, nothing else.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, ...")]
Reselect = Annotated[
    int | None,
    typer.Option(help="Generated tokens between two reselections; 0 never; default as the adapter was made."),
]
Prompts = Annotated[
    Literal["dense", "efficient", "stored"] | None,
    typer.Option(
        help="How prompts run: dense; efficient: through what is left; stored: through all neurons as they are "
        "stored. Default as the adapter was made."
    ),
]
Seed = Annotated[int, typer.Option(help="Of everything random.", min=0, max=2**32 - 1)]
Dtype = Annotated[str, typer.Option(help="auto (float32 on CPU), float32, bfloat16 or float16.")]
QuickDtype = Annotated[str, typer.Option(help="auto (on CPU the faster one, measured), float32, bfloat16 or float16.")]
#: what `--for` says in a recipe's words
MADE_FOR: dict[str, dict[str, Any]] = {
    "caprese": {"prefill": "dense", "alternatives": ()},
    "export": {"prefill": "efficient", "alternatives": ()},
    "speed": {"prefill": "dense", "alternatives": "default"},
    "lossless": {"prefill": "dense", "alternatives": (), "end_to_end.objective": "tv"},
}


# no model has as many layers; a range up to a slip of the finger fills the memory
_MANY = 100_000


def parse_layers(text: str | None) -> str | list[int] | None:
    """all, first-half, or numbers and ranges."""
    if text is None or text in ("all", "first-half"):
        return text
    return parse_numbers(text, f"--layers {text!r}: use all, first-half, or numbers like 0,1,4-7")


def parse_numbers(text: str, remedy: str) -> list[int]:
    """Numbers and ranges: 0,1,4-7."""
    numbers: list[int] = []
    try:
        for part in text.split(","):
            low, _, high = part.strip().partition("-")
            if not int(low) <= int(high or low) < _MANY:
                raise ValueError
            numbers += range(int(low), int(high or low) + 1)
    except ValueError:
        raise CapreseError(remedy) from None
    return numbers


def parse_bytes(text: str) -> int:
    """80GB, 80GiB, 512MB, or a number of bytes."""
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)\s*(?:([KMGT])(i?)B?)?", text.strip(), re.IGNORECASE)
    size = 0
    if found is not None:
        number, unit, binary = found.groups()
        size = int(float(number) * (1024 if binary else 1000) ** (" KMGT".index(unit.upper()) if unit else 0))
    if size < 1:
        raise CapreseError(f"{text[:40]!r} is no memory; give it like 80GB")
    return size


def parse_quick(dtype: str) -> str:
    """A `QuickDtype` as `load_base` takes it."""
    return "quickest" if dtype == "auto" else dtype


def parse_reselect(every: int | None) -> Any:
    return "saved" if every is None else every or None


def parse_sparsity(text: str | None) -> float | list[float] | str | None:
    if text is None or text == "auto":
        return text
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        raise CapreseError(f"--sparsity {text!r}: use a number in (0, 1), a list 0.3,0.5,..., or auto") from None
    return numbers if len(numbers) > 1 else numbers[0]


def parse_keep_attention(text: str | None) -> Any:
    """A fraction, or numbers and ranges."""
    if text is None:
        return None
    remedy = f"--keep-attention {text!r}: use a fraction from 0 to below 1, like 0.5, or numbers like 0,5,11"
    if "." not in text and text != "0":
        return parse_numbers(text, remedy)
    try:
        return float(text)
    except ValueError:
        raise CapreseError(remedy) from None


def parse_rank(text: str | None) -> int | str | None:
    if text is None or text == "auto":
        return text
    if not text.isdecimal() or len(text) > 9 or int(text) < 1:
        raise CapreseError(f"--rank {text[:40]}: use a number from 1, or auto")
    return int(text)
