"""The sequential closed form: layer i is fitted on the inputs that the recovered layers below it produce, towards the
dense hidden state after layer i, so that it also repairs what they left.

Layers run one at a time over all samples, as post-training quantisation does; the hidden states of all samples, dense
and recovered, are held in memory (2 x tokens x D).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    """One batch between layers: its dense and recovered hidden states, and what each layer is called with beside."""

    def __init__(self, hidden: torch.Tensor, beside: list[_Beside], current: Pass) -> None:
        assert current.completion is not None  # batches hold samples of two tokens and more
        self.completion = current.completion
        self.dense = self.recovered = hidden
        self.beside, self.current = beside, current
        self.ffn_input: torch.Tensor | None = None

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
    streams: dict[bool, list[Stream]] = {True: [], False: []}
    for is_train, batches in ((True, train), (False, held_out)):
        for batch in batches:
            batch = batch.to(device_of(model))
            with phases(model, batch.prompt_lengths):
                streams[is_train].append(enter(model, batch))
    for index, layer in enumerate(layers):
        wrapper = wrappers.get(index)
        moments = (
            {True: None, False: None}
            if wrapper is None
            else {k: Moments.zeros(wrapper.view.hidden_size, device_of(model)) for k in (True, False)}
        )
        inputs: list[torch.Tensor] = []
        handle = None
        if wrapper is not None:
            handle = wrapper.register_forward_pre_hook(lambda _, args, seen=inputs: seen.append(args[0]))
        with resident(layer):
            for is_train, stream in ((kind, stream) for kind, group in streams.items() for stream in group):
                dense_before, recovered_before = stream.dense, stream.recovered
                with dense(model):
                    stream.dense = stream.through(index, layer, dense_before)
                with shared.within(stream.current):
                    stream.recovered = stream.through(index, layer, recovered_before)  # the branch is still zero
                if wrapper is not None:
                    m, at = moments[is_train], stream.completion
                    assert m is not None
                    m.add(inputs[-1][at], (stream.dense - stream.recovered)[at], (stream.dense - dense_before)[at])
                    stream.ffn_input = inputs[-1]
                    inputs.clear()
        if handle is not None:
            handle.remove()
        if wrapper is None:
            continue
        rank = ranks[len(fits)]
        fit = fit_layer(moments[True], moments[False], rank, ridge, bias)  # type: ignore[arg-type]
        fits.append(fit)
        left, right, offset = fit.at(rank)
        set_branch(wrapper.recovery, left, right, offset)
        for group in streams.values():
            for stream in group:
                branch = wrapper.recovery(stream.ffn_input)
                stream.recovered = stream.recovered + branch * stream.completion.unsqueeze(-1)
                stream.ffn_input = None
        if advance is not None:
            advance(1)
    return fits
