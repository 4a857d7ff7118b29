"""`caprese push`."""

from __future__ import annotations

from typing import Annotated

import typer

from caprese.commands.options import Json, Private
from caprese.progress import say, show


def push(
    directory: Annotated[str, typer.Argument(help="What caprese recover wrote.")],
    repo: Annotated[str, typer.Argument(help="user/name on the hub; made if it is not there.")],
    private: Private = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be sent; send nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Put an adapter with its report on the model hub, in one commit. The token is `hf auth login`'s, or HF_TOKEN."""
    from caprese.publish import push as publish
    from caprese.report.tables import figures_table

    facts = publish(directory, repo, private=private, dry_run=dry_run)
    show(facts, as_json, lambda found: [figures_table("would push" if dry_run else "pushed", found)])
    if not dry_run:
        say(f"load it: caprese.load(model, {repo!r})")
