"""Reselection every so many tokens, which reads them again, beside reselection from what lossless generation verified
anyway: accuracy on chains:test, time, and acceptance.

Settings of a cell: model; adapter; problems; new_tokens; way, dense, recovered or lossless; reselect_every; of lossless
draft_tokens, null for as many as pay. Greedy, one problem at a time, fused. Accuracy has a 95% interval.
"""

from __future__ import annotations

import time
from typing import Any

import torch

import caprese
from caprese.data_gen import load_prompts
from caprese.efficient_methods import reselection
from caprese.evaluation import environment, variant
from caprese.evaluation.accuracy import Marker
from caprese.evaluation.estimators import interval
from caprese.inference.generate import completions, ends_of, generate
from caprese.inference.lossless import Greedy
from caprese.models import encode_prompt


class Measure:
    """Holds one fused model and its problems."""

    def __init__(self) -> None:
        self.model: Any = None

    def environment(self) -> dict[str, Any]:
        return environment(self.model)

    def __call__(self, cell: dict[str, Any]) -> dict[str, Any]:
        if self.model is None:
            base, self.tokenizer = caprese.load_base(cell["model"])
            self.model = caprese.load(base, cell["adapter"], fused=True)
            self.problems = load_prompts("chains:test", cell["problems"], 1)
        ends = ends_of(self.model, self.tokenizer)
        lossless = caprese.Lossless(tokens=cell["draft_tokens"], reselect_every=cell["reselect_every"])
        total = type(lossless.tally)()
        right, tokens, seconds = [], 0, 0.0
        for problem in self.problems:
            ids = encode_prompt(self.tokenizer, problem.text, "", True)
            begin = time.perf_counter()
            if cell["way"] == "lossless":
                over = lambda _, text: text[-1] in ends  # noqa: E731
                at = lossless.decode(self.model, (torch.tensor([ids]), None), cell["new_tokens"], Greedy(), over)
                (new,) = completions(at, 1)
                total += lossless.tally
            else:
                with variant(self.model, cell["way"]), reselection(self.model, cell["reselect_every"]):
                    (new,) = completions(generate(self.model, [ids], cell["new_tokens"], ends=ends), 1)
            seconds += time.perf_counter() - begin
            tokens += len(new)
            right.append(float(Marker(problem)(self.tokenizer.decode(new, skip_special_tokens=True))[1]))
        found = {"accuracy": sum(right) / len(right), "interval": interval(right), "tokens": tokens}
        return {**found, "ms_per_token": 1000 * seconds / tokens, **total.figures()}
