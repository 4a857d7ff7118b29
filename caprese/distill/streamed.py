"""The layer-wise sums of a base that is streamed or sharded: layer after layer over all samples, each read once.

What is held is one decoder layer, its sums, one batch, and in files the hidden states of all samples between two layers
(tokens x D). For dense inputs no layer depends on a branch, so the sums are those of one pass over the whole model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import nn

from caprese.distill.batches import Batch
from caprese.distill.layerwise import Moments
from caprese.distill.precision import exact_products
from caprese.distill.sequential import enter, in_file
from caprese.efficient_methods import applied_ffns, phases, phases_of
from caprese.models import device_of, unwrap
from caprese.models.families import family_of
from caprese.models.residency import dealt, resident


@torch.no_grad()
def moments_by_layer(
    model: nn.Module, train: Sequence[Batch], held_out: Sequence[Batch]
) -> Iterator[tuple[Moments, Moments]]:
    """For each applied layer its sums over training and held-out samples; processes share the batches."""
    world, device = PartialState(), device_of(model)
    layers: Any = unwrap(model).get_submodule(family_of(unwrap(model).config).layers)
    wrappers = {w.layer: w for w in applied_ffns(model).values()}
    groups = train, held_out
    work = dealt(model, [(kind, index) for kind, group in enumerate(groups) for index in range(len(group))])
    with tempfile.TemporaryDirectory(prefix="caprese-") as scratch:
        between: list[torch.Tensor] = []
        for at, layer in enumerate(layers):
            wrapper = wrappers.get(at)
            hidden_size = unwrap(model).config.hidden_size
            sums = [Moments.zeros(hidden_size, device) for _ in range(2)]
            with resident(layer):
                for number, ((kind, index), counts) in enumerate(work):
                    batch = groups[kind][index].to(device)

                    def observe(_: Any, x: torch.Tensor, e: torch.Tensor, y: torch.Tensor) -> None:
                        if counts:  # noqa: B023 - called before the next batch
                            sums[kind].add(x, e, y)  # noqa: B023

                    exact = exact_products(device) if kind else nullcontext()  # as `HeldOut`
                    with phases(model, batch.prompt_lengths, observe), exact:
                        entered = enter(model, batch)  # an embedding and masks: less than to keep
                        if at == 0:
                            between.append(in_file(entered.hidden, Path(scratch) / str(number)))
                        with phases_of(model).within(entered.current):
                            between[number].copy_(entered.through(at, layer, between[number].to(device)))
            if wrapper is not None:
                if world.num_processes > 1:
                    for each in sums:
                        for field in fields(each):
                            setattr(each, field.name, reduce(getattr(each, field.name), "sum"))
                yield sums[0], sums[1]
