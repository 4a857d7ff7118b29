"""The methods there are, how they are written in one line, and which of them go together."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from importlib.metadata import entry_points
from typing import Any

import yaml
from pydantic import ValidationError

from caprese.efficient_methods.base import Method
from caprese.efficient_methods.cats import Cats
from caprese.efficient_methods.griffin import Griffin
from caprese.efficient_methods.mamba import Mamba
from caprese.efficient_methods.none import Nothing
from caprese.efficient_methods.quantized import Int8, Nf4
from caprese.efficient_methods.rounded import Q4, Q8
from caprese.efficient_methods.static import Static
from caprese.efficient_methods.teal import Teal
from caprese.errors import CapreseError

METHODS: dict[str, type[Method]] = {m.name: m for m in (Griffin, Cats, Teal, Static, Q8, Q4, Nf4, Int8, Mamba, Nothing)}
#: Other packages add a method with an entry point in this group: name = "package.module:Class"
GROUP = "caprese.methods"
# what comes first is done first: weights are narrowed, then packed; inputs are dropped before neurons
_ORDER = ("mixer", "ffn", "width", "weights", "projections", "head", "attention", "inputs", "rows", "neurons")


@functools.cache
def known_methods() -> dict[str, type[Method]]:
    """The methods of caprese and of every installed package that brings one.

    Raises:
        CapreseError: a package's method cannot be imported, or is none, or takes a name that is taken.
    """
    known = dict(METHODS)
    for point in entry_points(group=GROUP):
        try:
            kind = point.load()
        except Exception as error:
            raise CapreseError(
                f"the method {point.name!r} of {point.value!r} cannot be imported ({type(error).__name__}: {error}); "
                "mend or uninstall that package"
            ) from error
        if not (isinstance(kind, type) and issubclass(kind, Method)) or getattr(kind, "name", None) != point.name:
            raise CapreseError(f"{point.value!r} is not a caprese Method named {point.name!r}; mend that package")
        if point.name in known:
            raise CapreseError(f"{point.value!r} takes the name {point.name!r}, which caprese has; rename it")
        known[point.name] = kind
    return known


def find_method(name: object) -> type[Method]:
    """A method by name.

    Raises:
        CapreseError: there is none.
    """
    known = known_methods()
    if not isinstance(name, str) or name not in known:
        raise CapreseError(f"unknown method {name!r}; one of {', '.join(known)}")
    return known[name]


def make_method(facts: dict[str, Any]) -> Method:
    """A method from {"name": ..., its settings}.

    Raises:
        CapreseError: unknown name or setting, or a value that does not fit.
    """
    facts = dict(facts)
    kind = find_method(facts.pop("name", None))
    try:
        return kind(**facts)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        said = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            allowed = ", ".join(kind.model_fields)
            raise CapreseError(f"method {kind.name} has no setting {where!r}; it has {allowed}") from error
        raise CapreseError(f"method {kind.name}, {where}: {said.lower()} (given {first['input']!r})") from error


def facts_of(method: Method) -> dict[str, Any]:
    """What `make_method` makes the method from: its name and all its settings, JSON-able."""
    return {"name": method.name, **method.model_dump(mode="json")}


def parse_methods(text: str) -> list[dict[str, Any]]:
    """ "static:0.3+cats:0.5:threshold=calibrated" -> [{"name": "static", "sparsity": 0.3}, ...].

    Raises:
        CapreseError: not of that form, or a setting twice.
    """
    parsed = []
    for part in text.split("+"):
        name, *settings = part.strip().split(":")
        facts: dict[str, Any] = {"name": name}
        for setting in settings:
            key, equals, value = setting.partition("=")
            key, value = (key.strip(), value) if equals else ("sparsity", key)
            if key in facts:
                raise CapreseError(f"method {text!r}: {key} is said twice; leave one out")
            try:
                facts[key] = yaml.safe_load(value)
            except (yaml.YAMLError, ValueError, RecursionError):  # a number of thousands of digits, a thousand brackets
                name = ""
        if not name:
            raise CapreseError(f"method {text!r}: write NAME, NAME:SPARSITY or NAME:key=value, joined by +")
        parsed.append(facts)
    return parsed


def refusal(one: Method, other: Method) -> str | None:
    """Why two methods do not go together; None if they do."""
    for method in (one, other):
        if not method.acts_on:
            return f"{method.name} takes nothing away; leave it out"
    shared = one.acts_on & other.acts_on
    if shared:
        return f"both act on the same part of a layer ({', '.join(sorted(shared))})"
    both = one.acts_on | other.acts_on
    if "mixer" in both and both & {"attention", "projections"}:
        return "one replaces the attention that the other would make cheaper"
    if "ffn" in both and both & {"width", "weights", "rows", "neurons", "inputs"}:
        return (
            "one trains the FFNs that the other takes from; leave out train=all, or export the hybrid and go on from it"
        )
    for packed, selecting in ((one, other), (other, one)):
        if packed.packs and selecting.acts_on & {"rows", "neurons", "inputs"}:
            return f"{packed.name} packs the FFN weights, and {selecting.name} would select rows or columns of them"
    return None


def compose(methods: Method | Sequence[Method]) -> tuple[Method, ...]:
    """Methods in the order in which they act.

    Raises:
        CapreseError: there are none, one is no method, or two do not go together; with the reason.
    """
    chosen: list[Any] = list(methods) if isinstance(methods, list | tuple) else [methods]
    if not chosen:
        raise CapreseError(f"no efficient method was given; one of {', '.join(known_methods())}")
    if wrong := [one for one in chosen if not isinstance(one, Method)]:
        raise CapreseError(f"{wrong[0]!r} is no method; give one such as caprese.Griffin(sparsity=0.5), or a list")
    for i, one in enumerate(chosen):
        for other in chosen[i + 1 :]:
            if reason := refusal(one, other):
                raise CapreseError(f"{one.name} and {other.name} do not compose: {reason}")
    return tuple(sorted(chosen, key=lambda m: min((_ORDER.index(part) for part in m.acts_on), default=0)))


def idle_branches(methods: Iterable[Method]) -> bool:
    """Whether no FFN lost anything, so that branches have nothing to give back: they are left at rank 1 and zero."""
    return all(method.trains for method in methods)


def describe_methods(methods: Iterable[Method]) -> str:
    """Several methods as a recipe's `method` says them."""
    return "+".join(str(method) for method in methods)
