"""The command line: it gathers the verbs of `caprese.commands`, and turns what a user can mend into one line."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from typing import Annotated, Any

import typer

from caprese import __version__
from caprese.commands import bench, eval, export, generate, info, methods, push, recipes, recover, scale
from caprese.errors import CapreseError

# peft imports it, and it reports on kernels nobody asked for
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
recipes_app = typer.Typer(no_args_is_help=True, help="List, show, copy and check recipes.")


def verb(function: Callable[..., None]) -> Callable[..., None]:
    """One clear line instead of a traceback for what a user can mend."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        from caprese.progress import console

        try:
            function(*args, **kwargs)
        except CapreseError as error:
            console.print(f"[red]error:[/red] {_escaped(error)}", highlight=False, soft_wrap=True)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            console.print("\n[yellow]stopped.[/yellow] Finished work is kept: run the same command again to go on.")
            raise typer.Exit(130) from None

    return run


def _escaped(error: Exception) -> str:
    from rich.markup import escape

    return escape(" ".join(str(error).split()))


def _version(on: bool) -> None:
    if on:
        print(f"caprese {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Make a causal LM's inference cheaper, and give back what that cost."""


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
)
RECIPE_VERBS: tuple[Callable[..., None], ...] = (recipes.ls, recipes.show, recipes.cp, recipes.validate)
for function in VERBS:
    app.command()(verb(function))
app.add_typer(recipes_app, name="recipes")
for function in RECIPE_VERBS:
    recipes_app.command()(verb(function))


def run() -> None:
    """Entry point."""
    app()
