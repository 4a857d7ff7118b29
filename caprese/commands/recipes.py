"""`caprese recipes`."""

from __future__ import annotations

import json
from pathlib import Path

from caprese.commands.options import Json
from caprese.errors import CapreseError


def ls(as_json: Json = False) -> None:
    """The recipes that come with caprese."""
    from caprese.efficient_methods import describe_methods
    from caprese.models import ALIASES
    from caprese.recipes import names, resolve_recipe

    rows = {name: resolve_recipe(name) for name in names()}
    if as_json:
        print(json.dumps({name: r.model_dump(mode="json") for name, r in rows.items()}, indent=2))
        return
    for name, r in rows.items():
        print(
            f"{name:32} {ALIASES.get(r.model or '', r.model):44} {describe_methods(r.make_methods())} on {r.layers}, "
            f"rank {r.rank}, {r.samples.train} samples"
        )


def show(name: str, as_json: Json = False) -> None:
    """A recipe with every default filled in."""
    from caprese.recipes import resolve_recipe

    recipe = resolve_recipe(name)
    print(
        json.dumps(recipe.model_dump(mode="json"), indent=2) if as_json else recipe.to_yaml(),
        end="\n" if as_json else "",
    )


def cp(name: str, target: Path) -> None:
    """Copy a recipe to a file of your own."""
    from caprese.files import write_text
    from caprese.recipes import resolve_recipe

    if target.is_dir():
        target = target / f"{name}.yaml"
    if target.exists():
        raise CapreseError(f"{target} exists; choose another name")
    write_text(target, resolve_recipe(name).to_yaml())
    print(target)


def validate(name: str, as_json: Json = False) -> None:
    """Check a recipe: keys, values, method and model name."""
    from caprese.models import resolve
    from caprese.recipes import resolve_recipe

    recipe = resolve_recipe(name)
    recipe.make_methods()
    if recipe.model is not None:
        resolve(recipe.model)
    print(json.dumps({"valid": True}) if as_json else f"{name}: valid")
