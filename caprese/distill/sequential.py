"""The sequential closed form: layer i is fitted on the inputs that the recovered layers below it produce, towards the
dense hidden state after layer i, so that it also repairs what they left.

Layers run one at a time over all samples, as post-training quantisation does; the hidden states of all samples, dense
and recovered, and what goes into an FFN, are in files (3 x tokens x D).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from caprese.adapters import set_branch
from caprese.distill.batches import Batch
from caprese.distill.layerwise import Fit, Moments, fit_layer
from caprese.efficient_methods import applied_ffns, dense, phases
from caprese.efficient_methods.passes import Pass, phases_of
from caprese.errors import CapreseError
from caprese.models import device_of, unwrap
from caprese.models.families import family_of
from caprese.models.residency import resident

# positional and named arguments of a call
_Beside = tuple[tuple[Any, ...], dict[str, Any]]


class Stream:
    """One batch before its first layer: hidden states [B, T, D], and what each layer is called with beside."""

    def __init__(self, hidden: torch.Tensor, beside: list[_Beside], current: Pass) -> None:
        assert current.completion is not None  # batches hold samples of two tokens and more
        self.completion = current.completion
        self.hidden, self.beside, self.current = hidden, beside, current

    def through(self, index: int, layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """The hidden states after a layer, [B, T, D]."""
        args, kwargs = self.beside[index]
        found = layer(hidden, *args, **kwargs)
        after: torch.Tensor = found if isinstance(found, torch.Tensor) else found[0]
        return after


class _Called(nn.Module):
    """Stands where a decoder layer does, and notes what that is called with."""

    def __init__(self, layer: nn.Module, note: Callable[..., None]) -> None:
        super().__init__()
        vars(self)["layer"], vars(self)["note"] = layer, note  # not as a part of it

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["layer"], name)  # some decoders ask a layer which kind it is

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        vars(self)["note"](hidden, args, kwargs)
        return hidden


def enter(model: nn.Module, batch: Batch) -> Stream:
    """What the layers of a model are called with for a batch, by a pass through none of them."""
    shared = phases_of(model)
    path, _, name = family_of(unwrap(model).config).layers.rpartition(".")
    owner = unwrap(model).get_submodule(path)
    layers = getattr(owner, name)
    first: list[torch.Tensor] = []
    beside: list[_Beside] = []
    passes: list[Pass | None] = []

    def note(hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first.append(hidden)
        beside.append((args, kwargs))
        passes.append(shared.current)

    mask = torch.cat([batch.prompt_mask, batch.mask], 1)
    setattr(owner, name, nn.ModuleList(_Called(layer, note) for layer in layers))
    try:
        unwrap(model).get_decoder()(
            input_ids=torch.cat([batch.prompt, batch.inputs], 1),
            attention_mask=mask.long(),
            position_ids=(mask.cumsum(-1) - 1).clamp_min(0),
            use_cache=False,
        )
    finally:
        setattr(owner, name, layers)
    assert passes[0] is not None
    return Stream(first[0], beside, passes[0])


def check_sequential(model: nn.Module) -> None:
    """Refuse a model that normalises after its FFN, where a hidden state is no linear target.

    Raises:
        CapreseError: it does.
    """
    config = unwrap(model).config
    if family_of(config).norm_after_ffn:
        raise CapreseError(
            f"layerwise.how=sequential needs an FFN that adds straight to the hidden state, and "
            f"{config.model_type} normalises in between; use layerwise.how=closed"
        )


@torch.no_grad()
def fit_sequential(
    model: nn.Module,
    train: Sequence[Batch],
    held_out: Sequence[Batch],
    ranks: Sequence[int],
    ridge: float | str = "auto",
    bias: bool = False,
    advance: Callable[[int], None] | None = None,
) -> list[Fit]:
    """Fit and set the branch of every applied layer, bottom to top.

    Raises:
        CapreseError: see `check_sequential`.
    """
    check_sequential(model)
    layers: Any = unwrap(model).get_submodule(family_of(unwrap(model).config).layers)
    wrappers = {w.layer: w for w in applied_ffns(model).values()}
    shared = phases_of(model)
    fits: list[Fit] = []
    groups, device = (train, held_out), device_of(model)
    work = [(kind, index) for kind, group in enumerate(groups) for index in range(len(group))]
    with tempfile.TemporaryDirectory(prefix="caprese-") as scratch:
        before: list[tuple[torch.Tensor, torch.Tensor]] = []  # dense and recovered
        ffn_inputs: list[torch.Tensor] = []
        completions: list[torch.Tensor] = []
        for at, layer in enumerate(layers):
            wrapper = wrappers.get(at)
            moments = [Moments.zeros(unwrap(model).config.hidden_size, device) for _ in groups]
            inputs: list[torch.Tensor] = []
            handle = None
            if wrapper is not None:
                handle = wrapper.register_forward_pre_hook(lambda _, args, seen=inputs: seen.append(args[0]))
            with resident(layer):
                for number, (kind, index) in enumerate(work):
                    batch = groups[kind][index].to(device)
                    with phases(model, batch.prompt_lengths):
                        stream = enter(model, batch)  # an embedding and masks: less than to keep
                    if at == 0:
                        one, two, three = (
                            in_file(stream.hidden, Path(scratch) / f"{name}-{number}") for name in ("dense", "rec", "x")
                        )
                        before.append((one, two))
                        ffn_inputs.append(three)
                        completions.append(stream.completion)
                    dense_before, recovered_before = (each.to(device) for each in before[number])
                    with dense(model):
                        target = stream.through(at, layer, dense_before)
                    with shared.within(stream.current):
                        recovered = stream.through(at, layer, recovered_before)  # the branch is still zero
                    if wrapper is not None:
                        counts = stream.completion
                        moments[kind].add(
                            inputs[-1][counts], (target - recovered)[counts], (target - dense_before)[counts]
                        )
                        ffn_inputs[number].copy_(inputs[-1])
                        inputs.clear()
                    for kept, new in zip(before[number], (target, recovered), strict=True):
                        kept.copy_(new)
            if handle is not None:
                handle.remove()
            if wrapper is None:
                continue
            rank = ranks[len(fits)]
            fit = fit_layer(moments[0], moments[1], rank, ridge, bias)
            fits.append(fit)
            left, right, offset = fit.at(rank)
            set_branch(wrapper.recovery, left, right, offset)
            for (_, recovered), x, counts in zip(before, ffn_inputs, completions, strict=True):
                branch = wrapper.recovery(x.to(device)) * counts.unsqueeze(-1)
                recovered.copy_(recovered.to(device) + branch)
            if advance is not None:
                advance(1)
    return fits


def in_file(hidden: torch.Tensor, path: Path) -> torch.Tensor:
    """A copy whose pages the system may write out where memory is short."""
    if hasattr(os, "posix_fallocate"):  # a page of a hole that cannot be written later ends the process
        try:
            with path.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, max(1, hidden.nbytes))
        except OSError as error:
            raise CapreseError(
                f"no room for hidden states in {path.parent.parent} ({error.strerror}); set TMPDIR to a larger disk"
            ) from error
    kept = torch.from_file(str(path), shared=True, size=hidden.numel(), dtype=hidden.dtype)
    return kept.view(hidden.shape).copy_(hidden)
