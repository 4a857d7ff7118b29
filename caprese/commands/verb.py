"""What every verb does around its work: which output it gives, and one line for what a user can mend."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import re
import typing
import warnings
from collections.abc import Callable
from typing import Any

import typer
from typer.models import OptionInfo

from caprese import progress
from caprese.commands.options import MADE_FOR
from caprese.errors import CapreseError


def is_main() -> bool:
    """Whether this is the first of several processes, the only one that speaks."""
    return os.environ.get("RANK", "0") == "0"


def verb(function: Callable[..., None]) -> Callable[..., None]:
    """`function` as a command: with --json nothing but JSON on stdout, and one clear line instead of a traceback.

    Args:
        function: takes its flags as parameters, or, where they are many, one dataclass whose fields they are.
    """
    kind = flags_of(function)

    @functools.wraps(function)
    def run(**kwargs: Any) -> None:
        try:
            _settle(quiet=kwargs.get("as_json", False) or not is_main())
            function(**kwargs) if kind is None else function(kind(**kwargs))
        except CapreseError as error:
            progress.alert("error:", in_flags(str(error), function))
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            progress.alert("stopped.", "Finished work is kept: run the same command again to go on.", "yellow")
            raise typer.Exit(130) from None

    if kind is not None:  # typer reads a command's flags from its signature
        hints = hints_of(function)
        run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [
                parameter.replace(kind=parameter.KEYWORD_ONLY, annotation=hints[name])
                for name, parameter in inspect.signature(kind).parameters.items()
            ]
        )
        run.__annotations__ = hints
    return run


def flags_of(function: Callable[..., None]) -> type | None:
    """The dataclass that a verb takes in place of parameters, if it does."""
    each = list(typing.get_type_hints(function).values())
    return each[0] if dataclasses.is_dataclass(each[0]) and isinstance(each[0], type) else None


def hints_of(function: Callable[..., None]) -> dict[str, Any]:
    """Type hints of a verb's flags by name, with what typer wants to know of them."""
    return typing.get_type_hints(flags_of(function) or function, include_extras=True)


def _settle(quiet: bool) -> None:
    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils import logging as transformers_logging

    progress.quiet = quiet
    if quiet:
        disable_progress_bars()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=UserWarning, module="peft")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def in_flags(message: str, function: Callable[..., None]) -> str:
    """An error of the library, with the arguments it names as this command's flags.

    `output` becomes --output, `sparsity="auto"` --sparsity auto, `compiled=False` --no-compile.
    """
    flags = dict(_flags(function))

    def flag(found: re.Match[str]) -> str:
        name, value = found["name"], (found["value"] or "").strip("\"'")
        if "made_for" in flags and (places := _places(name, value)):
            return " ".join([flags["made_for"][0], *(places if len(places) == 1 else ())])
        if name not in flags:
            return found[0]
        on, off = flags[name]
        if value == "False" and off:
            return off
        return on if value in ("", "True") else f"{on} {value}"

    return re.sub(r"`(?P<name>\w+)(?:=(?P<value>[^`]+))?`", flag, message)


def _places(name: str, value: str) -> list[str]:
    """What --for may say where a recipe says this; "" for any value."""
    return [place for place, said in MADE_FOR.items() if name in said and value in ("", said[name])]


def _flags(function: Callable[..., None]) -> typing.Iterator[tuple[str, tuple[str, str]]]:
    """For each option of a command its name and its flags: for it, and against it ("" where there is none)."""
    for name, hint in hints_of(function).items():
        for option in getattr(hint, "__metadata__", ()):
            if isinstance(option, OptionInfo):
                said = (option.default, *(option.param_decls or ()))  # in Annotated, the first comes as the default
                given = next((text for text in said if isinstance(text, str) and text.startswith("--")), "")
                on, _, off = (given or f"--{name.replace('_', '-')}").partition("/")
                yield name, (on, off)
