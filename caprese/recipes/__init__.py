"""One YAML per model: a complete, reproducible run."""

from caprese.recipes.recipe import DIRECTORY, Recipe, names, read_yaml, resolve_recipe

__all__ = ["DIRECTORY", "Recipe", "names", "read_yaml", "resolve_recipe"]
