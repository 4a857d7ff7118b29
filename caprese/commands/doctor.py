"""`caprese doctor`."""

from __future__ import annotations

from typing import Annotated

import typer

from caprese.commands.options import Json
from caprese.progress import show


def doctor(
    directory: Annotated[
        str | None, typer.Argument(help="An adapter directory, each file of which is checked.")
    ] = None,
    as_json: Json = False,
) -> None:
    """What this machine has for caprese, or what is wrong with an adapter directory; 1 if anything is."""
    from caprese import doctor as look
    from caprese.report.tables import figures_table

    facts = look.machine() if directory is None else look.directory(directory)
    rest = {key: value for key, value in facts.items() if key != "wrong"}
    title = "this machine" if directory is None else directory
    show(facts, as_json, lambda found: [figures_table(title, rest), *(found["wrong"] or ["nothing is wrong"])])
    if facts["wrong"]:
        raise typer.Exit(1)
