"""Reselection in free generation: how far the answers stay with the dense model, and what it takes.

Held-out prompts are answered one at a time; then the dense model reads each answer: KL(dense || x) and top-1 agreement
over the answer's own tokens, where errors have accumulated. Times are medians over prompts: a slow moment of the
machine hits one of them.

Settings of a cell: model; adapter, with its run's samples beside it; prompts; new_tokens; variant, dense, efficient or
recovered; reselect_every.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

import caprese
from caprese.data_gen import Sample, Samples, complete
from caprese.distill import make_batches
from caprese.efficient_methods import reselection
from caprese.evaluation import environment, fidelity, variant
from measures.recovery import read_samples


class Measure:
    """Holds one fused model."""

    def __init__(self) -> None:
        self.model: Any = None

    def environment(self) -> dict[str, Any]:
        return environment(self.model)

    def __call__(self, cell: dict[str, Any]) -> dict[str, Any]:
        if self.model is None:
            base, self.tokenizer = caprese.load_base(cell["model"])
            self.model = caprese.load(base, cell["adapter"], fused=True)
        name, settings = cell["variant"], Samples(max_new_tokens=cell["new_tokens"], batch_size=1)
        answers, times = [], []
        with reselection(self.model, cell["reselect_every"]):
            for number, s in enumerate(read_samples(f"{cell['adapter']}/samples", "test")[: cell["prompts"]]):
                with variant(self.model, name):
                    begin = time.perf_counter()
                    (new,) = complete(self.model, self.tokenizer, [s.prompt_ids], settings, (0, number))
                    times.append(1000 * (time.perf_counter() - begin) / len(new))
                answers.append(Sample(s.prompt_ids + new, s.prompt_length, s.prompt, ""))
            with torch.no_grad():
                figures = fidelity(self.model, make_batches(answers, 4), (name,))[name]
        tokens = sum(len(s.completion_ids) for s in answers)
        return {"tokens": tokens, "ms_per_token": statistics.median(times), **figures}
