"""The decode loop: all of caprese that generates reads it.

It decides for itself: always with a KV cache, and without the sampling defaults, penalties, limits and kinds of cache
that a model's config or generation config may hold. Only the ends of text are taken from there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import Cache, PreTrainedTokenizerBase
from transformers.cache_utils import StaticLayer

from caprese.efficient_methods.memory import memory_of
from caprese.errors import CapreseError
from caprese.inference.sampling import Sampler, greedy
from caprese.models import device_of, unwrap
from caprese.models.cache import roomy_cache

# Sequences are taken out of the batch when at least this part of it has ended: each time, the KV cache is copied.
_ENDED = 0.25


class NewTokens(NamedTuple):
    """One token of every sequence that had not ended."""

    rows: torch.Tensor
    """Which sequences, [n], counted as they were given."""
    ids: torch.Tensor
    """Their tokens, [n]."""
    moment: float
    """When they were there, in seconds of `clock`."""


def clock(device: torch.device) -> float:
    """Seconds, when all that was started on the device is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def ends_of(model: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None) -> frozenset[int]:
    """Every token that ends a text: of the generation config, the tokenizer and the model's config.

    The config's own counts where the tokenizer has it among its special tokens: left out of config.json, it is the
    default of the model's class, which another vocabulary may use for a word.
    """
    base: Any = unwrap(model)

    def ids(of: Any) -> set[int]:
        found = getattr(of, "eos_token_id", None)
        return {found} if isinstance(found, int) else set(found or ())

    ends = ids(getattr(base, "generation_config", None)) | ids(tokenizer)
    own = ids(base.config.get_text_config())
    if tokenizer is not None:
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        own &= special | set(tokenizer.all_special_ids)
    return frozenset(ends | own)


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampler: Sampler = greedy,
    *,
    ends: Collection[int] = (),
    copies: int = 1,
    cache: Cache | None = None,
    step: Callable[..., Any] | None = None,
) -> Iterator[NewTokens]:
    """Decode a batch; sequences that end leave it.

    The first `next` reads the prompts, each of the following runs one decode step. What is around a `next`, such as
    `variant(model, name)`, holds for that step.

    Args:
        prompts: token ids; shorter ones are padded on the left.
        ends: tokens that end a sequence, each yielded once.
        copies: sequences for each prompt, which is read once; they follow one another.
        cache: an empty one to use instead of the loop's own.
        step: what runs a decode step, such as a compiled one. Its batch stays as it is.

    Raises:
        CapreseError: a prompt without tokens (at the first `next`).
    """
    base: Any = unwrap(model)
    device = device_of(model)
    batch = _Batch(prompts, max_new_tokens, device)
    cropped = cache is not None  # only by a caller whose own it is
    cache = roomy_cache(model) if cache is None else cache
    out = base(**batch.inputs(batch.ids), past_key_values=cache, use_cache=True, logits_to_keep=1)
    cache, logits = out.past_key_values, out.logits[:, -1]
    assert cache is not None
    if not cropped and (memory := memory_of(cache)) is not None:
        memory.settle()
    if copies > 1:
        cache.batch_repeat_interleave(copies)
        batch.each(lambda t: t.repeat_interleave(copies, 0))
        logits = logits.repeat_interleave(copies, 0)
    # of the sequences that go on: which they are, and where in the batch
    rows = places = torch.arange(len(logits), device=device)
    last = torch.tensor(sorted(ends), device=device)
    room = max((each.max_cache_len for each in cache.layers if isinstance(each, StaticLayer)), default=None)
    for left in reversed(range(max_new_tokens)):
        new = sampler(logits if len(places) == len(logits) else logits[places], rows)
        yield NewTokens(rows, new, clock(device))
        if len(last):
            on = ~torch.isin(new, last)
            rows, places, new = rows[on], places[on], new[on]
        if not left or not len(rows):
            return
        if step is None and len(rows) <= (1 - _ENDED) * len(logits):
            cache.batch_select_indices(places)
            batch.each(lambda t, kept=places: t[kept])  # type: ignore[misc]
            places = torch.arange(len(rows), device=device)
        elif len(rows) < len(logits):  # what those that ended are fed is read by nobody
            new = new.new_zeros(len(logits)).index_put((places,), new)
        batch.length += 1
        inputs = batch.inputs(new[:, None], room)
        logits = (step or base)(**inputs, past_key_values=cache, use_cache=True).logits[:, -1]


class _Batch:
    """Prompts padded on the left, and what a pass is told of the padding; nothing where there is none."""

    def __init__(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, device: torch.device) -> None:
        lengths = [len(prompt) for prompt in prompts]
        if not min(lengths):
            raise CapreseError("a prompt has no tokens, and there is nothing to go on from; leave it out")
        self.length = longest = max(lengths)
        self.ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
        self.padding: torch.Tensor | None = None
        if min(lengths) < longest:
            self.padding = longest - torch.tensor(lengths, device=device)[:, None]
            self.places = torch.arange(longest + max_new_tokens, device=device)

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Follow sequences that are repeated or leave."""
        self.padding = None if self.padding is None else change(self.padding)

    def inputs(self, ids: torch.Tensor, room: int | None = None) -> dict[str, torch.Tensor]:
        """Of a pass over the last `ids` [B, T] of `length` tokens.

        Args:
            room: of a static cache, all of whose places the mask is of, so that a compiled step sees one shape.
        """
        if self.padding is None:
            return {"input_ids": ids}
        places = self.places[: self.length]
        positions = (places[-ids.shape[1] :] - self.padding).clamp(min=0)
        real = (places >= self.padding).long()
        if room is not None:
            real = nn.functional.pad(real, (0, room - self.length))
        return {"input_ids": ids, "attention_mask": real, "position_ids": positions}


def completions(steps: Iterable[NewTokens], count: int) -> list[list[int]]:
    """The tokens of each of `count` sequences, the one that ended it included."""
    found: list[list[int]] = [[] for _ in range(count)]
    for rows, ids, _ in steps:
        for row, token in zip(rows.tolist(), ids.tolist(), strict=True):
            found[row].append(token)
    return found
