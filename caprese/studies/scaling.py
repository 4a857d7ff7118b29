"""`caprese scale`: what repeated sampling buys at a fixed budget, for the dense and the cheaper models.

The measurements of "Thinking Slow, Fast" (arXiv 2502.20339): coverage, majority vote and weighted vote of N samples a
problem, against wall-clock time, tokens, and compute units (N times the fraction of weights that is active).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from caprese.data_gen import Prompt, Samples
from caprese.efficient_methods import reselection
from caprese.errors import CapreseError
from caprese.evaluation.accuracy import Marker
from caprese.evaluation.estimators import estimate, pass_at, vote
from caprese.evaluation.fidelity import variant
from caprese.evaluation.latency import parameter_counts
from caprese.evaluation.rewards import Scorer
from caprese.files import read_sealed, write_sealed
from caprese.inference.generate import clock, completions, ends_of, generate
from caprese.inference.sampling import nucleus
from caprese.models import check_context, device_of
from caprese.progress import bar, say

# Problems for which every n is timed; their own samples are the time of the largest.
TIMED = 16
# Sequences decoded together.
TOGETHER = 64
METRICS = ("coverage", "majority", "best_of_n")


@dataclass(frozen=True)
class Contender:
    """A way to run the applied model: one of `fidelity.VARIANTS`, with or without reselection."""

    name: str
    variant: str
    reselect_every: int | None = None


def contenders(reselect_every: int | None, names: Sequence[str] | None = None) -> list[Contender]:
    """dense, efficient, recovered, and recovered with reselection where it is given.

    Raises:
        CapreseError: a name that is none of these.
    """
    every = [Contender(name, name) for name in ("dense", "efficient", "recovered")]
    if reselect_every is not None:
        every.append(Contender(f"recovered_reselect_{reselect_every}", "recovered", reselect_every))
    known = {c.name: c for c in every}
    if names is None:
        return every
    if missing := [n for n in names if n not in known]:
        raise CapreseError(f"no contender {', '.join(missing)}; there are {', '.join(known)}")
    return [known[n] for n in names]


def sizes_up_to(count: int) -> list[int]:
    """1, 2, 4, ... and `count` itself."""
    sizes = [1 << i for i in range(count.bit_length()) if 1 << i <= count]
    return sizes if sizes[-1] == count else [*sizes, count]


class Scaling:
    """Samples of every contender for every problem, a file for each problem, and what follows from them."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        problems: Sequence[Prompt],
        config: Samples,
        count: int,
        directory: Path,
        seed: int = 0,
        scorer: Scorer | None = None,
    ) -> None:
        """
        Args:
            model: applied, with its adapter.
            problems: with answers that can be marked; others are left out.
            config: instruction, length limit, temperature and top_p.
            count: N, samples of each problem.
            directory: where samples are kept; a run with the same settings goes on from them.

        Raises:
            CapreseError: no problem with a markable answer, or a prompt too long.
        """
        self.markers = [marker for marker in map(Marker, problems) if marker.able]
        self.problems = [marker.prompt for marker in self.markers]
        if not self.problems:
            raise CapreseError("none of these problems has an answer that can be marked; give prompts with answers")
        if left := len(problems) - len(self.problems):
            say((f"{left} of {len(problems)} problems have no answer that can be marked; left out", "yellow"))
        if count < 1:
            raise CapreseError("`samples` starts at 1")
        self.model, self.tokenizer, self.config, self.count = model, tokenizer, config, count
        self.directory, self.seed, self.scorer = directory, seed, scorer
        self.sizes = sizes_up_to(count)
        encode = config.encode(tokenizer)
        self.encoded = [list(p.ids or encode(p.text)) for p in self.problems]
        check_context(model, [p.text for p in self.problems], self.encoded, config.max_new_tokens)

    def _draw(
        self, contender: Contender, problem: int, count: int, seed: int
    ) -> tuple[list[list[int]], list[bool], float]:
        """Completions, which of them ended by themselves, and the seconds they took, prefill included."""
        drawn: list[list[int]] = []
        device, ends = device_of(self.model), ends_of(self.model, self.tokenizer)
        begin = clock(device)
        with ExitStack() as stack:
            stack.enter_context(variant(self.model, contender.variant))
            stack.enter_context(reselection(self.model, contender.reselect_every))
            while len(drawn) < count:
                some = min(TOGETHER, count - len(drawn))
                c = self.config
                sampler = nucleus(some, c.temperature, c.top_p, seed + 7919 * len(drawn), device)
                prompts = [self.encoded[problem]]
                steps = generate(self.model, prompts, c.max_new_tokens, sampler, ends=ends, copies=some)
                drawn += completions(steps, some)
        return drawn, [ids[-1] in ends for ids in drawn], clock(device) - begin

    def _problem(self, index: int, over: Sequence[Contender], settings: dict[str, Any]) -> dict[str, Any]:
        """All samples of one problem; contenders take turns, and nobody is always first."""
        found: dict[str, Any] = {c.name: {"seconds": {}} for c in over}
        sizes = self.sizes if index < TIMED else self.sizes[-1:]
        for turn, n in enumerate(sizes):
            for place in range(len(over)):
                c = over[(place + turn + index) % len(over)]
                drawn, ended, seconds = self._draw(c, index, n, self.seed * 1_000_003 + index)
                found[c.name]["seconds"][str(n)] = seconds
                if n == self.count:
                    found[c.name] |= {
                        "completions": self.tokenizer.batch_decode(drawn, skip_special_tokens=True),
                        "tokens": [len(ids) for ids in drawn],
                        "ended": ended,
                    }
        return {"settings": settings, "prompt": self.problems[index].text, "contenders": found}

    def samples(self, over: Sequence[Contender], identity: dict[str, Any], overwrite: bool) -> list[dict[str, Any]]:
        """What `_problem` gives for each; files that are there are read."""
        settings = {**identity, "contenders": [c.name for c in over], "count": self.count, "seed": self.seed}
        paths = [self.directory / "samples" / f"{i:05d}.json" for i in range(len(self.problems))]
        kept = [_read(path) for path in paths]
        for i, each in enumerate(kept):
            if each is not None and (each["settings"] != settings or each["prompt"] != self.problems[i].text):
                if not overwrite:
                    other = [k for k, v in settings.items() if each["settings"].get(k) != v] or ["problems"]
                    raise CapreseError(
                        f"{self.directory} holds samples of other settings ({', '.join(other)}); choose another "
                        "`output`, or `overwrite`"
                    )
                kept[i] = None
        found = []
        if None in kept:
            for c in over:
                self._draw(c, 0, 1, 0)  # warm-up
        with bar("samples", len(paths), "problems", sum(each is not None for each in kept)) as advance:
            for i, path in enumerate(paths):
                each = kept[i]
                if each is None:
                    each = self._problem(i, over, settings)
                    write_sealed(path, each)
                    advance(1)
                found.append(each)
        return found

    def run(self, over: Sequence[Contender], identity: dict[str, Any], overwrite: bool = False) -> dict[str, Any]:
        """Draw, mark and weigh.

        Returns: {"problems", "samples", "contenders": {name: {"n", "coverage", "majority", "best_of_n" (with a scorer),
        each of these with "..._interval", "seconds", "tokens", "compute_units": all by n; "active_fraction",
        "reselect_every"}}} and what `comparison` gives. Seconds and tokens are means over problems: of n samples of
        one, drawn together.
        """
        drawn = self.samples(over, identity, overwrite)
        result: dict[str, Any] = {}
        with bar("marks", len(over) * len(drawn), "problems") as advance:
            for c in over:
                own = [each["contenders"][c.name] for each in drawn]
                figures = self._figures(own, advance)
                timed = own[:TIMED]
                seconds = [sum(o["seconds"][str(n)] for o in timed) / len(timed) for n in self.sizes]
                lengths = [length for o in own for length in o["tokens"]]
                with reselection(self.model, c.reselect_every):
                    active = parameter_counts(self.model)
                fraction = active[f"active_{c.variant}"] / active["active_dense"] if c.variant != "dense" else 1.0
                result[c.name] = figures | {
                    "seconds": seconds,
                    "tokens": [n * sum(lengths) / len(lengths) for n in self.sizes],
                    "compute_units": [n * fraction for n in self.sizes],
                    "active_fraction": fraction,
                    "reselect_every": c.reselect_every,
                }
        return {"problems": len(self.problems), "samples": self.count, "contenders": result, **comparison(result)}

    def _figures(self, own: Sequence[dict[str, Any]], advance: Callable[[int], None]) -> dict[str, Any]:
        right: list[list[bool]] = []
        answers: list[list[str | None]] = []
        weights: list[list[float]] = []
        for each, mark in zip(own, self.markers, strict=True):
            marks = [mark(text, ended) for text, ended in zip(each["completions"], each["ended"], strict=True)]
            right.append([good for _, good in marks])
            answers.append([answer for answer, _ in marks])
            if self.scorer is not None:
                weights.append([self.scorer(mark.prompt, text) for text in each["completions"]])
            advance(1)
        figures: dict[str, Any] = {"n": list(self.sizes)}

        def put(name: str, values: Callable[[int], list[float]]) -> None:
            found = estimate(values, self.sizes)
            figures[name] = found["mean"]
            figures[f"{name}_interval"] = list(map(list, zip(found["low"], found["high"], strict=True)))

        put("coverage", lambda n: [pass_at(n, marks) for marks in right])
        put("majority", lambda n: [vote(n, a, marks) for a, marks in zip(answers, right, strict=True)])
        if self.scorer is not None:
            put("best_of_n", lambda n: [vote(n, a, m, w) for a, m, w in zip(answers, right, weights, strict=True)])
        return figures


def comparison(found: dict[str, Any]) -> dict[str, Any]:
    """Accuracy in the time that dense needs for N samples, and the time to reach what dense reaches with most.

    Between measured sizes, by linear interpolation; beyond the largest, its accuracy (it is not extrapolated).
    """
    if "dense" not in found:
        return {}
    dense = found["dense"]
    metrics = [m for m in METRICS if m in dense]
    times = {name: _rising(c["seconds"]) for name, c in found.items()}
    table = []
    for i, n in enumerate(dense["n"]):
        if n not in (1, 4, 16, 64, 256) and n != dense["n"][-1]:
            continue
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
    return {"at_equal_time": table, "seconds_to_reach_dense": reach}


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


def _read(path: Path) -> dict[str, Any] | None:
    """One problem's samples, or None if there are none or they are damaged: they are then drawn again."""
    if not path.exists():
        return None
    try:
        return read_sealed(path)
    except CapreseError as error:
        say((f"{error}; drawn again", "yellow"))
        return None
