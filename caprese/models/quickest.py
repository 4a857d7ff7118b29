"""In which type this machine multiplies faster; measured."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

from caprese.models.families import family_of

# Elements of the weight that is timed: larger than most processors' caches, if the model is.
_ELEMENTS = 2**25
# Tokens of a prompt that is answered at equal length.
_TOKENS = 64
# How much faster bfloat16 has to be: below it, its rounding is not worth it.
_FASTER = 1.1


def product_seconds(dtype: torch.dtype, tokens: int, inner: int, outer: int, tries: int = 5) -> float:
    """The least time of several products [tokens, inner] x [inner, outer] on the CPU."""
    x, weight = torch.ones(tokens, inner, dtype=dtype), torch.ones(outer, inner, dtype=dtype)
    least = float("inf")
    for _ in range(tries + 1):
        begin = time.perf_counter()
        nn.functional.linear(x, weight)
        least = min(least, time.perf_counter() - begin)
    return least


def quickest_dtype(config: Any, device: str) -> torch.dtype | None:
    """float32 or bfloat16: in which a model of this config answers sooner on this CPU, by its FFN's products of a
    prompt and, one by one, of as many new tokens, in torch; None on accelerators, for the checkpoint's own type."""
    if device != "cpu":
        return None
    width = getattr(config, family_of(config).width, None) or 4 * config.hidden_size
    rows = max(1, min(_ELEMENTS // config.hidden_size, width * config.num_hidden_layers))
    seconds = {
        dtype: _TOKENS * product_seconds(dtype, 1, config.hidden_size, rows)
        + product_seconds(dtype, _TOKENS, config.hidden_size, rows, tries=2)
        for dtype in (torch.float32, torch.bfloat16)
    }
    return torch.bfloat16 if seconds[torch.float32] > _FASTER * seconds[torch.bfloat16] else torch.float32
