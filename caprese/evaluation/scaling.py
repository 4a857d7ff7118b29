"""`caprese scale`: what repeated sampling buys at a fixed budget, for the dense and the cheaper models.

The measurements of "Thinking Slow, Fast" (arXiv 2502.20339): coverage, majority vote and weighted vote of N samples a
problem, against wall-clock time, tokens, and compute units (N times the fraction of weights that is active).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from caprese.data_gen import Prompt, Samples, check_context, encode_prompt
from caprese.efficient_methods import reselection
from caprese.errors import CapreseError
from caprese.evaluation.accuracy import final_answer, is_correct
from caprese.evaluation.estimators import estimate, pass_at, vote
from caprese.evaluation.fidelity import variant
from caprese.evaluation.latency import parameter_counts
from caprese.files import write_json
from caprese.inference.sampling import sample
from caprese.progress import bar

#: (prompt, completion) -> how good it looks; what best-of-n votes are weighted with
Scorer = Callable[[str, str], float]
# Problems whose completions are timed anew at each n.
TIMED = 4
# Problems in one file of samples.
SHARD = 8


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
    """Samples of every contender for every problem, kept in files, and what follows from them."""

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
            problems: with answers that can be marked.
            config: instruction, length limit, temperature and top_p.
            count: N, samples of each problem.
            directory: where samples are kept; a run with the same settings goes on from them.

        Raises:
            CapreseError: no problem with a markable answer, or a prompt too long.
        """
        self.problems = [p for p in problems if p.answer is not None and is_correct("", p.answer) is not None]
        if not self.problems:
            raise CapreseError("none of these problems has an answer that can be marked; give prompts with answers")
        if count < 1:
            raise CapreseError("--samples starts at 1")
        self.model, self.tokenizer, self.config, self.count = model, tokenizer, config, count
        self.directory, self.seed, self.scorer = directory, seed, scorer
        self.encoded = [
            encode_prompt(tokenizer, p.text, config.instruction, config.chat_template) for p in self.problems
        ]
        check_context(model, self.problems, self.encoded, config.max_new_tokens)

    def _draw(self, contender: Contender, problem: int, count: int, seed: int) -> list[list[int]]:
        with ExitStack() as stack:
            stack.enter_context(variant(self.model, contender.variant))
            stack.enter_context(reselection(self.model, contender.reselect_every))
            return sample(
                self.model,
                self.encoded[problem],
                count,
                max_new_tokens=self.config.max_new_tokens,
                temperature=self.config.temperature,
                top_p=self.config.top_p,
                seed=seed,
            )

    def completions(self, contender: Contender, identity: dict[str, Any]) -> list[list[str]]:
        """Texts of all samples, [problems][N]; shards that are there are read, and token counts kept with them."""
        texts: list[list[str]] = []
        self.tokens: dict[str, list[int]] = getattr(self, "tokens", {})
        lengths: list[int] = []
        own = {**identity, "contender": contender.name, "count": self.count, "seed": self.seed}
        with bar(f"{contender.name}: samples", len(self.problems), "problems") as advance:
            for start in range(0, len(self.problems), SHARD):
                part = range(start, min(start + SHARD, len(self.problems)))
                path = self.directory / "samples" / f"{contender.name}-{start // SHARD:05d}.json"
                asked = [self.problems[i].text for i in part]
                kept = _read(path)
                if kept is None or kept["settings"] != own or kept["problems"] != asked:
                    drawn = []
                    for i in part:
                        drawn.append(self._draw(contender, i, self.count, self.seed * 1_000_003 + i))
                        advance(1)
                    kept = {
                        "settings": own,
                        "problems": asked,
                        "completions": [self.tokenizer.batch_decode(d, skip_special_tokens=True) for d in drawn],
                        "tokens": [[len(ids) for ids in d] for d in drawn],
                    }
                    write_json(path, kept)
                else:
                    advance(len(part))
                texts += kept["completions"]
                lengths += [n for each in kept["tokens"] for n in each]
        self.tokens[contender.name] = lengths
        return texts

    def seconds(self, contender: Contender, sizes: Sequence[int]) -> list[float]:
        """Mean wall-clock time of n samples of one problem, drawn together, prefill included; measured, not scaled."""
        chosen = range(min(TIMED, len(self.problems)))
        self._draw(contender, 0, 1, 0)  # warm-up
        result = []
        for n in sizes:
            begin = time.perf_counter()
            for i in chosen:
                self._draw(contender, i, n, self.seed + i)
            if self.model.device.type != "cpu":
                torch.accelerator.synchronize()
            result.append((time.perf_counter() - begin) / len(chosen))
        return result

    def run(self, over: Sequence[Contender], identity: dict[str, Any]) -> dict[str, Any]:
        """The report; see `scale`."""
        sizes = sizes_up_to(self.count)
        texts = {c.name: self.completions(c, identity) for c in over}
        # they take turns and the median counts, so that a slow moment of the machine hits all alike
        rounds = [{c.name: self.seconds(c, sizes) for c in over} for _ in range(3)]
        result: dict[str, Any] = {}
        for c in over:
            timed = [sorted(r[c.name][i] for r in rounds)[1] for i in range(len(sizes))]
            with reselection(self.model, c.reselect_every):
                active = parameter_counts(self.model)
            fraction = active[f"active_{c.variant}"] / active["active_dense"]
            result[c.name] = self._figures(texts[c.name], sizes) | {
                "seconds": timed,
                "tokens": [n * sum(self.tokens[c.name]) / len(self.tokens[c.name]) for n in sizes],
                "compute_units": [n * fraction for n in sizes],
                "active_fraction": fraction,
                "reselect_every": c.reselect_every,
            }
        return {"problems": len(self.problems), "samples": self.count, "contenders": result, **comparison(result)}

    def _figures(self, texts: list[list[str]], sizes: Sequence[int]) -> dict[str, Any]:
        right = [
            [bool(is_correct(text, p.answer or "")) for text in each]
            for each, p in zip(texts, self.problems, strict=True)
        ]
        answers = [[final_answer(text) for text in each] for each in texts]
        # two ways to write the right answer are one answer
        answers = [
            ["right" if mark else answer for mark, answer in zip(marks, each, strict=True)]
            for marks, each in zip(right, answers, strict=True)
        ]
        figures: dict[str, Any] = {"n": list(sizes)}

        def put(name: str, values: Callable[[int], list[float]]) -> None:
            found = estimate(values, sizes)
            figures[name] = found["mean"]
            figures[f"{name}_interval"] = list(map(list, zip(found["low"], found["high"], strict=True)))

        put("coverage", lambda n: [pass_at(n, marks) for marks in right])
        put("majority", lambda n: [vote(n, a, marks) for a, marks in zip(answers, right, strict=True)])
        if self.scorer is not None:
            scorer = self.scorer
            weights = [[scorer(p.text, text) for text in each] for each, p in zip(texts, self.problems, strict=True)]
            put(
                "best_of_n",
                lambda n: [vote(n, a, m, w) for a, m, w in zip(answers, right, weights, strict=True)],
            )
        return figures


def comparison(found: dict[str, Any]) -> dict[str, Any]:
    """Accuracy in the time that dense needs for N samples, and the time to reach dense's accuracy of one sample.

    Between measured sizes, by linear interpolation; beyond the largest, its accuracy (it is not extrapolated).
    """
    if "dense" not in found:
        return {}
    dense = found["dense"]
    metrics = [m for m in ("coverage", "majority", "best_of_n") if m in dense]
    table = []
    for i, n in enumerate(dense["n"]):
        if n not in (1, 4, 16, 64, 256) and n != dense["n"][-1]:
            continue
        row: dict[str, Any] = {"dense_n": n, "seconds": dense["seconds"][i]}
        for metric in metrics:
            row[metric] = {name: at(c["seconds"], c[metric], dense["seconds"][i]) for name, c in found.items()}
        table.append(row)
    reach = {
        metric: {name: first(c["seconds"], c[metric], dense[metric][-1]) for name, c in found.items()}
        for metric in metrics
    }
    return {"at_equal_time": table, "seconds_to_reach_dense": reach}


def at(seconds: Sequence[float], values: Sequence[float], when: float) -> float | None:
    """The value at a time; None before the first sample is done."""
    if when < seconds[0] * (1 - 1e-9):
        return None
    for (t0, v0), (t1, v1) in zip(
        zip(seconds, values, strict=True), zip(seconds[1:], values[1:], strict=False), strict=False
    ):
        if t0 <= when <= t1:
            return v0 + (v1 - v0) * (when - t0) / (t1 - t0) if t1 > t0 else v1
    return values[-1] if when >= seconds[-1] else values[0]


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
    """A shard, or None if there is none or it is damaged: it is then drawn again."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return None


def reward_scorer(name: str, device: str = "auto") -> Scorer:
    """A transformers sequence-classification model as a scorer: its last logit's sigmoid, of prompt and completion.

    Raises:
        CapreseError: it cannot be loaded.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from caprese.models.loading import pick_device

    try:
        judge = AutoModelForSequenceClassification.from_pretrained(name).to(pick_device(device)).eval()
        words = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        text = str(error).strip().splitlines()[0]
        raise CapreseError(f"cannot load the reward model {name!r} ({text}); give a sequence classifier") from error

    @torch.no_grad()
    def score(prompt: str, completion: str) -> float:
        batch = words(prompt, completion, return_tensors="pt", truncation=True).to(judge.device)
        return float(judge(**batch).logits[0, -1].sigmoid())

    return score


def describe_scaling(result: dict[str, Any]) -> list[Any]:
    """The result as tables."""
    from rich.table import Table

    parts: list[Any] = []
    names = list(result["contenders"])
    for metric in ("coverage", "majority", "best_of_n"):
        if metric not in result["contenders"][names[0]]:
            continue
        table = Table("N", *names, title=f"{metric.replace('_', ' ')}, with 95% intervals", title_justify="left")
        for i, n in enumerate(result["contenders"][names[0]]["n"]):
            cells = []
            for name in names:
                c = result["contenders"][name]
                low, high = c[f"{metric}_interval"][i]
                cells.append(f"{c[metric][i]:.1%} ({low:.0%}-{high:.0%}), {c['seconds'][i]:.2f} s")
            table.add_row(str(n), *cells)
        parts.append(table)
        if result.get("at_equal_time"):
            table = Table("dense N", "seconds", *names, title=f"{metric} at the time dense needs", title_justify="left")
            for row in result["at_equal_time"]:
                each = [row[metric][name] for name in names]
                cells = ["-" if value is None else f"{value:.1%}" for value in each]
                table.add_row(str(row["dense_n"]), f"{row['seconds']:.2f}", *cells)
            parts.append(table)
    return parts


def plot_scaling(result: dict[str, Any], path: Path) -> None:
    """Each metric against measured time, and against compute units."""
    import matplotlib
    from matplotlib.figure import Figure

    from caprese.evaluation.plots import LIGHT

    found = result["contenders"]
    metrics = [m for m in ("coverage", "majority", "best_of_n") if m in next(iter(found.values()))]
    with matplotlib.rc_context(LIGHT.style):
        figure = Figure(figsize=(7.2, 2.7 * len(metrics)), layout="constrained")
        grid = figure.subplots(len(metrics), 2, squeeze=False)
        for axes, metric in zip(grid, metrics, strict=True):
            for ax, (key, label) in zip(
                axes, (("seconds", "seconds a problem"), ("compute_units", "N x active fraction")), strict=True
            ):
                for name, c in found.items():
                    low = [i[0] for i in c[f"{metric}_interval"]]
                    high = [i[1] for i in c[f"{metric}_interval"]]
                    (line,) = ax.plot(c[key], c[metric], marker="o", markersize=3, label=name)
                    ax.fill_between(c[key], low, high, color=line.get_color(), alpha=0.1)
                ax.set_xscale("log")
                ax.set(xlabel=label, ylabel=metric.replace("_", " "), ylim=(0, 1.02))
        grid[0][0].legend(fontsize=7)
        figure.savefig(path, dpi=200)


__all__ = [
    "Contender",
    "Scaling",
    "comparison",
    "contenders",
    "describe_scaling",
    "plot_scaling",
    "reward_scorer",
    "sizes_up_to",
]
