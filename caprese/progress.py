"""The one place that prints: notes, progress bars and errors to stderr, results to stdout.

What is printed may come from anywhere (paths, an adapter's files, what a model writes), so nothing of it is read as
markup, and nothing of it reaches the terminal as a command: styles are given apart from the text, and control
characters are shown as they would be written in Python.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

# All of C0 and C1 but tab and newline, what turns the direction of writing, and halves of surrogate pairs.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
quiet = False


def clean(text: str) -> str:
    """A text that a terminal can only show: escape sequences and the like written out, as in "\\x1b[31m"."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class _Console(Console):
    """Shows every string as it is, also in tables: no markup, no emoji codes, no colours of its own."""

    def __init__(self, **how: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **how)

    def render_str(self, text: str, **how: Any) -> Text:
        return super().render_str(clean(text), **how)


console = _Console(stderr=True)


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.1f} {self.unit}/s" if speed else "", style="cyan")


def alert(head: str, message: str, style: str = "red") -> None:
    """One line to the user, always: an error, or that work was stopped."""
    text = Text.assemble((head, style), " ", clean(" ".join(message.split())))
    console.print(text, soft_wrap=True)


def say(*parts: str | tuple[str, str]) -> None:
    """One line to the user, unless quiet.

    Args:
        parts: texts, or (text, style).
    """
    if not quiet:
        each = (clean(part) if isinstance(part, str) else (clean(part[0]), part[1]) for part in parts)
        console.print(Text.assemble(*each), soft_wrap=True)


def write(text: str, end: str = "\n") -> None:
    """Text to stdout, at once."""
    sys.stdout.write(clean(text) + end)
    sys.stdout.flush()


def show(result: Any, as_json: bool, describe: Callable[[Any], Iterable[RenderableType]]) -> None:
    """A result to stdout: as JSON, or as `describe` makes tables and lines of it."""
    if as_json:
        sys.stdout.write(json.dumps(result, indent=2).replace("\x7f", "\\u007f") + "\n")
        return
    for part in describe(result):
        write(part) if isinstance(part, str) else _Console().print(part)


@contextmanager
def bar(label: str, total: int, unit: str, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Yields `advance(n)`.

    Args:
        done: what an earlier run already did.
    """
    columns = (
        TextColumn("{task.description:<28}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(unit),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=console, disable=quiet) as progress:
        task = progress.add_task(clean(label), total=total, completed=done)
        yield lambda n: progress.advance(task, n)
