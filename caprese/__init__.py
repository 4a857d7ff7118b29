"""caprese: cheaper inference for causal LMs, with the quality given back."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from caprese.adapters import save as save
    from caprese.efficient_methods import Q4 as Q4
    from caprese.efficient_methods import Q8 as Q8
    from caprese.efficient_methods import Cats as Cats
    from caprese.efficient_methods import Griffin as Griffin
    from caprese.efficient_methods import Int8 as Int8
    from caprese.efficient_methods import Mamba as Mamba
    from caprese.efficient_methods import Nf4 as Nf4
    from caprese.efficient_methods import Nothing as Nothing
    from caprese.efficient_methods import Static as Static
    from caprese.efficient_methods import Teal as Teal
    from caprese.efficient_methods import Tokens as Tokens
    from caprese.efficient_methods import apply as apply
    from caprese.efficient_methods import calibrate as calibrate
    from caprese.efficient_methods import dense as dense
    from caprese.efficient_methods import drop_dense as drop_dense
    from caprese.efficient_methods import phases as phases
    from caprese.efficient_methods import remove as remove
    from caprese.efficient_methods import reselection as reselection
    from caprese.errors import CapreseError as CapreseError
    from caprese.exports import export as export
    from caprese.inference import fuse as fuse
    from caprese.inference import load as load
    from caprese.inference import unfuse as unfuse
    from caprese.inference.lossless import Lossless as Lossless
    from caprese.models import load_base as load_base
    from caprese.publish import info as info
    from caprese.publish import push as push
    from caprese.recipes import Recipe as Recipe
    from caprese.recipes import resolve_recipe as resolve_recipe
    from caprese.recovery.recover import recover as recover

_PUBLIC = {
    "CapreseError": "errors",
    "Cats": "efficient_methods",
    "Griffin": "efficient_methods",
    "Int8": "efficient_methods",
    "Lossless": "inference.lossless",
    "Mamba": "efficient_methods",
    "Nf4": "efficient_methods",
    "Nothing": "efficient_methods",
    "Q4": "efficient_methods",
    "Q8": "efficient_methods",
    "Recipe": "recipes",
    "Static": "efficient_methods",
    "Teal": "efficient_methods",
    "Tokens": "efficient_methods",
    "apply": "efficient_methods",
    "calibrate": "efficient_methods",
    "dense": "efficient_methods",
    "drop_dense": "efficient_methods",
    "export": "exports",
    "fuse": "inference",
    "info": "publish",
    "load": "inference",
    "load_base": "models",
    "phases": "efficient_methods",
    "push": "publish",
    "recover": "recovery.recover",
    "remove": "efficient_methods",
    "reselection": "efficient_methods",
    "resolve_recipe": "recipes",
    "save": "adapters",
    "unfuse": "inference",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    """Import on first use: `caprese --help` need not wait for torch."""
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"caprese.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'caprese' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_PUBLIC]
