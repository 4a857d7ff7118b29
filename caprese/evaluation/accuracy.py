"""Answers: extracted and compared by math-verify, or by the scorer of the reasoning-gym task a problem is from."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from caprese.data_gen import Prompt, Sample
from caprese.evaluation.answers import boxed, read_last, read_whole


class Marker:
    """What a completion answers to one problem, and whether that is right.

    Mathematics by math-verify; of a reasoning-gym problem with an answer of another kind, by its task's own scorer,
    which has to give full marks.
    """

    def __init__(self, prompt: Prompt) -> None:
        self.prompt = prompt
        answer = (prompt.answer or "").rpartition("####")[2]  # what is behind #### if that is there
        self.gold = read_whole(answer)
        self.scorer: Callable[..., float] | None = None
        # a form that the task asked for counts: LaTeX, a list
        if prompt.item is not None and (self.gold is None or self.gold.kind or re.search(r"[$\\a-zA-Z]", answer)):
            from reasoning_gym.factory import get_score_answer_fn

            self.scorer = get_score_answer_fn(prompt.item["metadata"]["source_dataset"])

    @property
    def able(self) -> bool:
        """Whether answers to this problem can be marked: they are one expression, tuple, list or time, or the problem
        comes with a scorer."""
        return self.gold is not None or self.scorer is not None

    def __call__(self, completion: str, ended: bool = True) -> tuple[str | None, bool]:
        """(the answer, None if there is none, equal answers alike; whether it is right).

        Thoughts are no answers: what is within <think> does not count, whatever stands there.

        Args:
            ended: False for a completion cut off by the length limit: then only an answer that says that it is one,
                in <answer> or \\boxed{}, counts.
        """
        text = _outside_thoughts(completion)
        said = _marked(text, ended)
        if said is None and not ended:
            return None, False
        if self.scorer is not None:
            lines = text.strip().splitlines()
            words = said if said is not None or not lines else lines[-1].strip()
            return words, words is not None and self.scorer(words, self.prompt.item) >= 1
        found = read_last(text) if said is None else read_whole(said, True) or read_last(said)
        if found is None:
            return None, False
        return str(found), self.gold is not None and self.gold.equals(found)


def is_correct(completion: str, answer: str) -> bool | None:
    """Whether the last answer in a completion equals the reference, as mathematics.

    None for a reference that is no number, expression, tuple, list or time (a name, a move, a grid): what would count
    as equal differs from task to task, so such answers are not marked at all rather than marked wrong.
    """
    mark = Marker(Prompt("", answer))
    return mark(completion)[1] if mark.able else None


def _outside_thoughts(completion: str) -> str:
    """A completion without what its model only thought: all within <think>, also if that is not closed, or was opened
    in the prompt."""
    text = re.sub(r"<think>.*?</think>", "\n", completion, flags=re.DOTALL)
    return text.rpartition("</think>")[2].partition("<think>")[0]


def _marked(text: str, ended: bool) -> str | None:
    """The text in the last <answer>, or else in the last \\boxed{}; one left open only counts as <answer> of a text
    that ended there."""
    answers: list[str] = re.findall(r"<answer>\s*(.*?)\s*</answer>", text, flags=re.DOTALL)
    if ended and not answers:
        answers = re.findall(r"<answer>\s*(.*?)\s*\Z", text, flags=re.DOTALL)
    found = [each for each in (answers or boxed(text)) if each.strip()]
    if not found:
        return None
    inside = boxed(found[-1])
    return inside[-1] if inside else found[-1]


def accuracy(samples: Sequence[Sample]) -> float | None:
    """Fraction of completions that reach their answer, over the prompts whose answer can be marked; None if no prompt's
    can."""
    marks = [is_correct(s.completion, s.answer) for s in samples if s.answer is not None]
    known = [mark for mark in marks if mark is not None]
    return sum(known) / len(known) if known else None


def mean_new_tokens(samples: Sequence[Sample]) -> float:
    """Mean completion length in tokens."""
    return sum(len(s.completion_ids) for s in samples) / max(1, len(samples))
