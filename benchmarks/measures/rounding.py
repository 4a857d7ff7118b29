"""How far passes of several tokens are from one pass over the whole text, in transformers alone and in any type.

Settings of a cell: model; dtype; prompts, a source, null for everyday ones; count; new_tokens; width, tokens a pass
after the prompt's. The text is the model's own greedy one. What a width finds likeliest misses the largest logit of the
wide pass by so much, in parts of the largest absolute logit; the same beside a float32 pass over the same weights.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache

import caprese
from caprese.evaluation import environment
from caprese.models import device_of
from caprese.studies.prompts import some_prompts


class Measure:
    """Holds the model in both types and its texts."""

    def __init__(self) -> None:
        self.known: tuple[Any, ...] = ()

    def environment(self) -> dict[str, Any]:
        return environment(self.model)

    @torch.no_grad()
    def __call__(self, cell: dict[str, Any]) -> dict[str, Any]:
        known = tuple(cell[name] for name in ("model", "dtype", "prompts", "count", "new_tokens"))
        if known != self.known:
            self._prepare(*known)
            self.known = known
        misses: dict[str, list[float]] = {"wide": [], "float32": []}
        for ids, start, wide in self.texts:
            found = self._narrow(ids, start, cell["width"]).argmax(-1, keepdim=True)
            for name, judge in wide.items():
                largest, size = judge.amax(-1), judge.abs().amax(-1)
                misses[name] += ((largest - judge.gather(1, found)[:, 0]) / size).tolist()
        counts = {name: sum(miss > 0 for miss in of) for name, of in misses.items()}
        return {"tokens": len(misses["wide"]), "ties": counts, "missed": {k: max(of) for k, of in misses.items()}}

    def _prepare(self, name: str, dtype: str, prompts: str | None, count: int, new_tokens: int) -> None:
        self.model, tokenizer = caprese.load_base(name, dtype=dtype)
        exact, _ = caprese.load_base(name, dtype="float32")
        self.texts = []
        for prompt in some_prompts(prompts, count, self.model, tokenizer, new_tokens):
            ids = self.model.generate(
                torch.tensor([prompt], device=device_of(self.model)),
                max_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
            start = len(prompt) - 1
            judges = {"wide": self.model, "float32": exact}
            logits = {k: m(ids, use_cache=False).logits[0, start:-1].float() for k, m in judges.items()}
            self.texts.append((ids, start, logits))

    def _narrow(self, ids: torch.Tensor, start: int, width: int) -> torch.Tensor:
        """Logits of everything written, the prompt in one pass and then `width` tokens a pass, [tokens, V]."""
        cache = DynamicCache(config=self.model.config)
        begins = [0, *range(start + 1, ids.shape[1] - 1, width)]
        parts = [
            self.model(ids[:, begin:end], past_key_values=cache, use_cache=True).logits[0]
            for begin, end in zip(begins, [*begins[1:], ids.shape[1] - 1], strict=True)
        ]
        return torch.cat(parts)[start:].float()
