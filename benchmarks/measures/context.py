"""Time to next token and cache memory against context length: dense, hybrid, pure.

Random weights. The caches are filled with random keys, values and states of the given length instead of by a prefill,
which a decode step cannot tell apart. On a CPU variants take turns, in float32; on a GPU each is a CUDA graph that is
replayed, in bfloat16. Medians.

Settings of a cell: shape; keep_attention; context, in tokens; batch; steps.
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
from measures.kernels import GPU, microseconds


def filled(model: Any, length: int, mixed: set[int], batch: int) -> DynamicCache:
    """A cache as after `length` tokens."""
    config = model.config
    like: dict[str, Any] = {"dtype": model.dtype, "device": model.device}
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
            state.window = torch.randn(batch, KERNEL - 1, m.channels, **like)
            state.state = torch.randn(batch, m.heads, m.size, m.width, device=model.device)
            state.length = length
            cache.layers[i] = state
        else:
            cache.layers[i].update(*(torch.randn(batch, heads, length, size, **like) for _ in range(2)))
    return cache


def nbytes(cache: Any) -> int:
    total = 0
    for layer in cache.layers:
        if isinstance(layer, MixerState):
            total += layer.window.nbytes + layer.state.nbytes
        else:
            total += layer.keys.nbytes + layer.values.nbytes
    return total


def of(name: str, model: Any) -> Any:
    """With what a variant is made of at work."""
    return caprese.dense(model) if name == "dense" else nullcontext()


@torch.no_grad()
def measure(model: Any, length: int, mixed: set[int], batch: int, steps: int) -> dict[str, dict[str, float]]:
    """TTNT and bytes of dense and of what is applied, in turns."""
    caches = {"dense": filled(model, length, set(), batch), "mixed": filled(model, length, mixed, batch)}
    held = {name: nbytes(cache) for name, cache in caches.items()}
    times: dict[str, list[float]] = {name: [] for name in caches}
    token = torch.full((batch, 1), 5)
    for turn in range(steps + 1):
        for name, cache in caches.items():
            with of(name, model):
                begin = time.perf_counter()
                model(input_ids=token, past_key_values=cache, use_cache=True)
                if turn:
                    times[name].append(1000 * (time.perf_counter() - begin))
    return {name: {"ttnt_ms": statistics.median(times[name]), "cache_bytes": held[name]} for name in caches}


@torch.no_grad()
def measure_graphs(model: Any, length: int, mixed: set[int], batch: int, steps: int) -> dict[str, dict[str, float]]:
    """The same, one after the other: two caches may be more than a GPU holds."""
    token = torch.full((batch, 1), 5, device=model.device)
    found = {}
    for name, places in {"dense": set[int](), "mixed": mixed}.items():
        cache = filled(model, length, places, batch)
        held = nbytes(cache)
        with of(name, model):
            us = microseconds(
                [lambda cache=cache: model(input_ids=token, past_key_values=cache, use_cache=True)], steps
            )
        found[name] = {"ttnt_ms": us / 1000, "cache_bytes": held, "tokens_per_second": 1e6 * batch / us}
        del cache
        torch.cuda.empty_cache()
    return found


class Measure:
    """Holds one model, and applies what each cell asks for."""

    def __init__(self) -> None:
        self.model: Any = None

    def environment(self) -> dict[str, Any]:
        return environment(self.model)

    def __call__(self, cell: dict[str, Any]) -> dict[str, Any]:
        if self.model is None:
            place: Any = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
            self.model = random_model(shape_config(cell["shape"]), place[1], place[0])
        caprese.apply(self.model, caprese.Mamba(keep_attention=cell["keep_attention"]))
        try:
            mixed = {at.layer for at in replacements(self.model)}
            run = measure_graphs if GPU else measure
            found = run(self.model, cell["context"], mixed, cell["batch"], cell["steps"])
        finally:
            caprese.remove(self.model)
        return {**found, "ratio": found["mixed"]["ttnt_ms"] / found["dense"]["ttnt_ms"]}
