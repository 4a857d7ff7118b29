"""Drafting and verifying, as `caprese bench --lossless` measures it, one setting a cell.

Settings of a cell: model, or a known shape with random weights (whose acceptance says nothing: costs and break-even
do); adapter, a directory, or method; draft, own, lookup or a model; dtype; prompts, as a recipe names them, null for
everyday language; count, of prompts; new_tokens; batch; temperature; draft_tokens, null for as many as pay; compiled.
"""

from __future__ import annotations

import gc
from typing import Any

import torch

import caprese
from caprese.commands.pair import put_method
from caprese.evaluation import environment
from caprese.inference.lossless import rule_of
from caprese.models import device_of, random_model, shape_config
from caprese.studies.lossless import bench_lossless
from caprese.studies.prompts import some_prompts


class Measure:
    """Loads a model for each cell."""

    def __init__(self) -> None:
        self.model: Any = None

    def environment(self) -> dict[str, Any]:
        return environment(self.model)

    def __call__(self, cell: dict[str, Any]) -> dict[str, Any]:
        self.model = None
        torch.compiler.reset()
        gc.collect()
        gpu, tokenizer = torch.cuda.is_available(), None
        if cell["shape"]:
            config = shape_config(cell["shape"])
            kind, place = (torch.bfloat16, "cuda") if gpu else (torch.float32, "cpu")
            self.model = random_model(config, kind, place)
            seed = torch.Generator().manual_seed(0)
            prompts = torch.randint(config.vocab_size, (cell["count"], 64), generator=seed).tolist()
        else:
            self.model, tokenizer = caprese.load_base(cell["model"], dtype=cell["dtype"])
            prompts = some_prompts(cell["prompts"], cell["count"], self.model, tokenizer, cell["new_tokens"])
        draft = cell["draft"]
        if draft == "own" and cell["adapter"]:
            self.model = caprese.load(self.model, cell["adapter"], fused=True)
        elif draft == "own":
            put_method(self.model, cell["method"])
        elif draft != "lookup":
            draft, _ = caprese.load_base(draft, dtype=cell["dtype"])
        pair = caprese.Lossless(draft, tokens=cell["draft_tokens"], compiled=cell["compiled"])
        rule = rule_of(cell["temperature"], device=device_of(self.model))
        return bench_lossless(self.model, pair, prompts, cell["new_tokens"], rule, cell["batch"])
