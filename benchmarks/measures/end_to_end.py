"""End-to-end distillation: tokens per second, and the hours of a whole run.

Random weights and tokens: the work does not depend on them. An epoch over a few samples, teacher's passes included,
after one step to warm up.

Settings of a cell: shape; method; rank; count, samples; prompt and completion, their tokens; micro_batch;
projected_samples, projected_completion and projected_epochs, of the whole run.
"""

from __future__ import annotations

import time
from typing import Any

import torch

import caprese
from caprese.adapters import attach_adapter
from caprese.data_gen import Sample
from caprese.distill import make_batches
from caprese.distill.end_to_end import EndToEnd, train
from caprese.distill.teacher import HeldOut, Teacher
from caprese.evaluation import environment
from caprese.models import random_model, shape_config


class Measure:
    """A fresh model for every cell, on a GPU in bfloat16 if there is one."""

    def environment(self) -> dict[str, Any]:
        return environment(self.model)

    def __call__(self, cell: dict[str, Any]) -> dict[str, Any]:
        config = shape_config(cell["shape"])
        gpu = torch.cuda.is_available()
        model = random_model(config, torch.bfloat16 if gpu else torch.float32, "cuda" if gpu else "cpu")
        caprese.apply(model, caprese.resolve_recipe(method=cell["method"]).methods)
        self.model: Any = attach_adapter(model, cell["rank"])
        generator, size = torch.Generator().manual_seed(0), (cell["count"], cell["prompt"] + cell["completion"])
        ids = torch.randint(5, config.vocab_size, size, generator=generator).tolist()
        batches = make_batches([Sample(row, cell["prompt"], "", "") for row in ids], cell["micro_batch"])
        how = EndToEnd(epochs=1, batch_size=cell["micro_batch"], micro_batch=cell["micro_batch"])

        def epoch(part: Any) -> float:
            begin = time.perf_counter()
            train(self.model, Teacher(self.model, part, 0), HeldOut(self.model, [], 0), how, 0.0)
            if gpu:
                torch.cuda.synchronize()
            return time.perf_counter() - begin

        epoch(batches[:1])
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        seconds = epoch(batches)
        speed = sum(batch.tokens for batch in batches) / seconds
        needed = cell["projected_samples"] * cell["projected_completion"] * cell["projected_epochs"]
        peak = torch.cuda.max_memory_allocated() if gpu else None
        return {"tokens_per_second": speed, "projected_hours": needed / speed / 3600, "peak_bytes": peak}
