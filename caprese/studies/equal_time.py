"""What others do in the time that dense samples take, and in what time they are as good."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from caprese.evaluation.estimators import RESAMPLES

METRICS = ("coverage", "majority", "best_of_n")


class Raw(NamedTuple):
    """What a contender's figures are means of."""

    seconds: list[list[float]]
    """By problem, of those that were timed, and n."""
    metrics: dict[str, list[list[float]]]
    """By metric, problem and n."""


def comparison(found: dict[str, Any], raw: Mapping[str, Raw] | None = None) -> dict[str, Any]:
    """Accuracy in the time that dense needs for N samples, and the time to reach what dense reaches with most.

    Between measured sizes, by linear interpolation; beyond the largest, its accuracy (it is not extrapolated).

    Args:
        raw: for "time_of_dense": of each metric and contender, its time to reach what dense reaches with most over the
            time that dense needs for that, {"ratio", "interval", "reached", the part of the resamples of problems that
            it reaches it in}; the interval is of those, and None where it is not reached in 95% of them.
    """
    if "dense" not in found:
        return {}
    dense = found["dense"]
    metrics = [m for m in METRICS if m in dense]
    times = {name: _rising(c["seconds"]) for name, c in found.items()}
    table = []
    for i, n in enumerate(dense["n"]):
        when = times["dense"][i]
        row: dict[str, Any] = {"dense_n": n, "seconds": when}
        for metric in metrics:
            row[metric] = {name: at(times[name], c[metric], when) for name, c in found.items()}
        table.append(row)
    reach = {
        metric: {name: first(times[name], c[metric], top) if top else None for name, c in found.items()}
        for metric in metrics
        for top in dense[metric][-1:]
    }
    result: dict[str, Any] = {"at_equal_time": table, "seconds_to_reach_dense": reach}
    if raw is not None:
        others = [name for name in raw if name != "dense"]
        result["time_of_dense"] = {m: {name: time_of_dense(raw, name, m) for name in others} for m in metrics}
    return result


def time_of_dense(raw: Mapping[str, Raw], name: str, metric: str, seed: int = 0) -> dict[str, Any]:
    """See `comparison`; problems are resampled for both alike."""
    timed, count = len(raw["dense"].seconds), len(raw["dense"].metrics[metric])

    def ratio(drawn: Sequence[int], clocked: Sequence[int]) -> float | None:
        needs = []
        top: float | None = None
        for which in ("dense", name):
            values = means([raw[which].metrics[metric][i] for i in drawn])
            top = values[-1] if top is None else top
            needs.append(first(_rising(means([raw[which].seconds[i] for i in clocked])), values, top))
        of_dense, own = needs
        return None if own is None or not of_dense or not top else own / of_dense

    draw = random.Random(seed)
    again = [ratio(draw.choices(range(count), k=count), draw.choices(range(timed), k=timed)) for _ in range(RESAMPLES)]
    reached = sorted(each for each in again if each is not None)
    cut = round(0.025 * len(reached))
    known = len(reached) >= 0.95 * RESAMPLES
    return {
        "ratio": ratio(range(count), range(timed)),
        "interval": [reached[cut], reached[-1 - cut]] if known else None,
        "reached": len(reached) / RESAMPLES,
    }


def means(rows: Sequence[Sequence[float]]) -> list[float]:
    """Of each column."""
    return [sum(column) / len(column) for column in zip(*rows, strict=True)]


def _rising(seconds: Sequence[float]) -> list[float]:
    """Times that never fall as n grows: more samples cannot take less, but measurements can say so."""
    return list(accumulate(reversed(seconds), min))[::-1]


def at(seconds: Sequence[float], values: Sequence[float], when: float) -> float | None:
    """The value at a time, of rising times; None before the first sample is done."""
    if when < seconds[0] * (1 - 1e-9):
        return None
    known = [i for i, t in enumerate(seconds) if t <= when * (1 + 1e-9)]
    i = known[-1] if known else 0
    if i == len(seconds) - 1 or seconds[i] >= when:
        return values[i]
    return values[i] + (values[i + 1] - values[i]) * (when - seconds[i]) / (seconds[i + 1] - seconds[i])


def first(seconds: Sequence[float], values: Sequence[float], level: float) -> float | None:
    """The first time at which a value is reached; None if it is not."""
    before: tuple[float, float] | None = None
    for t, v in zip(seconds, values, strict=True):
        if v >= level:
            if before is None or v == before[1]:
                return t
            return before[0] + (t - before[0]) * (level - before[1]) / (v - before[1])
        before = (t, v)
    return None
