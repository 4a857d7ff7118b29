"""`caprese scale`: what repeated sampling buys at a fixed budget, for the dense and the cheaper models.

The measurements of "Thinking Slow, Fast" (arXiv 2502.20339): coverage, majority vote and weighted vote of N samples a
problem, against wall-clock time, tokens, and compute units (N times the fraction of weights that is active). Samples of
a problem are drawn together, as many as a memory for their caches holds; its prompt is read once.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from caprese.adapters.hub import is_hub_id
from caprese.data_gen import Prompt, Samples
from caprese.efficient_methods import reselection
from caprese.errors import CapreseError
from caprese.evaluation.accuracy import Marker
from caprese.evaluation.estimators import estimate, pass_at, vote
from caprese.evaluation.fidelity import variant
from caprese.evaluation.latency import parameter_counts
from caprese.evaluation.rewards import Scorer
from caprese.files import at_work, read_sealed, write_sealed
from caprese.inference.generate import clock, completions, ends_of, generate
from caprese.inference.sampling import nucleus
from caprese.models import check_context, device_of, unwrap
from caprese.models.cache import roomy_cache
from caprese.progress import bar, say
from caprese.studies.equal_time import Raw, comparison, means

# Problems for which every n is timed; their own samples are the time of the largest.
TIMED = 16
# Sequences decoded together where no memory is given.
TOGETHER = 64


@dataclass(frozen=True)
class Contender:
    """A way to run an applied model: one of `fidelity.VARIANTS`, with or without reselection."""

    name: str
    variant: str
    reselect_every: int | None = None
    adapter: str | None = None
    """Of another model than the first: an adapter of the same base."""


def contenders(reselect_every: int | None, names: Sequence[str] | None = None) -> list[Contender]:
    """dense, efficient, recovered, and recovered with reselection where it is given; other names are of adapters, which
    run as recovered.

    Raises:
        CapreseError: a name that is neither one of these nor could be an adapter's.
    """
    every = [Contender(name, name) for name in ("dense", "efficient", "recovered")]
    if reselect_every is not None:
        every.append(Contender(f"recovered_reselect_{reselect_every}", "recovered", reselect_every))
    known = {c.name: c for c in every}
    if names is None:
        return every
    if missing := [n for n in names if n not in known and not (Path(n).is_dir() or is_hub_id(n))]:
        raise CapreseError(f"no contender {', '.join(missing)}; there are {', '.join(known)}, and adapters by name")
    if twice := [n for n, many in Counter(names).items() if many > 1]:
        raise CapreseError(f"contender {', '.join(twice)} is named twice; each once")
    return [known.get(n) or Contender(n, "recovered", adapter=n) for n in names]


def sizes_of(samples: int | Sequence[int]) -> list[int]:
    """1, 2, 4, ... and the number itself; several are themselves, in their order.

    Raises:
        CapreseError: one below 1, or one that does not come after the others.
    """
    sizes = [samples] if isinstance(samples, int) else list(samples)
    if not sizes or sizes[0] < 1 or any(a >= b for a, b in itertools.pairwise(sizes)):
        raise CapreseError("`samples` starts at 1; several are in ascending order, such as 4,16,64")
    if isinstance(samples, int):
        sizes = sorted({1 << i for i in range(samples.bit_length())} | {samples})
    return sizes


@dataclass(frozen=True)
class Budget:
    """What is drawn, and within what."""

    samples: int | Sequence[int]
    """N, of each problem: see `sizes_of`."""
    memory: float | None = None
    """Bytes that the caches of samples drawn together may take; None is `TOGETHER` samples."""
    seed: int = 0


class Scaling:
    """Samples of every contender for every problem, a file for each problem, and what follows from them."""

    def __init__(
        self,
        models: Mapping[str | None, nn.Module],
        tokenizer: PreTrainedTokenizerBase,
        problems: Sequence[Prompt],
        config: Samples,
        budget: Budget,
        directory: Path,
        scorer: Scorer | None = None,
    ) -> None:
        """
        Args:
            models: applied, with their adapters: by `Contender.adapter`.
            problems: with answers that can be marked; others are left out.
            config: instruction, length limit, temperature and top_p.
            budget: how many samples, and what they may take.
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
        self.models, self.tokenizer, self.config, self.budget = models, tokenizer, config, budget
        self.sizes, self.seed = sizes_of(budget.samples), budget.seed
        self.count = self.sizes[-1]
        self.directory, self.scorer = directory, scorer
        encode = config.encode(tokenizer)
        self.encoded = [list(p.ids or encode(p.text)) for p in self.problems]
        for model in models.values():
            check_context(model, [p.text for p in self.problems], self.encoded, config.max_new_tokens)
        # of each contender: bytes of a sample's cache at its longest
        self.bytes_of: dict[str, int] = {}

    def _together(self, contender: Contender) -> int:
        """How many samples are drawn at once.

        Raises:
            CapreseError: the memory does not hold one.
        """
        if contender.name not in self.bytes_of:
            model, longest = self.models[contender.adapter], max(self.encoded, key=len)
            with variant(model, contender.variant), torch.no_grad():
                ids = torch.tensor([longest], device=device_of(model))
                cache = unwrap(model)(input_ids=ids, past_key_values=roomy_cache(model), use_cache=True).past_key_values
            self.bytes_of[contender.name] = cache_bytes(cache, len(longest) + self.config.max_new_tokens)
        if self.budget.memory is None:
            return TOGETHER
        size = self.bytes_of[contender.name]
        if self.budget.memory < size:
            raise CapreseError(
                f"a sample's cache takes {size / 1e9:.3g} GB under {contender.name}, and `memory` allows "
                f"{self.budget.memory / 1e9:g} GB; allow more, or lower max_new_tokens"
            )
        return int(self.budget.memory // size)

    def _draw(
        self, contender: Contender, problem: int, count: int, seed: int
    ) -> tuple[list[list[int]], list[bool], float]:
        """Completions, which of them ended by themselves, and the seconds they took, prefill included."""
        drawn: list[list[int]] = []
        model, together = self.models[contender.adapter], self._together(contender)
        device, ends = device_of(model), ends_of(model, self.tokenizer)
        begin = clock(device)
        with ExitStack() as stack:
            stack.enter_context(variant(model, contender.variant))
            stack.enter_context(reselection(model, contender.reselect_every))
            while len(drawn) < count:
                some = min(together, count - len(drawn))
                c = self.config
                sampler = nucleus(some, c.temperature, c.top_p, seed + 7919 * len(drawn), device)
                prompts = [self.encoded[problem]]
                steps = generate(model, prompts, c.max_new_tokens, sampler, ends=ends, copies=some)
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
        if self.budget.memory is not None:
            settings["memory"] = self.budget.memory
        if self.sizes != sizes_of(self.count):
            settings["sizes"] = self.sizes
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

        Returns: {"problems", "samples", "memory", "contenders": {name: {"n", "coverage", "majority", "best_of_n" (with
        a scorer), each of these with "..._interval", "seconds", "tokens", "compute_units": all by n; "active_fraction",
        "cache_bytes", of a sample at its longest, "together", how many of them are drawn at once, "reselect_every"}}}
        and what `comparison` gives. Seconds and tokens are means over problems: of n samples of one, drawn together.
        """
        with at_work(self.directory):
            drawn = self.samples(over, identity, overwrite)
        result: dict[str, Any] = {}
        raw: dict[str, Raw] = {}
        with bar("marks", len(over) * len(drawn), "problems") as advance:
            for c in over:
                own = [each["contenders"][c.name] for each in drawn]
                figures, by_problem = self._figures(own, advance)
                timed = [[o["seconds"][str(n)] for n in self.sizes] for o in own[:TIMED]]
                raw[c.name] = Raw(timed, by_problem)
                lengths = [length for o in own for length in o["tokens"]]
                model = self.models[c.adapter]
                with reselection(model, c.reselect_every):
                    active = parameter_counts(model)
                fraction = active[f"active_{c.variant}"] / active["active_dense"] if c.variant != "dense" else 1.0
                result[c.name] = figures | {
                    "seconds": means(timed),
                    "tokens": [n * sum(lengths) / len(lengths) for n in self.sizes],
                    "compute_units": [n * fraction for n in self.sizes],
                    "active_fraction": fraction,
                    "together": self._together(c),
                    "cache_bytes": self.bytes_of[c.name],
                    "reselect_every": c.reselect_every,
                }
        found = {"problems": len(self.problems), "samples": self.count, "memory": self.budget.memory}
        return {**found, "contenders": result, **comparison(result, raw)}

    def _figures(
        self, own: Sequence[dict[str, Any]], advance: Callable[[int], None]
    ) -> tuple[dict[str, Any], dict[str, list[list[float]]]]:
        """The figures of a contender, and by metric what they are means of, for each problem and n."""
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
        by_problem: dict[str, list[list[float]]] = {}

        def put(name: str, values: Callable[[int], list[float]]) -> None:
            rows = {n: values(n) for n in self.sizes}
            by_problem[name] = list(map(list, zip(*rows.values(), strict=True)))
            found = estimate(rows.__getitem__, self.sizes)
            figures[name] = found["mean"]
            figures[f"{name}_interval"] = list(map(list, zip(found["low"], found["high"], strict=True)))

        put("coverage", lambda n: [pass_at(n, marks) for marks in right])
        put("majority", lambda n: [vote(n, a, marks) for a, marks in zip(answers, right, strict=True)])
        if self.scorer is not None:
            put("best_of_n", lambda n: [vote(n, a, m, w) for a, m, w in zip(answers, right, weights, strict=True)])
        return figures, by_problem


def cache_bytes(cache: Any, tokens: int) -> int:
    """Bytes that a sequence's KV cache takes when it holds `tokens`, of the cache of one sequence that holds some."""
    total = 0.0
    for layer in cache.layers:
        own = getattr(layer, "bytes_at", None)  # of what stands in for attention
        if own is not None:
            total += own(tokens)
            continue
        held = min(tokens, getattr(layer, "sliding_window", None) or tokens)
        total += (layer.keys.nbytes + layer.values.nbytes) / layer.keys.shape[-2] * held
    return round(total)


def _read(path: Path) -> dict[str, Any] | None:
    """One problem's samples, or None if there are none or they are damaged: they are then drawn again."""
    if not path.exists():
        return None
    try:
        return read_sealed(path, "drawn again")
    except CapreseError as error:
        say((str(error), "yellow"))
        return None
