"""Answers: extracted and compared by math-verify."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from math_verify import parse, verify

from caprese.data_gen import Sample

logging.getLogger("math_verify").setLevel(logging.ERROR)


def is_correct(completion: str, answer: str) -> bool:
    """Whether the last answer in a completion equals the reference, as mathematics."""
    # timeouts use signals, which only the main thread may; inputs are short
    gold = parse(answer, parsing_timeout=None)
    return bool(verify(gold, parse(completion, parsing_timeout=None), timeout_seconds=None))


def accuracy(samples: Sequence[Sample]) -> float | None:
    """Fraction of completions that reach their answer; None if a prompt has none."""
    if not samples or any(s.answer is None for s in samples):
        return None
    return sum(is_correct(s.completion, s.answer or "") for s in samples) / len(samples)


def mean_new_tokens(samples: Sequence[Sample]) -> float:
    """Mean completion length in tokens."""
    return sum(len(s.completion_ids) for s in samples) / max(1, len(samples))
