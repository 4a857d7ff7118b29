"""Results as tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from caprese.report.sources import COLUMNS, source_rows, source_warning
from caprese.report.summary import duration, recovered, summary_lines, summary_table


def figures_table(title: str, figures: Mapping[str, Any]) -> Table:
    """Named figures, one a row; those that are None are left out."""
    table = Table(title=title, show_header=False)
    for key, value in figures.items():
        if value is not None:
            table.add_row(key.replace("_", " ").replace(" seconds", " time"), _shown(key, value))
    return table


def _shown(key: str, value: Any) -> str:
    if isinstance(value, list):
        return "\n".join(map(str, value))
    if isinstance(value, dict):
        return "\n".join(f"{name} {_shown(key, each)}" for name, each in value.items())
    if key.endswith("seconds"):
        return duration(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)


def describe_recovery(report: dict[str, Any]) -> Iterator[RenderableType]:
    """What `recover` reports."""
    yield summary_table(report)
    yield from _by_source(report)
    yield from summary_lines(report)


def describe_evaluation(report: dict[str, Any]) -> Iterator[RenderableType]:
    """What `eval` measures."""
    yield summary_table(report)
    yield from _by_source(report)
    yield f"Recovered: {recovered(report) or 'not measured'}"


def _by_source(report: dict[str, Any]) -> Iterator[RenderableType]:
    if rows := source_rows(report):
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for i, column in enumerate(COLUMNS):
            table.add_column(column, justify="left" if i == 0 else "right")
        for cells in rows:
            table.add_row(*cells)
        yield table
    if (warning := source_warning(report)) is not None:
        yield Text(warning, "yellow")


def describe_overview(facts: dict[str, Any]) -> Iterator[RenderableType]:
    """The methods, and which go together."""
    pairs = facts["composition"]
    table = Table("method", "what it does", "chooses from", "settings", title="methods")
    for name, fact in facts["methods"].items():
        settings = ", ".join(f"{k}={v}" for k, v in fact["settings"].items() if k != "layers")
        table.add_row(name, fact["summary"], ", ".join(fact["learns_from"]) or "-", settings)
    yield table
    table = Table("", *pairs, title="alone and together: weights of a gated FFN still read, at default settings")
    for one, others in pairs.items():
        cells = [each.get("ffn_weights_read") for each in others.values()]
        table.add_row(one, *("-" if cell is None else f"{cell['gated']:.0%}" for cell in cells))
    yield table
    yield "not together:"
    names = list(pairs)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            if not pairs[one][other]["composes"] and "none" not in (one, other):
                yield f"  {one} with {other}: {pairs[one][other]['reason']}"
    yield "  none with any: it takes nothing away"
    yield "  teal acts on FFN and attention; teal:where=attention or teal:where=ffn on one of them alone"
    yield f"families, all with every method: {', '.join(f'{k} ({v} FFN)' for k, v in facts['families'].items())}"
