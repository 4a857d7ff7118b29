"""Time to next token of known shapes with random weights, as `caprese bench` measures it, one method a cell.

Settings of a cell: shape; method; rank; batch; prompt_tokens; new_tokens; rows, with commas.
"""

from __future__ import annotations

import gc
from typing import Any

import torch

from caprese.evaluation import environment
from caprese.models import random_model, shape_config
from caprese.recipes import resolve_recipe
from caprese.studies.bench import bench


class Measure:
    """Holds the model of the last shape; on a GPU, if there is one, in bfloat16."""

    def __init__(self) -> None:
        self.shape: str | None = None
        self.model: Any = None

    def environment(self) -> dict[str, Any]:
        return environment(self.model)

    def __call__(self, cell: dict[str, Any]) -> dict[str, Any]:
        gpu = torch.cuda.is_available()
        if cell["shape"] != self.shape:
            self.model, self.shape = None, cell["shape"]
            kind, place = (torch.bfloat16, "cuda") if gpu else (torch.float32, "cpu")
            self.model = random_model(shape_config(cell["shape"]), kind, place)
        torch.compiler.reset()  # a compiled step is a model's own
        gc.collect()
        if gpu:
            torch.cuda.empty_cache()
        methods = resolve_recipe(method=cell["method"]).methods
        settings = {key: cell[key] for key in ("rank", "prompt_tokens", "new_tokens")}
        found = bench(self.model, methods, [cell["batch"]], rows=cell["rows"].split(","), **settings)
        rows = {row.pop("name"): row for row in found.pop("rows")}
        return {"floor_ratio": found["floor_ratio"], "form": found["form"], "rows": rows}
