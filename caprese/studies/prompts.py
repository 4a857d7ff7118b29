"""Prompts that something is measured on."""

from __future__ import annotations

from typing import Any

from caprese.data_gen import Samples, load_elsewhere, load_prompts
from caprese.models import check_context

#: what prompts are called that no recipe trains on
EVERYDAY = "elsewhere"


def some_prompts(source: str | None, count: int, model: Any, tokenizer: Any, new_tokens: int) -> list[list[int]]:
    """Token ids of prompts: of a source as a recipe names it, or everyday language.

    Raises:
        CapreseError: a source that cannot be read.
    """
    if source is None:
        config = Samples(elsewhere=count, max_new_tokens=new_tokens)
        return [[*prompt.ids] for prompt in load_elsewhere(config, tokenizer, model)]
    config = Samples(prompts=source, max_new_tokens=new_tokens)
    found = load_prompts(source, count, 0, encode=config.encode(tokenizer))
    check_context(model, [prompt.text for prompt in found], [prompt.ids for prompt in found], new_tokens)
    return [[*prompt.ids] for prompt in found]
