"""How many tokens a second the model in this process draws, as the samples stage does.

Settings of a cell: model; prompts, as a recipe names them; count, of prompts; batch_size; new_tokens, of each at most.
"""

from __future__ import annotations

import time
from typing import Any

import torch

import caprese
from caprese.data_gen import Samples, complete
from caprese.distill.precision import is_quicker, kept_casts
from caprese.studies.prompts import some_prompts
from measures import Once


class Measure(Once):
    """Keeps the model."""

    def __call__(self, cell: dict[str, Any]) -> dict[str, Any]:
        model, tokenizer = self.once("model", lambda: caprese.load_base(cell["model"]))
        prompts = some_prompts(cell["prompts"], cell["count"], model, tokenizer, cell["new_tokens"])
        config = Samples(max_new_tokens=cell["new_tokens"], batch_size=cell["batch_size"])
        quick = is_quicker(model)
        with kept_casts(model, quick):
            complete(model, tokenizer, prompts[:2], config.model_copy(update={"max_new_tokens": 4}), 0)
            begin = time.perf_counter()
            drawn = complete(model, tokenizer, prompts, config, 0)
            seconds = time.perf_counter() - begin
        tokens = sum(map(len, drawn))
        return {
            "products": "bfloat16" if quick else "float32",
            "threads": torch.get_num_threads(),
            "tokens": tokens,
            "tokens_per_second": tokens / seconds,
        }
