"""Time to next token and cache memory against context length: dense, hybrid, pure.

Random weights. The caches are filled with random keys, values and states of the given length instead of by a prefill,
which a decode step cannot tell apart. Variants take turns; medians.

Settings of a cell: shape; keep_attention; context, in tokens; steps.
"""

from __future__ import annotations

import statistics
import time
from contextlib import nullcontext
from typing import Any

import torch
from transformers import DynamicCache

import caprese
from caprese.efficient_methods.mamba import MixerState, replacements
from caprese.efficient_methods.mamba.mixer import KERNEL
from caprese.evaluation import environment
from caprese.models import random_model, shape_config
from caprese.models.cache import RoomyCache


def filled(model: Any, length: int, mixed: set[int]) -> DynamicCache:
    """A cache as after `length` tokens."""
    config, kind = model.config, model.dtype
    heads, size = (
        config.num_key_value_heads,
        getattr(config, "head_dim", None) or (config.hidden_size // config.num_attention_heads),
    )
    cache = RoomyCache(config)
    mixers = {at.layer: at.mixer for at in replacements(model)}
    for i in range(config.num_hidden_layers):
        if i in mixed:
            state = MixerState()
            m = mixers[i]
            state.keep(
                torch.randn(1, KERNEL - 1, m.channels, dtype=kind), torch.randn(1, m.heads, m.size, m.size), length
            )
            cache.layers[i] = state
        else:
            cache.layers[i].update(*(torch.randn(1, heads, length, size, dtype=kind) for _ in range(2)))
    return cache


def nbytes(cache: Any) -> int:
    total = 0
    for layer in cache.layers:
        if isinstance(layer, MixerState):
            total += layer.window.nbytes + layer.state.nbytes
        else:
            total += layer.keys.nbytes + layer.values.nbytes
    return total


@torch.no_grad()
def measure(model: Any, length: int, mixed: set[int], steps: int) -> dict[str, dict[str, float]]:
    """TTNT and bytes of dense and of what is applied, in turns."""
    caches = {"dense": filled(model, length, set()), "mixed": filled(model, length, mixed)}
    held = {name: nbytes(cache) for name, cache in caches.items()}
    times: dict[str, list[float]] = {name: [] for name in caches}
    token = torch.tensor([[5]])
    for turn in range(steps + 1):
        for name, cache in caches.items():
            with caprese.dense(model) if name == "dense" else nullcontext():
                begin = time.perf_counter()
                model(input_ids=token, past_key_values=cache, use_cache=True)
                if turn:
                    times[name].append(1000 * (time.perf_counter() - begin))
    return {name: {"ttnt_ms": statistics.median(times[name]), "cache_bytes": held[name]} for name in caches}


class Measure:
    """Holds one model, and applies what each cell asks for."""

    def __init__(self) -> None:
        self.model: Any = None

    def environment(self) -> dict[str, Any]:
        return environment(self.model)

    def __call__(self, cell: dict[str, Any]) -> dict[str, Any]:
        if self.model is None:
            self.model = random_model(shape_config(cell["shape"]), torch.float32, "cpu")
        caprese.apply(self.model, caprese.Mamba(keep_attention=cell["keep_attention"]))
        try:
            mixed = {at.layer for at in replacements(self.model)}
            found = measure(self.model, cell["context"], mixed, cell["steps"])
        finally:
            caprese.remove(self.model)
        return {**found, "ratio": found["mixed"]["ttnt_ms"] / found["dense"]["ttnt_ms"]}
