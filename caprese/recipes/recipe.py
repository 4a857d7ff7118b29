"""A recipe is a complete, reproducible run: validated, overridden by flags, written beside its result."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    ValidationError,
    model_validator,
)

from caprese.data_gen import Samples
from caprese.distill import Alignment, Branches, EndToEnd, Layerwise
from caprese.efficient_methods import Griffin, Method, Prefill, Sparse, check_prefill, describe_methods, facts_of
from caprese.efficient_methods.compose import parse_methods
from caprese.errors import CapreseError
from caprese.evaluation.config import Evaluation
from caprese.files import path_of
from caprese.limits import LONGEST, Count, Seed
from caprese.models.residency import Residency
from caprese.recipes.spelling import fold, override, read_methods

DIRECTORY = Path(__file__).parent
#: alternatives for speed: fewer bits, fewer neurons, and both
FASTEST = (
    "q8:head=true",
    "q4:scales=calibrated+q8:where=none:head=true",
    "q4:scales=calibrated:head=true",
    *(
        f"griffin:{sparsity}{bits}"
        for sparsity in (0.25, 0.5)
        for bits in ("", "+q8:head=true", "+q4:scales=calibrated:head=true")
    ),
)
# what stands for methods until they are measured
_UNDECIDED = [{"name": "none", "layers": "all"}]


def _facts(methods: Sequence[Method]) -> list[dict[str, Any]]:
    return [facts_of(method) for method in methods]


class Recipe(BaseModel):
    """Everything one run of `recover` depends on."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, str_max_length=LONGEST)

    model: str | None = None
    """Alias, hub id or local path; may be left out when a loaded model is given."""
    revision: str | None = None
    """Hub revision of the base model."""
    dtype: str = "auto"
    """auto, float32, bfloat16 or float16. auto: the checkpoint's on an accelerator, float32 on CPU."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    residency: Residency = "whole"
    """Where the base's decoder layers are while they do not run: whole in memory; sharded over the processes of a run
    (FSDP2); streamed from the checkpoint, one at a time, for end_to_end.epochs 0."""
    methods: Annotated[tuple[Method, ...], PlainValidator(read_methods), PlainSerializer(_facts)] = (Griffin(),)
    """What is taken away, each method with its settings (caprese methods lists them), in the order in which they act.
    Also spelled `method: static:0.3+cats:0.5`, with settings beside it that are those of all methods that leave them
    open: sparsity, threshold, shared_choice, keep_attention, layers."""
    alternatives: Annotated[tuple[str, ...], BeforeValidator(lambda v: FASTEST if v == "default" else v)] = ()
    """In place of methods: lines such as griffin:0.5+q8, all measured, of which the one with the least time to next
    token on this machine is taken whose KL(dense || efficient) is within `target_kl`, before recovery. default: those
    of recipes.FASTEST."""
    target_kl: Annotated[float, Field(gt=0)] | None = None
    """In place of a sparsity: as much is removed, layer by layer, as keeps KL(dense || efficient) per token below it,
    before recovery."""
    target_active: Annotated[float, Field(gt=0, lt=1)] | None = None
    """In place of a sparsity: as much, layer by layer, as leaves this fraction of the active parameters."""
    reselect_every: Count | None = None
    """Generated tokens after which they pass through the dense model once and the choice is made anew; null: never.
    Distillation and evaluation see the same."""
    prefill: Prefill = "dense"
    """How prompts run: dense, as in the paper and in caprese; efficient, through what is left, as an exported
    checkpoint runs them in any engine; or stored, through all neurons that are not removed for good, in the bits that
    methods store, which saves the memory of a dense copy. Calibration, distillation and evaluation see the same."""
    calibration_samples: Count = 64
    """Training samples from which methods such as static and teal choose, and auto measures."""
    rank: Count | Literal["auto"] = 256
    """Rank of each branch; auto spreads `budget` over the layers by their measured error curves."""
    budget: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """rank auto: adapter parameters as a fraction of the base."""
    bias: bool = False
    """Also learn a bias on each branch; it costs nothing at inference."""
    autocast: bool = False
    """Sampling and training multiply in bfloat16 where this machine is faster at it, which is measured when a run
    begins, and the model is in float32; what is measured of the result is not."""
    seed: Seed = 0
    output: str = "out"
    """Directory for the result; a rerun goes on there."""
    samples: Samples = Samples()
    alignment: Alignment = Alignment()
    layerwise: Layerwise = Layerwise()
    end_to_end: EndToEnd = EndToEnd()
    evaluation: Evaluation = Evaluation()

    @model_validator(mode="before")
    @classmethod
    def _folded(cls, raw: Any) -> Any:
        if not isinstance(raw, Mapping):
            return raw
        folded = fold(raw)
        return {"methods": _UNDECIDED, **folded} if folded.get("alternatives") else folded

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.alternatives:
            if [facts_of(method) for method in self.methods] != _UNDECIDED:
                raise CapreseError(
                    "several methods are to be measured, with all their settings; leave out method, sparsity and layers"
                )
            if self.target_kl is None or self.target_active is not None:
                raise CapreseError(
                    "the fastest of several methods is that within `target_kl`; give it, and no other target"
                )
            if self.reselect_every is not None:
                raise CapreseError("several methods are measured without reselection; leave out `reselect_every`")
        return self

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        if self.target_kl is not None and self.target_active is not None:
            raise CapreseError("give one of `target_kl` and `target_active`, not both")
        if self.allocates and (len(self.methods) != 1 or not isinstance(self.methods[0], Sparse)):
            raise CapreseError(f"a target takes one method that has a sparsity, not {describe_methods(self.methods)}")
        return self

    @model_validator(mode="after")
    def _prompts_run(self) -> Self:
        for methods in self.compositions:
            check_prefill(self.prefill, methods, self.reselect_every)
        return self

    @property
    def compositions(self) -> list[tuple[Method, ...]]:
        """The methods of each alternative; where there is none to choose, `methods`."""
        return [read_methods(parse_methods(line)) for line in self.alternatives] or [self.methods]

    @property
    def allocates(self) -> bool:
        """Whether each layer's sparsity is to be measured."""
        return not self.alternatives and (self.target_kl is not None or self.target_active is not None)

    @property
    def dense_prompts(self) -> bool:
        """Whether prompts run dense; of several alternatives, the first's."""
        return self.prefill == "dense" and all(method.dense_prompts for method in self.compositions[0])

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """As pydantic's, but what is changed may be spelled as in a file, and is checked.

        Raises:
            CapreseError: an unknown key, or a value that does not fit.
        """
        raw, over = override(self.model_dump(exclude_unset=True), update or {})
        try:
            return self.model_validate(merge(raw, over))
        except ValidationError as error:
            raise explain(error, "recipe") from error

    @property
    def branches(self) -> Branches:
        """The size of the branches."""
        return Branches(self.rank, self.budget, self.bias)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def names() -> list[str]:
    """The recipes that come with caprese."""
    return sorted(path.stem for path in DIRECTORY.glob("*.yaml"))


_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80
_short.maxlevel = 3
# of what a recipe holds, written out: far more than any has
_LARGEST = 100_000


def _check_size(node: yaml.Node | None) -> None:
    """Anchors that hold anchors are a few lines of text, and do not end when they are written out."""
    left, seen = [node], 0
    while left:
        each = left.pop()
        seen += 1
        if seen > _LARGEST:
            raise ValueError(f"over {_LARGEST:,} values")
        if isinstance(each, yaml.MappingNode):
            left += [one for pair in each.value for one in pair]
        elif isinstance(each, yaml.SequenceNode):
            left += each.value


def explain(error: ValidationError, source: str) -> CapreseError:
    """pydantic's findings in one line: where, what, and what is allowed."""
    parts = []
    for item in error.errors():
        where = ".".join(str(part)[:80] for part in item["loc"]) or "recipe"
        if item["type"] == "extra_forbidden":
            parts.append(f"unknown key {where!r} (caprese recipes show smollm2-135m lists all)")
        else:
            parts.append(
                f"{where}: {item['msg'].removeprefix('Value error, ').lower()} (given {_short.repr(item['input'])})"
            )
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
        path = path_of(name)
    try:
        text = path.read_text(encoding="utf-8")
        _check_size(yaml.compose(text, Loader=yaml.SafeLoader))
        raw = yaml.safe_load(text)
    except FileNotFoundError as error:
        raise CapreseError(f"no recipe {name!r}: neither shipped ({', '.join(names())}) nor a file") from error
    except IsADirectoryError as error:
        raise CapreseError(f"recipe {name!r} is a directory; give a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        at = f" at line {mark.line + 1}" if mark else ""
        raise CapreseError(f"recipe {path} is not valid YAML{at}; see caprese recipes show smollm2-135m") from error
    except RecursionError as error:
        raise CapreseError(f"recipe {path} is nested too deeply; see caprese recipes show smollm2-135m") from error
    except (OSError, ValueError) as error:
        raise CapreseError(f"cannot read recipe {name!r} ({getattr(error, 'strerror', None) or error})") from error
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
    raw, overrides = override(raw, overrides)
    try:
        return Recipe.model_validate(merge(raw, overrides))
    except ValidationError as error:
        raise explain(error, source) from error
