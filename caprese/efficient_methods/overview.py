"""All methods at a glance: what each does, and which go together."""

from __future__ import annotations

from typing import Any

from caprese.efficient_methods.base import Reads
from caprese.efficient_methods.compose import compose, known_methods, refusal
from caprese.models import FAMILIES

_SHAPES = {"gated": Reads(1, 1, 1), "plain": Reads(0, 1, 1)}


def overview() -> dict[str, Any]:
    """The methods, the model families, and each pair of methods.

    Returns: {"methods": {name: {"summary", "acts_on", "learns_from", "settings"}}, "families": {name: "gated" or
        "plain"}, "composition": {name: {name: `together`}}}.
    """
    kinds = known_methods()
    return {
        "methods": {
            name: {
                "summary": kind.summary,
                "acts_on": sorted(kind().acts_on),
                "learns_from": sorted(kind().learns),
                "settings": {key: field.default for key, field in kind.model_fields.items()},
            }
            for name, kind in kinds.items()
        },
        "families": {name: "gated" if family.gate else "plain" for name, family in FAMILIES.items()},
        "composition": {one: {other: together(one, other) for other in kinds} for one in kinds},
    }


def together(one: str, other: str) -> dict[str, Any]:
    """Two methods (or one alone) at default settings.

    Returns: {"composes": False, "reason"}, or {"composes": True, "ffn_weights_read": {"gated", "plain"}}: the fraction
        of an FFN's weights that a token still reads.
    """
    kinds = known_methods()
    methods = [kinds[name]() for name in dict.fromkeys((one, other))]
    if len(methods) > 1 and (reason := refusal(*methods)):
        return {"composes": False, "reason": reason}
    left = {}
    for shape, reads in _SHAPES.items():
        kept = reads.after(compose(methods))
        left[shape] = round((kept.gate + kept.up + kept.down) / (reads.gate + reads.up + reads.down), 3)
    return {"composes": True, "ffn_weights_read": left}
