"""`caprese methods`."""

from __future__ import annotations

from caprese.commands.options import Json
from caprese.progress import show


def methods(as_json: Json = False) -> None:
    """The methods, the model families, and which methods go together."""
    from caprese.efficient_methods.overview import overview
    from caprese.report.tables import describe_overview

    show(overview(), as_json, describe_overview)
