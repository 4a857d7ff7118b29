"""Samples as batches, and the two passes that training and evaluation are made of: prompt, then completion.

A prompt that runs dense does so in every phase of every stage, so its KV cache and what a method learns from it do not
depend on the adapter: one prefill serves teacher and student, and no gradient goes through it. Where it does not
(prompts run efficient, or attentions are replaced), both are one pass.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import numpy as np
import torch
from torch import nn
from transformers import Cache

from caprese.data_gen import Sample
from caprese.efficient_methods import Observer, Prefill, Tokens, phases, phases_of
from caprese.efficient_methods.memory import keep_memory, memory_of
from caprese.models import unwrap


@dataclass(frozen=True)
class Batch:
    """Prompts padded left, completions padded right, so that they meet.

    `inputs` are the completion tokens that are read, all but the last; `targets` the tokens they predict. `first` is
    what the prompt predicts: None where the prompt is dense, whose prediction cannot differ. `throughout`: what comes
    before it in the prompt counts as well.
    Shapes: prompt [B, P], inputs, targets and mask [B, C], first [B].
    """

    prompt: torch.Tensor
    prompt_mask: torch.Tensor
    inputs: torch.Tensor
    targets: torch.Tensor
    mask: torch.Tensor
    first: torch.Tensor | None = None
    throughout: bool = False

    @property
    def prompt_lengths(self) -> torch.Tensor:
        return self.prompt_mask.sum(-1)

    @property
    def scored(self) -> torch.Tensor:
        """Those positions whose prediction counts, [B, P + C]."""
        asked = self.prompt_mask.clone()
        asked[:, :-1] &= self.throughout
        asked[:, -1] = self.first is not None
        return torch.cat([asked, self.mask], 1)

    @property
    def predicted(self) -> torch.Tensor:
        """The tokens that the scored positions predict, [n]."""
        first = self.prompt[:, -1] if self.first is None else self.first
        return torch.cat([self.prompt[:, 1:], first[:, None], self.targets], 1)[self.scored]

    @property
    def tokens(self) -> int:
        return int(self.scored.sum())

    def whole(self, prefill: Prefill = "dense") -> Tokens:
        """Prompt and completion inputs in one, for calibration: on the tokens that will run efficient."""
        ids, mask = torch.cat([self.prompt, self.inputs], 1), torch.cat([self.prompt_mask, self.mask], 1)
        lengths = self.prompt_lengths
        return Tokens(ids, torch.zeros_like(lengths) if prefill == "efficient" else lengths, mask)

    def to(self, device: torch.device) -> Batch:
        moved: dict[str, Any] = {n: t.to(device) for n, t in vars(self).items() if isinstance(t, torch.Tensor)}
        return replace(self, **moved)


class Batches(Sequence[Batch]):
    """Batches of samples, each made when it is asked for: many samples take no more memory than few."""

    def __init__(
        self, samples: Sequence[Sample], groups: Sequence[Sequence[int]], first: bool, throughout: bool
    ) -> None:
        self.samples, self.groups, self.first, self.throughout = samples, groups, first, throughout

    def __len__(self) -> int:
        return len(self.groups)

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> list[Batch]: ...
    def __getitem__(self, index: int | slice) -> Batch | list[Batch]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._batch([self.samples[i] for i in self.groups[index]])

    def _batch(self, samples: Sequence[Sample]) -> Batch:
        width = max(s.prompt_length for s in samples)
        length = max(len(s.completion_ids) for s in samples) - 1
        prompt = torch.zeros(len(samples), width, dtype=torch.long)
        prompt_mask = torch.zeros_like(prompt, dtype=torch.bool)
        inputs = torch.zeros(len(samples), length, dtype=torch.long)
        targets, mask = torch.zeros_like(inputs), torch.zeros_like(inputs, dtype=torch.bool)
        for row, sample in enumerate(samples):
            prompt[row, width - sample.prompt_length :] = torch.tensor(sample.prompt_ids)
            prompt_mask[row, width - sample.prompt_length :] = True
            n = len(sample.completion_ids) - 1
            inputs[row, :n] = torch.tensor(sample.completion_ids[:-1])
            targets[row, :n] = torch.tensor(sample.completion_ids[1:])
            mask[row, :n] = True
        begins = torch.tensor([s.completion_ids[0] for s in samples]) if self.first else None
        return Batch(prompt, prompt_mask, inputs, targets, mask, begins, self.throughout)


def make_batches(samples: Sequence[Sample], size: int, first: bool = False, throughout: bool = False) -> Batches:
    """Batches of samples of like length; always the same ones for the same samples.

    Samples whose completion is a single token are left out: after a dense prompt they have nothing to learn from, and
    after another hardly more.

    Args:
        first: a completion's first token counts as well: for models whose prompts do not run dense.
        throughout: and the prompt's own tokens.
    """

    def key(sample: Sample) -> tuple[int, bytes]:  # of ids of one length, bytes are in the order of the ids
        return len(sample.input_ids), np.array(sample.input_ids, ">u4").tobytes()

    useful = sorted((key(s), i) for i, s in enumerate(samples) if len(s.completion_ids) > 1)
    groups = [[i for _, i in useful[at : at + size]] for at in range(0, len(useful), size)]
    return Batches(samples, groups, first, throughout)


@dataclass(frozen=True)
class Context:
    """What comes before the completion inputs, in blocks: (first, end, KV cache with what the methods learned).

    No block where prompts do not run dense: then prompt and completion are one pass. One without reselection. With it,
    a block for every `reselect_every` tokens, whose cache holds the prompt and the blocks before it as the dense model
    computes them (arXiv 2505.07861, section 5).
    """

    blocks: list[tuple[int, int, Cache]]

    @property
    def nbytes(self) -> int:
        if not self.blocks:
            return 0
        # the others share the longest cache's tensors, but for sliding windows; see `prefill`
        each: list[list[Any]] = [cache.layers for _, _, cache in self.blocks]
        layers = each[-1] + [layer for before in each[:-1] for layer in before if layer.is_sliding]
        learned = [memory for _, _, cache in self.blocks if (memory := memory_of(cache)) is not None]
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers) + sum(
            memory.nbytes for memory in learned
        )


@torch.no_grad()
def prefill(model: nn.Module, batch: Batch) -> Context:
    """The dense pass over the prompts, and over what reselection will have passed through the dense model."""
    if not phases_of(model).dense_prompts:  # teacher and student have no prompt in common
        return Context([])
    lengths = batch.prompt_lengths
    with phases(model, lengths):
        cache = _decoder(model, batch.prompt, batch.prompt_mask, positions_of(batch.prompt_mask), None)
    size = batch.inputs.shape[1]
    every = phases_of(model).reselect_every or size
    blocks = []
    for first in range(0, size, every):
        end = min(first + every, size)
        if (memory := memory_of(cache)) is not None:
            memory.settle()  # these caches are never cropped, and many are remembered
        blocks.append((first, end, fork(cache)))
        if end < size:
            mask = torch.cat([batch.prompt_mask, batch.mask[:, :end]], 1)
            positions = lengths[:, None] + torch.arange(first, end, device=lengths.device)
            with phases(model, lengths + end):
                cache = _decoder(model, batch.inputs[:, first:end], mask, positions, cache)
    full: list[Any] = cache.layers
    for _, _, before in blocks[:-1]:  # every cache begins the longest one; a sliding window has lost its beginning
        own: list[Any] = before.layers
        for layer, longest in zip(own, full, strict=True):
            if not layer.is_sliding:
                n = layer.keys.shape[-2]
                layer.keys, layer.values = longest.keys[..., :n, :], longest.values[..., :n, :]
    return Context(blocks)


def positions_of(mask: torch.Tensor) -> torch.Tensor:
    """Where each real token stands in its text, [B, T]."""
    return (mask.cumsum(-1) - 1).clamp_min(0)


def _decoder(
    model: nn.Module, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Cache | None
) -> Cache:
    out = unwrap(model).get_decoder()(
        input_ids=ids, attention_mask=mask.long(), position_ids=positions, past_key_values=cache, use_cache=True
    )
    return out.past_key_values


def fork(cache: Cache) -> Cache:
    """A cache that grows on its own; what is in it already is shared."""
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    if (memory := memory_of(cache)) is not None:
        keep_memory(twin, memory.fork())
    return twin


def completion_hidden(
    model: nn.Module, batch: Batch, context: Context, observer: Observer | None = None
) -> torch.Tensor:
    """Final hidden states (before the LM head) of what counts after `prefill`, [n, D]; they predict `batch.predicted`.

    Efficient, with the adapter; dense inside `dense(model)`. The context is left as it was.
    """
    lengths = batch.prompt_lengths
    if not context.blocks:
        with phases(model, lengths, observer):
            return whole_hidden(model, batch)
    assert batch.first is None  # no block predicts it
    blocks = context.blocks
    if phases_of(model).dense:
        blocks = [(0, batch.inputs.shape[1], blocks[0][2])]
    hidden = []
    for first, end, cache in blocks:
        with phases(model, lengths, observer):
            out = unwrap(model).get_decoder()(
                input_ids=batch.inputs[:, first:end],
                attention_mask=torch.cat([batch.prompt_mask, batch.mask[:, :end]], 1).long(),
                position_ids=lengths[:, None] + torch.arange(first, end, device=lengths.device),
                past_key_values=fork(cache),
                use_cache=True,
            )
        hidden.append(out.last_hidden_state)
    return torch.cat(hidden, 1)[batch.mask]


def whole_hidden(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Final hidden states of what counts, [n, D], with prompt and completion in one pass."""
    mask = torch.cat([batch.prompt_mask, batch.mask], 1)
    whole = unwrap(model).get_decoder()(
        input_ids=torch.cat([batch.prompt, batch.inputs], 1),
        attention_mask=mask.long(),
        position_ids=positions_of(mask),
        use_cache=False,
    )
    hidden: torch.Tensor = whole.last_hidden_state[batch.scored]
    return hidden


def lm_logits(model: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Final hidden states [n, D] -> logits [n, V] in float32, soft-capped where the model does."""
    base = unwrap(model)
    logits = base.get_output_embeddings()(hidden).float()
    cap = getattr(base.config, "final_logit_softcapping", None)
    return logits if not cap else torch.tanh(logits / cap) * cap
