"""A recipe is a complete, reproducible run: validated, overridden by flags, written beside its result."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError

from caprese.data_gen import Samples
from caprese.distill import Alignment, EndToEnd, Layerwise
from caprese.efficient_methods import (
    Layers,
    Method,
    Sparse,
    check_sparsity,
    compose,
    find_method,
    make_method,
    parse_methods,
)
from caprese.errors import CapreseError
from caprese.evaluation.config import Evaluation

DIRECTORY = Path(__file__).parent


def _sparsity_or_auto(value: Any) -> Any:
    return value if value is None or value == "auto" else check_sparsity(value)


def _leaves_open(method: str, setting: str) -> bool:
    """Whether any of the methods has a setting and does not say it itself."""
    return any(setting in find_method(f["name"]).model_fields.keys() - f.keys() for f in parse_methods(method))


class Recipe(BaseModel):
    """Everything one run of `recover` depends on."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    model: str | None = None
    """Alias, hub id or local path; may be left out when a loaded model is given."""
    revision: str | None = None
    """Hub revision of the base model."""
    dtype: str = "auto"
    """auto, float32, bfloat16 or float16. auto: the checkpoint's on an accelerator, float32 on CPU."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    method: str = "griffin"
    """What is taken away: a method (caprese methods lists them), with settings if wanted, or several joined by +:
    cats:0.7:threshold=calibrated, static:0.3+cats:0.5."""
    sparsity: Annotated[float | list[float] | Literal["auto"] | None, PlainValidator(_sparsity_or_auto)] = None
    """Fraction removed, of the methods that name none of their own: one number, a list with one for each layer, or
    auto: as much, layer by layer, as target_kl or target_active asks for. null: the method's default, 0.5."""
    layers: Layers = "all"
    """all, first-half, or a list of layer numbers."""
    target_kl: Annotated[float, Field(gt=0)] | None = None
    """sparsity auto: the largest KL(dense || efficient) per token, before recovery."""
    target_active: Annotated[float, Field(gt=0, lt=1)] | None = None
    """sparsity auto: the fraction of the dense model's active parameters to keep."""
    threshold: Literal["prompt", "calibrated"] | None = None
    """cats: tau from each prompt, or from samples once for all."""
    shared_choice: bool | None = None
    """griffin, cats: one choice for all sequences of a batch."""
    keep_attention: float | list[int] | None = None
    """Of a hybrid: the fraction of layers that keep their attention, or which do; null: the method's default, 0.5."""
    reselect_every: Annotated[int, Field(ge=1)] | None = None
    """Generated tokens after which they pass through the dense model once and the choice is made anew; null: never.
    Distillation and evaluation see the same."""
    calibration_samples: Annotated[int, Field(ge=1)] = 64
    """Training samples from which methods such as static and teal choose, and auto measures."""
    rank: Annotated[int, Field(ge=1)] | Literal["auto"] = 256
    """Rank of each branch; auto spreads `budget` over the layers by their measured error curves."""
    budget: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """rank auto: adapter parameters as a fraction of the base."""
    bias: bool = False
    """Also learn a bias on each branch; it costs nothing at inference."""
    seed: Annotated[int, Field(ge=0)] = 0
    output: str = "out"
    """Directory for the result; a rerun goes on there."""
    samples: Samples = Samples()
    alignment: Alignment = Alignment()
    layerwise: Layerwise = Layerwise()
    end_to_end: EndToEnd = EndToEnd()
    evaluation: Evaluation = Evaluation()

    def make_methods(self) -> tuple[Method, ...]:
        """The efficient methods, configured; with sparsity auto, at the default one.

        Raises:
            CapreseError: unknown method or setting, a setting no method takes, or methods that do not compose.
        """
        wanted = {key: value for key in _SETTINGS if (value := getattr(self, key)) is not None}
        methods = []
        for facts in parse_methods(self.method):
            fields = find_method(facts["name"]).model_fields
            own = {key: value for key, value in wanted.items() if key in fields and value != "auto"}
            methods.append(make_method({"layers": self.layers, **own, **facts}))
        self._check_auto(methods)
        for key in wanted:
            if not _leaves_open(self.method, key):
                raise CapreseError(f"`{key}` is no setting of {self.method}, or said there already; leave it out")
        return compose(methods)

    def _check_auto(self, methods: list[Method]) -> None:
        targets = [t for t in (self.target_kl, self.target_active) if t is not None]
        if self.sparsity != "auto":
            if targets:
                raise CapreseError("`target_kl` and `target_active` go with `sparsity=auto`")
            return
        if len(targets) != 1:
            raise CapreseError("`sparsity=auto` needs one of `target_kl` and `target_active`")
        if len(methods) != 1 or not isinstance(methods[0], Sparse):
            raise CapreseError(f"`sparsity=auto` takes one method that has a sparsity, not {self.method}")

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


#: settings of methods that a recipe, or a flag, gives to all that leave them open
_SETTINGS = ("sparsity", "threshold", "shared_choice", "keep_attention")


def names() -> list[str]:
    """The recipes that come with caprese."""
    return sorted(path.stem for path in DIRECTORY.glob("*.yaml"))


def explain(error: ValidationError, source: str) -> CapreseError:
    """pydantic's findings in one line: where, what, and what is allowed."""
    parts = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"]) or "recipe"
        if item["type"] == "extra_forbidden":
            parts.append(f"unknown key {where!r} (caprese recipes show smollm2-135m lists all)")
        else:
            parts.append(f"{where}: {item['msg'].removeprefix('Value error, ').lower()} (given {item['input']!r})")
    return CapreseError(f"{source}: " + "; ".join(dict.fromkeys(parts)))


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`, section by section."""
    merged = dict(base)
    for key, value in over.items():
        known = merged.get(key)
        merged[key] = merge(known, value) if isinstance(known, Mapping) and isinstance(value, Mapping) else value
    return merged


def read_yaml(name: str) -> tuple[dict[str, Any], str]:
    """The raw content of a recipe and where it is from; `name` is a shipped recipe or a file.

    Raises:
        CapreseError: no such recipe, or not YAML.
    """
    path = DIRECTORY / f"{name}.yaml"
    if name not in names():
        path = Path(name).expanduser()
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CapreseError(f"no recipe {name!r}: neither shipped ({', '.join(names())}) nor a file") from error
    except IsADirectoryError as error:
        raise CapreseError(f"recipe {name!r} is a directory; give a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        at = f" at line {mark.line + 1}" if mark else ""
        raise CapreseError(f"recipe {path} is not valid YAML{at}; see caprese recipes show smollm2-135m") from error
    if not isinstance(raw, dict):
        raise CapreseError(f"recipe {path} is not a mapping of keys to values")
    return raw, str(path)


def resolve_recipe(recipe: str | None = None, model: str | None = None, **overrides: Any) -> Recipe:
    """A recipe by name or file, or the one shipped for `model`, or the defaults; `overrides` on top.

    Settings of the recipe's method that another one given in its place does not take go with it.

    Raises:
        CapreseError: unknown recipe, bad YAML, or a value that does not fit; the line names the key.
    """
    raw: dict[str, Any] = {}
    source = "recipe"
    if recipe is not None:
        raw, source = read_yaml(recipe)
    elif model in names():
        raw, source = read_yaml(model)
    if model is not None:
        overrides["model"] = model
    if isinstance(method := overrides.get("method"), str):
        raw = {key: value for key, value in raw.items() if key not in _SETTINGS or _leaves_open(method, key)}
        if any(find_method(f["name"]).no_reselection for f in parse_methods(method)):
            raw.pop("reselect_every", None)
    try:
        return Recipe.model_validate(merge(raw, overrides))
    except ValidationError as error:
        raise explain(error, source) from error
