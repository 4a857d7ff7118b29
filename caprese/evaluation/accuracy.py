"""Answers: extracted and compared by math-verify, or by the scorer of the reasoning-gym task a problem is from."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from typing import Any

from math_verify import parse, verify

from caprese.data_gen import Prompt, Sample

logging.getLogger("math_verify").setLevel(logging.ERROR)

# 9^9^9, 2**100000: sympy would write them out, and no timeout stops it
_TOWER = re.compile(
    r"[\d)}]\s*(?:\*\*|\^)(?:\s*[{(]*\s*\d{4,}|\s*[{(][^)}]*(?:\d{4,}|\*)|[\d(){}\s]*(?:\*\*|\^))|\d{5,}\s*!"
)


def _parse(text: str) -> list[Any]:
    """[the last answer in a text as sympy reads it, as it is written]; empty if there is none."""
    # timeouts use signals, which only the main thread may; inputs are short
    return [] if _TOWER.search(text) else parse(text, parsing_timeout=None)


def _reference(answer: str) -> list[Any]:
    """A reference answer as mathematics (what is behind #### if that is there); empty if it is not one expression."""
    answer = answer.rpartition("####")[2]
    found = _parse(answer)
    bare = [re.sub(r"[\s$,%\\]", "", str(text)) for text in (answer, found[-1] if found else "")]
    return found if bare[0] == bare[1] else []


class Marker:
    """What a completion answers to one problem, and whether that is right.

    Mathematics by math-verify; of a reasoning-gym problem with an answer of another kind, by its task's own scorer,
    which has to give full marks.
    """

    def __init__(self, prompt: Prompt) -> None:
        self.prompt = prompt
        self.gold = [] if prompt.answer is None else _reference(prompt.answer)
        self.scorer: Callable[..., float] | None = None
        if not self.gold and prompt.item is not None:
            from reasoning_gym.factory import get_score_answer_fn

            self.scorer = get_score_answer_fn(prompt.item["metadata"]["source_dataset"])

    @property
    def able(self) -> bool:
        """Whether answers to this problem can be marked."""
        return bool(self.gold) or self.scorer is not None

    def __call__(self, completion: str, ended: bool = True) -> tuple[str | None, bool]:
        """(the answer, None if there is none, equal answers alike; whether it is right).

        Args:
            ended: False for a completion cut off by the length limit: then only an answer that says that it is one,
                in <answer> or \\boxed{}, counts.
        """
        said = _marked(completion)
        if not ended and said is None:
            return None, False
        if self.scorer is not None:
            lines = completion.strip().splitlines()
            text = said if said is not None or not lines else lines[-1].strip()
            return text, text is not None and self.scorer(text, self.prompt.item) >= 1
        found = _parse(completion if ended or said is None else f"${said}$")
        return (str(found[0]) if found else None), bool(verify(self.gold, found, timeout_seconds=None))


def is_correct(completion: str, answer: str) -> bool | None:
    """Whether the last answer in a completion equals the reference, as mathematics.

    None for a reference that is no single number or expression (a name, a move, a grid): what would count as equal
    differs from task to task, so such answers are not marked at all rather than marked wrong.
    """
    mark = Marker(Prompt("", answer))
    return mark(completion)[1] if mark.able else None


def _marked(completion: str) -> str | None:
    """The text in the last <answer> tag or \\boxed{}."""
    for pattern in (r"<answer>\s*(.*?)\s*</answer>", r"\\boxed\{(.*?)\}"):
        if found := re.findall(pattern, completion, flags=re.DOTALL):
            return str(found[-1])
    return None


def accuracy(samples: Sequence[Sample]) -> float | None:
    """Fraction of completions that reach their answer, over the prompts whose answer can be marked; None if no prompt's
    can."""
    marks = [is_correct(s.completion, s.answer) for s in samples if s.answer is not None]
    known = [mark for mark in marks if mark is not None]
    return sum(known) / len(known) if known else None


def mean_new_tokens(samples: Sequence[Sample]) -> float:
    """Mean completion length in tokens."""
    return sum(len(s.completion_ids) for s in samples) / max(1, len(samples))
