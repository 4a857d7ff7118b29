"""Many answers to one prompt: one prefill for all, sequences leave the batch as they end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from caprese.data_gen.generate import NucleusSampler
from caprese.efficient_methods.memory import memory_of
from caprese.models import unwrap
from caprese.models.cache import roomy_cache

# Sequences are taken out of the batch when at least this part of it has ended: each time, the KV cache is copied.
_ENDED = 0.25


@torch.no_grad()
def sample(
    model: nn.Module,
    prompt: Sequence[int],
    count: int,
    *,
    max_new_tokens: int,
    temperature: float = 0.7,
    top_p: float = 0.95,
    seed: int = 0,
    ends: Sequence[int] | None = None,
) -> tuple[list[list[int]], list[bool]]:
    """`count` completions of one prompt, drawn together, and which of them ended: the others met the length limit.

    Args:
        prompt: token ids.
        ends: tokens that end a completion; the model's own if not given.
    """
    base = unwrap(model)
    device = base.get_input_embeddings().weight.device
    if ends is None:
        own = base.generation_config.eos_token_id
        ends = [own] if isinstance(own, int) else list(own or ())
    last = torch.tensor(list(ends), device=device)
    sampler = NucleusSampler(temperature, top_p, seed, device)
    ids = torch.tensor([list(prompt)], device=device)
    out: Any = base(input_ids=ids, past_key_values=roomy_cache(model), use_cache=True, logits_to_keep=1)
    cache = out.past_key_values
    if (memory := memory_of(cache)) is not None:
        memory.settle()  # it is not cropped: what would undo the prompt need not be repeated
    cache.batch_repeat_interleave(count)
    logits = out.logits[:, -1].repeat_interleave(count, 0)
    alive = torch.arange(count, device=device)
    answers: list[list[int]] = [[] for _ in range(count)]
    running = torch.ones(count, dtype=torch.bool, device=device)  # of those still in the batch
    for number in range(max_new_tokens):
        probabilities, index = sampler.nucleus(logits)
        drawn = index.gather(-1, torch.multinomial(probabilities, 1, generator=sampler.generator))
        for place, token, on in zip(alive.tolist(), drawn[:, 0].tolist(), running.tolist(), strict=True):
            if on:
                answers[place].append(token)
        running &= ~torch.isin(drawn[:, 0], last)
        left = int(running.sum())
        if not left or number == max_new_tokens - 1:
            break
        if left <= (1 - _ENDED) * len(alive):
            keep = running.nonzero()[:, 0]
            cache.batch_select_indices(keep)
            alive, drawn, running = alive[keep], drawn[keep], running[keep]
        logits = base(input_ids=drawn, past_key_values=cache, use_cache=True).logits[:, -1]
    cut = set(alive[running].tolist())
    return answers, [place not in cut for place in range(count)]
