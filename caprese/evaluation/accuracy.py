"""Answers: extracted and compared by math-verify."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from math_verify import parse, verify

from caprese.data_gen import Sample

logging.getLogger("math_verify").setLevel(logging.ERROR)


def is_correct(completion: str, answer: str) -> bool | None:
    """Whether the last answer in a completion equals the reference, as mathematics.

    None for a reference that is no mathematics (a name, a move, a grid): what would count as equal differs from task
    to task, so such answers are not marked at all rather than marked wrong.
    """
    # timeouts use signals, which only the main thread may; inputs are short
    gold = parse(answer, parsing_timeout=None)
    if not gold:
        return None
    return bool(verify(gold, parse(completion, parsing_timeout=None), timeout_seconds=None))


def final_answer(completion: str) -> str | None:
    """The last answer in a completion, written as mathematics; None if there is none. Equal answers may differ."""
    found = parse(completion, parsing_timeout=None)
    return str(found[-1]) if found else None


def accuracy(samples: Sequence[Sample]) -> float | None:
    """Fraction of completions that reach their answer, over the prompts whose answer can be marked; None if no prompt's
    can."""
    marks = [is_correct(s.completion, s.answer) for s in samples if s.answer is not None]
    known = [mark for mark in marks if mark is not None]
    return sum(known) / len(known) if known else None


def mean_new_tokens(samples: Sequence[Sample]) -> float:
    """Mean completion length in tokens."""
    return sum(len(s.completion_ids) for s in samples) / max(1, len(samples))
