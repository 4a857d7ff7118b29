"""`caprese methods`."""

from __future__ import annotations

import json
from typing import Any

from caprese.commands.options import Json


def methods(as_json: Json = False) -> None:
    """The methods, the model families, and which methods go together."""
    from caprese.efficient_methods import Reads, compose, known_methods, refusal
    from caprese.models import FAMILIES

    kinds = known_methods()
    gated, plain = Reads(1, 1, 1), Reads(0, 1, 1)

    def together(one: str, other: str) -> dict[str, Any]:
        """Why not, or the fraction of an FFN's weights that a token still reads at default settings."""
        methods = [kinds[name]() for name in dict.fromkeys((one, other))]
        if len(methods) > 1 and (reason := refusal(*methods)):
            return {"composes": False, "reason": reason}
        left = {}
        for shape, reads in (("gated", gated), ("plain", plain)):
            kept = reads.after(compose(methods))
            left[shape] = round((kept.gate + kept.up + kept.down) / (reads.gate + reads.up + reads.down), 3)
        return {"composes": True, "ffn_weights_read": left}

    pairs = {one: {other: together(one, other) for other in kinds} for one in kinds}
    facts: dict[str, Any] = {
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
        "composition": pairs,
    }
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table("method", "what it does", "chooses from", "settings", title="methods")
    for name, fact in facts["methods"].items():
        settings = ", ".join(f"{k}={v}" for k, v in fact["settings"].items() if k != "layers")
        table.add_row(name, fact["summary"], ", ".join(fact["learns_from"]) or "-", settings)
    console.print(table)
    table = Table("", *kinds, title="alone and together: weights of a gated FFN still read, at default settings")
    for one in kinds:
        cells = [pairs[one][other].get("ffn_weights_read") for other in kinds]
        table.add_row(one, *("-" if cell is None else f"{cell['gated']:.0%}" for cell in cells))
    console.print(table)
    reasons = dict.fromkeys(
        f"{one} with {other}: {pairs[one][other]['reason']}"
        for i, one in enumerate(kinds)
        for other in list(kinds)[i + 1 :]
        if not pairs[one][other]["composes"] and "none" not in (one, other)
    )
    print("not together:", *(f"  {reason}" for reason in reasons), sep="\n")
    print("  none with any: it takes nothing away")
    print("  teal acts on FFN and attention; teal:where=attention or teal:where=ffn on one of them alone")
    print(f"families, all with every method: {', '.join(f'{k} ({v} FFN)' for k, v in facts['families'].items())}")
