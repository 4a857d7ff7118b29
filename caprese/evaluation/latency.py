"""Time to next token (TTNT): token by token, the variants taking turns, so that a slow moment hits all alike."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from torch import nn

from caprese.efficient_methods import cost_of, phases_of
from caprese.evaluation.fidelity import VARIANTS, variant
from caprese.inference import fuse, is_fused, unfuse
from caprese.inference.generate import clock, generate
from caprese.models import context_of, device_of
from caprese.progress import bar

# Tokens that one variant decodes before the next takes its turn: long enough that processor caches are warm, short
# enough that a slow moment of the machine hits all alike. The first of each turn is not counted.
TURN = 5


def time_to_next_token(
    model: Any,
    prompt: Sequence[int],
    new_tokens: int,
    names: Sequence[str] = VARIANTS,
    label: str = "evaluation: latency",
) -> dict[str, dict[str, float]]:
    """Batch 1, greedy, fused: {name: {"ttnt_ms": median, "spread_ms": interquartile range}}, taking turns.

    With reselection the mean, over at least two rounds of it in one turn: its dense passes are part of the time.
    """
    every = phases_of(model).reselect_every
    turn_length = _turn(model)
    device = device_of(model)
    rounds = min(max(1, -(-new_tokens // (turn_length - 1))), rounds_within(model, prompt))
    new_tokens = min(max(new_tokens, turn_length - 1), rounds * (turn_length - 1))
    loops = {name: generate(model, [prompt], 1 + rounds * turn_length) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        with variant(model, name):
            next(loops[name])  # the prompt

    def step(name: str) -> float:
        begin = clock(device)
        return 1000 * (next(loops[name]).moment - begin)

    fused_before = is_fused(model)
    if not fused_before:
        fuse(model)
    try:
        with bar(label, new_tokens, "tokens") as advance:
            for turn in range(rounds):
                for offset in range(len(names)):  # nobody is always first
                    name = names[(turn + offset) % len(names)]
                    with variant(model, name):
                        step(name)
                        while len(times[name]) < min(new_tokens, (turn + 1) * (turn_length - 1)):
                            times[name].append(step(name))
                advance(min(turn_length - 1, new_tokens - turn * (turn_length - 1)))
    finally:
        if not fused_before:
            unfuse(model)
    result = {}
    for name, values in times.items():
        low, middle, high = statistics.quantiles(values * 2 if len(values) == 1 else values, n=4)
        ttnt = middle if every is None else statistics.mean(values)
        result[name] = {"ttnt_ms": ttnt, "spread_ms": high - low}
    return result


def _turn(model: nn.Module) -> int:
    every = phases_of(model).reselect_every
    return TURN if every is None else 2 * every + 1


def rounds_within(model: nn.Module, prompt: Sequence[int]) -> int:
    """How many turns of each variant the model's context has room for."""
    return max(0, ((context_of(model) or 10**9) - len(prompt) - 1) // _turn(model))


def parameter_counts(model: nn.Module) -> dict[str, Any]:
    """Parameters of base and adapter, and those read for one generated token.

    An input embedding that is not also the head is looked up, not read. With reselection, each token has its part of
    the dense passes.
    """
    c = cost_of(model)
    return {
        "base": c.base,
        "adapter": c.adapter,
        "mixers": c.stand_ins,
        "fraction": c.adapter / c.base,
        **{f"active_{name}": c.read(name) for name in ("dense", "efficient", "recovered")},
    }
