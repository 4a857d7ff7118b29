"""What n samples of a problem are worth, estimated without bias from the N >= n that were drawn.

Coverage is pass@k of arXiv 2107.03374. Votes are expectations over the subsets of size n: all of them where there are
few, else so many at random from a seed. Intervals are percentile bootstraps over problems.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence

SUBSETS = 200
RESAMPLES = 1000


def pass_at(n: int, right: Sequence[bool]) -> float:
    """The probability that at least one of n samples, drawn from these without replacement, is right.

    Raises:
        ValueError: n is not in 1..len(right).
    """
    total, wrong = len(right), len(right) - sum(right)
    if not 1 <= n <= total:
        raise ValueError(f"{n} of {total} samples")
    return 1 - math.comb(wrong, n) / math.comb(total, n)


def vote(
    n: int, answers: Sequence[str | None], right: Sequence[bool], weights: Sequence[float] | None = None, seed: int = 0
) -> float:
    """The probability that the answer with most weight among n samples is right.

    Args:
        answers: what each sample answers; None takes no part.
        right: whether that is right; the same for equal answers.
        weights: of each sample's vote, 1 if not given: then this is the majority vote. Ties are broken evenly.

    Raises:
        ValueError: n is not in 1..len(answers).
    """
    total = len(answers)
    if not 1 <= n <= total:
        raise ValueError(f"{n} of {total} samples")
    every: Sequence[float] = weights if weights is not None else [1.0] * total
    if math.comb(total, n) <= SUBSETS:
        subsets = list(itertools.combinations(range(total), n))
    else:
        draw = random.Random(seed)
        subsets = [tuple(draw.sample(range(total), n)) for _ in range(SUBSETS)]
    good = 0.0
    for subset in subsets:
        tally: dict[str, float] = {}
        for i in subset:
            answer = answers[i]
            if answer is not None:
                tally[answer] = tally.get(answer, 0.0) + every[i]
        if not tally:
            continue
        most = max(tally.values())
        winners = {answer for answer, weight in tally.items() if weight >= most * (1 - 1e-12)}
        marks = {answers[i]: right[i] for i in subset if answers[i] in winners}
        good += sum(marks.values()) / len(winners)
    return good / len(subsets)


def interval(values: Sequence[float], seed: int = 0, level: float = 0.95) -> tuple[float, float]:
    """Where the mean over problems lies, by resampling them."""
    draw = random.Random(seed)
    means = sorted(sum(draw.choices(values, k=len(values))) / len(values) for _ in range(RESAMPLES))
    cut = round((1 - level) / 2 * RESAMPLES)
    return means[cut], means[-1 - cut]


def estimate(values: Callable[[int], list[float]], sizes: Sequence[int]) -> dict[str, list[float]]:
    """Means over problems with their intervals, for each n: {"mean", "low", "high"}."""
    rows = [values(n) for n in sizes]
    intervals = [interval(row) for row in rows]
    return {
        "mean": [sum(row) / len(row) for row in rows],
        "low": [low for low, _ in intervals],
        "high": [high for _, high in intervals],
    }
