"""How methods are spelled in a recipe: as a list with all their settings, or as one line with settings beside it.

`method: static:0.3+cats:0.5`, or `method: griffin` and `sparsity: 0.5`, or `methods: [{name: griffin, sparsity: 0.5}]`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from caprese.efficient_methods import Method, compose, find_method, make_method, parse_methods
from caprese.errors import CapreseError

#: settings that, beside `method`, are those of all its methods that leave them open
SETTINGS = ("sparsity", "threshold", "shared_choice", "keep_attention")
SPELLED = ("method", "layers", *SETTINGS)
#: what sparsity is allocated by, layer by layer, in place of a number
TARGETS = ("target_kl", "target_active")
_SPELLING = "`methods` is a list of {name: griffin, sparsity: 0.5}, `method` a line such as griffin:0.5"


def leaves_open(method: str, setting: str) -> bool:
    """Whether any of the methods of a line has a setting and does not say it itself."""
    return any(setting in find_method(f["name"]).model_fields.keys() - f.keys() for f in parse_methods(method))


def fold(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's content with `method` and the settings beside it as `methods`.

    Raises:
        CapreseError: a setting that no method takes or that is said twice, a sparsity beside a target, or a method
            that is no line.
    """
    given = {key: raw[key] for key in SPELLED if raw.get(key) is not None}
    rest = {key: value for key, value in raw.items() if key not in SPELLED}
    if not given:
        return rest
    if "methods" in rest:
        raise CapreseError(f"`methods` says all that methods have; leave out `{next(iter(given))}`")
    sparsity, line = given.get("sparsity"), given.pop("method", "griffin")
    if not isinstance(line, str):
        raise CapreseError(f"method {line!r}: {_SPELLING}")
    for key in given:
        if key in SETTINGS and not leaves_open(line, key):
            raise CapreseError(f"`{key}` is no setting of {line}, or said there already; leave it out")
    said = [facts["sparsity"] for facts in parse_methods(line) if "sparsity" in facts]
    _check_target(sparsity if sparsity is not None else next(iter(said), None), raw)
    if sparsity == "auto":
        del given["sparsity"]
    settings = {key: given[key] for key in SETTINGS if key in given}
    rest["methods"] = [
        {"layers": given.get("layers", "all"), **_taken(facts, settings), **facts} for facts in parse_methods(line)
    ]
    return rest


def override(raw: Mapping[str, Any], over: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two recipes' contents, prepared for the second to be laid over the first.

    Another method in place of the first one's takes over what it leaves open of the settings beside that, and the
    layers; settings alone change those of the methods that are there.

    Raises:
        CapreseError: a setting that none of the methods has, or methods that are no list.
    """
    raw, over = dict(raw), dict(over)
    known, line = raw.get("methods"), over.get("method")
    if known and not (isinstance(known, list) and all(isinstance(facts, Mapping) for facts in known)):
        raise CapreseError(f"methods {known!r}: {_SPELLING}")
    said = [over.get("sparsity")]
    if isinstance(line, str):
        said += [facts.get("sparsity") for facts in parse_methods(line)]
    if any(each not in (None, "auto") for each in said):  # a number in place of what was to be measured
        raw = {key: value for key, value in raw.items() if key not in TARGETS}
    if over.get("prefill") in ("efficient", "stored") or over.get(
        "alternatives"
    ):  # where nothing runs dense again, or what is measured does not
        raw = {key: value for key, value in raw.items() if key != "reselect_every"}
    if raw.get("alternatives") and {"method", "methods", "alternatives"} & {
        k for k, v in over.items() if v is not None
    }:  # chosen by another target
        raw = {key: value for key, value in raw.items() if key not in ("alternatives", "target_kl")}
    if "methods" in over or over.get("alternatives"):
        raw = {key: value for key, value in raw.items() if key not in (*SPELLED, "methods")}
    elif line is not None:
        raw = {key: value for key, value in raw.items() if key not in SETTINGS or leaves_open(line, key)}
        if raw.pop("methods", None):
            layers = [facts.get("layers", "all") for facts in known or ()]
            raw |= {"layers": layers[0]} if all(each == layers[0] for each in layers) else {}
        if any(find_method(facts["name"]).no_reselection for facts in parse_methods(line)):
            raw.pop("reselect_every", None)
    elif known:
        change = {key: over.pop(key) for key in SPELLED if over.get(key) is not None}
        _check_target(change.get("sparsity"), {**raw, **over})
        if change.get("sparsity") == "auto":
            del change["sparsity"]
        for key in change:
            if not any(key in _taken(facts, change) for facts in known):
                raise CapreseError(f"`{key}` is no setting of {'+'.join(f['name'] for f in known)}; leave it out")
        raw["methods"] = [{**facts, **_taken(facts, change)} for facts in known]
    return raw, over


def _check_target(sparsity: Any, raw: Mapping[str, Any]) -> None:
    """Refuse a sparsity that is to be measured without a target, and a number beside one."""
    targets = [key for key in TARGETS if raw.get(key) is not None]
    if sparsity == "auto" and not targets:
        raise CapreseError('`sparsity="auto"` needs one of `target_kl` and `target_active`')
    if sparsity not in (None, "auto") and targets:
        raise CapreseError(f'`{targets[0]}` goes with `sparsity="auto"`, and sparsity is {sparsity}')


def _taken(facts: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of some settings, those that a method has."""
    fields = find_method(facts.get("name")).model_fields
    return {key: value for key, value in settings.items() if key in fields}


def read_methods(value: Any) -> tuple[Method, ...]:
    """Methods, or {"name": ..., their settings}, in the order in which they act.

    Raises:
        CapreseError: an unknown method or setting, or methods that do not compose.
    """
    each: Sequence[Any] = value if isinstance(value, list | tuple) else [value]
    return compose([make_method(dict(one)) if isinstance(one, Mapping) else one for one in each])
