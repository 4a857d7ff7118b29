"""One recipe of the layer-wise stage: held-out error by layer, and its time.

Settings of a cell: model; samples; method; count, training samples; rank; how, closed or adam; cached, whether every
layer's x and E are held in memory, where the pass that fills it is not part of the time; epochs, of adam. What both
need to choose a ridge by is not part of either's time.
"""

from __future__ import annotations

import time
from typing import Any

import torch

import caprese
from caprese.adapters import attach_adapter, set_branch
from caprese.distill import Layerwise, Teacher, accumulate, fit_layer, make_batches, new_moments
from caprese.distill.adam import collect_activations, fit_adam
from caprese.efficient_methods import applied_ffns
from caprese.evaluation import environment, layer_errors
from measures.recovery import read_samples


class Measure:
    """A fresh model for every cell."""

    def environment(self) -> dict[str, Any]:
        return environment(self.model)

    def __call__(self, cell: dict[str, Any]) -> dict[str, Any]:
        self.model, _ = caprese.load_base(cell["model"])
        batches = {
            split: make_batches(read_samples(cell["samples"], split)[: cell["count"]], 8)
            for split in ("train", "validation", "test")
        }
        caprese.apply(self.model, caprese.resolve_recipe(method=cell["method"]).methods)
        torch.manual_seed(0)
        adapted = attach_adapter(self.model, cell["rank"])
        wrappers = list(applied_ffns(self.model).values())
        held = new_moments(self.model)
        accumulate(self.model, batches["validation"], held)
        known = [collect_activations(self.model, batch) for batch in batches["train"]] if cell["cached"] else []
        begin = time.perf_counter()
        if cell["how"] == "adam":
            config = Layerwise(how="adam", epochs=cell["epochs"], cache_activations=cell["cached"])
            fit_adam(adapted, batches["train"], config, 0, known=dict(enumerate(known)) if known else None)
        else:
            moments = new_moments(self.model)
            for seen in known:
                for m, (x, e) in zip(moments, seen.values(), strict=True):
                    m.add(x, e, e)
            if not known:
                accumulate(self.model, batches["train"], moments)
            fits = [fit_layer(m, h, cell["rank"]) for m, h in zip(moments, held, strict=True)]
            for wrapper, fit in zip(wrappers, fits, strict=True):
                set_branch(wrapper.recovery, *fit.at(cell["rank"]))
        taken = time.perf_counter() - begin
        errors = [row["recovered"] for row in layer_errors(adapted, Teacher(adapted, batches["test"], 0))]
        tokens = sum(batch.tokens for batch in batches["train"])
        return {"fit_seconds": taken, "tokens": tokens, "error": sum(errors) / len(errors), "errors": errors}
