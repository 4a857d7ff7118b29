"""How many tokens to draft: as many as pay, by what drafting and verifying cost here and how much is accepted.

K drafts a round give (1 - a^(K+1)) / (1 - a) tokens where each is accepted with probability a (arXiv 2211.17192,
equation 1), for K c + v(K + 1) of time. All three are measured while it runs.
"""

from __future__ import annotations

import bisect
import statistics
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

#: numbers of drafts to choose among: few, so that compiled steps are few
CHOICES = (0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 16)
# the same where each is compiled: dynamo compiles no more than eight shapes
_COMPILED = (0, 2, 4, 8)
# how many of the last times count, how fast acceptance forgets, and what it is thought to be before anything is known
_LAST, _FORGET, _PRIOR = 9, 0.98, (3.0, 4.0)
# rounds without drafts at the start, the second of which says what a dense step costs
_ALONE = 2
# the part of the time that may be lost in finding out whether drafting pays by now; each time that it does not it is
# halved, so often at most
_SPENT, _HALVED = 0.02, 3
# up to so many drafts, numbers that were never tried are
_WIDE = 4
# by how much drafting has to be faster than none
_WORTH = 1.03


def expected(acceptance: float, count: int) -> float:
    """Tokens of a round with `count` drafts, each accepted with probability `acceptance` below 1."""
    return (1 - acceptance ** (count + 1)) / (1 - acceptance)


@dataclass
class Tally:
    """What a run came to."""

    rounds: int = 0
    """With drafts."""
    sequence_rounds: int = 0
    """The same, those of each sequence counted."""
    drafted: int = 0
    """Tokens that were judged: of each round those up to the first that did not stay."""
    accepted: int = 0
    by_count: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    """Rounds by the number of drafts."""

    def __add__(self, other: Tally) -> Tally:
        both = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self) if f.name != "by_count"}
        counts = {k: self.by_count.get(k, 0) + other.by_count.get(k, 0) for k in {*self.by_count, *other.by_count}}
        return Tally(**both, by_count=defaultdict(int, counts))

    def figures(self) -> dict[str, float | None]:
        """{"acceptance": of judged drafts, None where there were none, "tokens_per_round": with drafts}."""
        rounds = self.rounds
        return {
            "acceptance": self.accepted / self.drafted if self.drafted else None,
            "tokens_per_round": 1 + self.accepted / self.sequence_rounds if rounds else None,
        }


@dataclass
class Pace:
    """Chooses the number of drafts for each round.

    Attributes:
        fixed: always so many; None adapts.
        compiled: whether each number is compiled once, when it is first chosen: there are then few of them.
    """

    fixed: int | None = None
    compiled: bool = False

    def __post_init__(self) -> None:
        self.tally = Tally()
        self.good, self.judged = _PRIOR
        self.draft_times: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=_LAST))
        self.verify_times: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=_LAST))
        self.alone = 0.0  # tokens of a sequence since drafting was last tried
        self.in_vain = 0  # trials since it last paid
        self.choices: tuple[int, ...] = CHOICES
        if self.compiled:
            self.choices = _COMPILED if self.fixed is None else (0, self.fixed)
        # numbers that were chosen before; the first time is not of the drafts alone, but of what is compiled or packed
        self.seen: set[int] = set()

    def compile_anew(self) -> None:
        """What is compiled will be for something else: the next time of each number is that of compiling it."""
        self.seen.clear()

    @property
    def acceptance(self) -> float:
        """a, between 0 and 1."""
        return min(self.good / self.judged, 0.9999)

    def draft_seconds(self, count: int) -> float:
        """Of `count` drafted tokens: they come one by one, behind what a draft may have to read first."""
        return _at(count, {0: 0.0, **_medians(self.draft_times)}) if count else 0.0

    def verify_seconds(self, tokens: int) -> float:
        """Of a pass over `tokens` tokens and all that comes with it."""
        known = _medians(self.verify_times)
        if len(known) == 1:  # nothing is known of wider ones: as one might hope, so that they are tried
            ((count, time),) = known.items()
            return time * (1 + 0.02 * max(0, tokens - count))
        return _at(tokens, known)

    def speed(self, count: int) -> float:
        """Tokens a second with `count` drafts, as predicted."""
        seconds = self.draft_seconds(count) + self.verify_seconds(count + 1)
        return expected(self.acceptance, count) / max(seconds, 1e-9)

    def choose(self, limit: int) -> int:
        """How many to draft now, at most `limit`."""
        if self.fixed is not None:
            return min(self.fixed, limit) if not self.compiled or self.fixed <= limit else 0
        if len(self.verify_times[1]) < _ALONE:
            return 0
        possible = [count for count in self.choices if count <= limit]
        trials = [count for count in possible if count]
        if not self.draft_times and trials:
            return min(trials)
        best = max(possible, key=self.speed)
        if best and self.speed(best) >= _WORTH * self.speed(0):
            self.in_vain = 0
            return best
        # what a wider pass takes is known of few, and lines from these may be wrong
        unknown = [count for count in trials if count <= _WIDE and count not in self.draft_times]
        trial = max(unknown or trials, key=self.speed, default=0)
        lost = expected(self.acceptance, trial) * (self.speed(0) / self.speed(trial) - 1)  # tokens
        if not trial or self.alone < max(16.0, lost / _SPENT) * 2**self.in_vain:
            return 0
        self.in_vain = min(self.in_vain + 1, _HALVED)
        return trial

    def note(
        self, counts: Sequence[int], new: Sequence[int], drafting: float, rest: float, width: int | None = None
    ) -> None:
        """After a round.

        Args:
            counts: drafts of each sequence.
            new: tokens that each was judged to have.
            drafting, rest: seconds.
            width: drafts that were read with the last token, where they are more than any sequence has.
        """
        sequences, tally = len(new), self.tally
        count = max(counts) if width is None else width
        tally.by_count[count] += 1
        first = count not in self.seen if self.compiled else bool(count) and not any(self.seen)
        if not first:
            self.verify_times[count + 1].append(rest)
            if count:
                self.draft_times[count].append(drafting)
        self.seen.add(count)
        self.alone = 0.0 if count else self.alone + sum(new) / sequences
        if not count:
            return
        accepted = sum(new) - sequences
        judged = sum(min(got, there) for got, there in zip(new, counts, strict=True))
        tally.rounds += 1
        tally.sequence_rounds += sequences
        tally.drafted += judged
        tally.accepted += accepted
        self.good = _FORGET * self.good + accepted / sequences
        self.judged = _FORGET * self.judged + judged / sequences


def _medians(times: Mapping[int, Sequence[float]]) -> dict[int, float]:
    return {count: statistics.median(of) for count, of in times.items() if of}


def _at(count: int, known: Mapping[int, float]) -> float:
    """The time of `count`: on the line of its neighbours, or on from the last two; the one that is known, if it is
    alone."""
    at = sorted(known)
    if len(at) == 1:
        return known[at[0]]
    i = min(max(1, bisect.bisect_left(at, count)), len(at) - 1)
    x, x1 = at[i - 1], at[i]
    slope = max(0.0, (known[x1] - known[x]) / (x1 - x))
    return known[x] + slope * (count - x)
