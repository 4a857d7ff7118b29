"""Layer-wise distillation: tokens per second, what each part takes, and the hours of a whole run.

Random weights and tokens: the work does not depend on them. Parts: the dense forward pass, what the method takes away
(the residual), the accumulators X'X and X'E, the solve.

Settings of a cell: shape; layers, to build only so many with a small vocabulary (the stage uses no head), the
projection then counting all; method; rank; count, samples; prompt and completion, their tokens; projected_samples and
projected_completion, of the whole run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

import caprese
from caprese.data_gen import Sample
from caprese.distill import accumulate, fit_layer, make_batches, new_moments
from caprese.distill.batches import completion_hidden, prefill
from caprese.efficient_methods import phases
from caprese.evaluation import environment
from caprese.models import random_model, shape_config


class Measure:
    """A fresh model for every cell, on a GPU in bfloat16 if there is one."""

    def environment(self) -> dict[str, Any]:
        return environment(self.model)

    def __call__(self, cell: dict[str, Any]) -> dict[str, Any]:
        config = shape_config(cell["shape"])
        whole = config.num_hidden_layers
        if cell["layers"]:
            config.num_hidden_layers, config.vocab_size = cell["layers"], 1024
        gpu = torch.cuda.is_available()
        self.model = model = random_model(config, torch.bfloat16 if gpu else torch.float32, "cuda" if gpu else "cpu")
        caprese.apply(model, caprese.resolve_recipe(method=cell["method"]).methods)
        generator, size = torch.Generator().manual_seed(0), (cell["count"], cell["prompt"] + cell["completion"])
        ids = torch.randint(5, config.vocab_size, size, generator=generator).tolist()
        batches = make_batches([Sample(row, cell["prompt"], "", "") for row in ids], 8)

        def clock(run: Callable[[], Any]) -> float:
            if gpu:
                torch.accelerator.synchronize()
            begin = time.perf_counter()
            run()
            if gpu:
                torch.accelerator.synchronize()
            return time.perf_counter() - begin

        @torch.no_grad()
        def forward(observer: Any) -> None:
            for batch in (each.to(model.device) for each in batches):
                context = prefill(model, batch)
                if observer is None:
                    with caprese.dense(model):
                        completion_hidden(model, batch, context)
                else:
                    with phases(model, batch.prompt_lengths, observer):
                        completion_hidden(model, batch, context)

        forward(None)  # warm-up
        accumulate(model, batches[:1], new_moments(model))
        moments = new_moments(model)
        plain, seen = clock(lambda: forward(None)), clock(lambda: forward(lambda *_: None))
        total = clock(lambda: accumulate(model, batches, moments))
        solve = clock(lambda: fit_layer(moments[0], moments[0], cell["rank"]))
        parts = {"forward": plain, "residual": max(0.0, seen - plain), "accumulators": max(0.0, total - seen)}
        tokens, needed = cell["count"] * cell["completion"], cell["projected_samples"] * cell["projected_completion"]
        hours = total / tokens * needed * whole / config.num_hidden_layers / 3600 + solve * whole / 3600
        return {
            "tokens_per_second": tokens / total,
            "share": {name: value / total for name, value in parts.items()},
            "solve_seconds_per_layer": solve,
            "projected_hours": hours,
        }
