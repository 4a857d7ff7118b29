"""How the two local tasks are marked: an answer that is named, and ROUGE-L of a summary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rouge_score import rouge_scorer


def named(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Whether any of the right answers stands in the answer."""
    said = results[0].lower()
    return {"named": float(any(answer.lower() in said for answer in doc["answers"]))}


def rouge(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """ROUGE-L F1 of a summary against the reference."""
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    return {"rougeL": scorer.score(doc["summary"], results[0])["rougeL"].fmeasure}
