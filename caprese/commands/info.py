"""`caprese info`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from caprese.commands.options import Device, Dtype, Json
from caprese.commands.output import print_table, quiet


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

    quiet(as_json)
    facts = look(adapter, revision=revision, model=model, dtype=dtype, device=device)
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        print_table(adapter, {k: v for k, v in facts.items() if v is not None and k != "quality"})
    if facts.get("fits") is False:
        raise typer.Exit(1)
