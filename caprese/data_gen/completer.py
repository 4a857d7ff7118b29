"""Prompts are completed, shard by shard: what a teacher is, and the model in this process as one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import nn
from transformers import PreTrainedTokenizerBase

from caprese.data_gen.samples import Samples
from caprese.inference.generate import completions, ends_of, generate
from caprese.inference.sampling import nucleus
from caprese.models import device_of

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Asked:
    """The prompts of one shard, and how they are to be completed."""

    prompts: Sequence[Sequence[int]]
    """Token ids."""
    seed: object
    """Of this shard; with the same, the same completions come back."""
    ends: Collection[int] = ()
    """Tokens that end a completion, beside the model's own."""


class Completer(Protocol):
    """A teacher that completes prompts."""

    model: nn.Module
    """The dense base that it stands for."""
    tokenizer: PreTrainedTokenizerBase

    @property
    def note(self) -> str:
        """What is worth saying of how it went, once it is done; empty if nothing is."""
        ...

    def complete(
        self, asked: Iterable[Asked], config: Samples, advance: Advance | None = None
    ) -> Generator[list[list[int]], None, None]:
        """Sampled completions, shard by shard in the order in which they were asked for, each in the order of its
        prompts and with the token that ended it; `advance` hears how many are done."""
        ...


def number_of(*parts: object) -> int:
    """A seed, of 56 bits, from whatever it depends on."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


class Here:
    """The model in this process, in left-padded batches; sequences that end leave them."""

    note = ""

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer

    def complete(
        self, asked: Iterable[Asked], config: Samples, advance: Advance | None = None
    ) -> Generator[list[list[int]], None, None]:
        """See `Completer.complete`."""
        for each in asked:
            yield self._shard(each, config, advance)

    def _shard(self, asked: Asked, config: Samples, advance: Advance | None) -> list[list[int]]:
        device, ends = device_of(self.model), ends_of(self.model, self.tokenizer).union(asked.ends)
        prompts = asked.prompts
        # long prompts together: less padding
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
        results: list[list[int]] = [[] for _ in prompts]
        for start in range(0, len(order), config.batch_size):
            batch = order[start : start + config.batch_size]
            seed = number_of(asked.seed, start)
            sampler = nucleus(len(batch), config.temperature, config.top_p, seed, device)
            steps = generate(self.model, [prompts[i] for i in batch], config.max_new_tokens, sampler, ends=ends)
            for i, tokens in zip(batch, completions(steps, len(batch)), strict=True):
                results[i] = tokens
            if advance is not None:
                advance(len(batch))
        return results


def complete(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    config: Samples,
    seed: object,
) -> list[list[int]]:
    """Sampled completions of tokenised prompts in this process, in their order; each stops at an end of text or the
    limit."""
    return next(Here(model, tokenizer).complete([Asked(prompts, seed)], config))
