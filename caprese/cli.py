"""The command line: it gathers the verbs of `caprese.commands`."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Annotated

import typer

from caprese import __version__
from caprese.commands import bench, doctor, eval, export, generate, info, methods, push, recipes, recover, scale
from caprese.commands.verb import verb
from caprese.progress import write

# peft imports it, and it reports on kernels nobody asked for
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

VERBS: tuple[Callable[..., None], ...] = (
    recover.recover,
    generate.generate,
    eval.eval,
    bench.bench,
    scale.scale,
    push.push,
    info.info,
    export.export,
    methods.methods,
    doctor.doctor,
)
RECIPE_VERBS: tuple[Callable[..., None], ...] = (recipes.ls, recipes.show, recipes.cp, recipes.validate)

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
recipes_app = typer.Typer(no_args_is_help=True, help="List, show, copy and check recipes.")
for function in VERBS:
    app.command()(verb(function))
for function in RECIPE_VERBS:
    recipes_app.command()(verb(function))
app.add_typer(recipes_app, name="recipes")


def _version(on: bool) -> None:
    if on:
        write(f"caprese {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Make a causal LM's inference cheaper, and give back what that cost."""


def run() -> None:
    """Entry point."""
    app()
