"""What comes back on each kind of prompts: those distilled on, and elsewhere."""

from __future__ import annotations

from typing import Any

from caprese.data_gen import ELSEWHERE
from caprese.report.summary import number

COLUMNS = ("Prompts", "Samples", "KL efficient", "KL recovered", "Recovered")
LEGEND = (
    "Prompts of each kind are held out of training; those of elsewhere are of kinds that were never trained on. "
    "Recovered is the part of the KL divergence that the adapter takes away."
)
#: part of what comes back on its own kinds that has to come back elsewhere
_FAIR = 0.5


def source_rows(report: dict[str, Any]) -> list[list[str]]:
    """A cell for each of `COLUMNS`, a row for each kind of prompts."""
    return [
        [
            source,
            number(facts["samples"], ","),
            number(facts["quality"]["efficient"]["kl"], ".4f"),
            number(facts["quality"]["recovered"]["kl"], ".4f"),
            number(facts["recovered_fraction"], ".0%"),
        ]
        for source, facts in (report.get("sources") or {}).items()
    ]


def source_warning(report: dict[str, Any]) -> str | None:
    """What a user should know before they trust the overall figures."""
    facts = (report.get("sources") or {}).get(ELSEWHERE)
    if facts is None:
        return None
    here, there = (report.get("recovered_fraction") or {}).get("kl"), facts["recovered_fraction"]
    if there is None:
        return None
    remedy = "distil on more kinds of prompts, such as a share of self, or on more of them"
    if there < 0:
        return f"On prompts of other kinds than it was distilled on the adapter makes it worse: {remedy}."
    if here is not None and there < _FAIR * here:
        return (
            f"On prompts of other kinds than it was distilled on {there:.0%} comes back, on its own kinds {here:.0%}: "
            f"{remedy}."
        )
    return None
