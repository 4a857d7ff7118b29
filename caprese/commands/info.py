"""`caprese info`."""

from __future__ import annotations

from typing import Annotated

import typer

from caprese.commands.options import Device, Dtype, Json
from caprese.progress import show


def info(
    adapter: Annotated[str, typer.Argument(help="Directory or hub id, user/name or user/name@revision.")],
    model: Annotated[str | None, typer.Option("--model", "-m", help="A base: does the adapter fit it?")] = None,
    revision: Annotated[str | None, typer.Option(help="Hub revision of the adapter.")] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """What an adapter is, what it needs, and whether it fits a base (by its weights, not its name)."""
    from caprese.publish import info as look
    from caprese.report.tables import figures_table

    facts = look(adapter, revision=revision, model=model, dtype=dtype, device=device)
    show(facts, as_json, lambda found: [figures_table(adapter, {**found, "quality": None})])
    if facts.get("fits") is False:
        raise typer.Exit(1)
