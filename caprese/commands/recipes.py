"""`caprese recipes`."""

from __future__ import annotations

from pathlib import Path

from caprese import progress
from caprese.commands.options import Json
from caprese.errors import CapreseError


def ls(as_json: Json = False) -> None:
    """The recipes that come with caprese."""
    from caprese.efficient_methods import describe_methods
    from caprese.models import ALIASES
    from caprese.recipes import names, resolve_recipe

    recipes = {name: resolve_recipe(name) for name in names()}
    lines = (
        f"{name:32} {ALIASES.get(r.model or '', r.model):44} {describe_methods(r.methods)} on {r.methods[0].layers}, "
        f"rank {r.rank}, {r.samples.train} samples"
        for name, r in recipes.items()
    )
    progress.show({name: r.model_dump(mode="json") for name, r in recipes.items()}, as_json, lambda _: lines)


def show(name: str, as_json: Json = False) -> None:
    """A recipe with every default filled in."""
    from caprese.recipes import resolve_recipe

    recipe = resolve_recipe(name)
    progress.show(recipe.model_dump(mode="json"), as_json, lambda _: [recipe.to_yaml().rstrip()])


def cp(name: str, target: Path) -> None:
    """Copy a recipe to a file of your own."""
    from caprese.files import write_text
    from caprese.recipes import resolve_recipe

    if target.is_dir():
        target = target / f"{Path(name).name.removesuffix('.yaml')}.yaml"
    if target.exists():
        raise CapreseError(f"{target} exists; choose another name")
    write_text(target, resolve_recipe(name).to_yaml())
    progress.write(str(target))


def validate(name: str, as_json: Json = False) -> None:
    """Check a recipe: keys, values, method and model name."""
    from caprese.models import resolve
    from caprese.recipes import resolve_recipe

    recipe = resolve_recipe(name)
    if recipe.model is not None:
        resolve(recipe.model)
    progress.show({"valid": True}, as_json, lambda _: [f"{name}: valid"])
