"""Which tokens of a forward pass run dense and which run efficient.

The KV cache decides. A pass on an empty cache is prefill; one token on a filled cache is decoding; several tokens on
a filled cache (chunked prefill, the next chat turn, verification) are dense again and add to what was learned. What a
method learned from a prompt is kept on that cache, so another cache on the same model never sees it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from caprese.errors import CapreseError
from caprese.kernels import Packed

if TYPE_CHECKING:
    from caprese.efficient_methods.base import Method
    from caprese.efficient_methods.wrapper import EfficientFFN

#: called with (wrapper, x [n, D], residual [n, D], y [n, D]) for the completion tokens of each FFN
Observer = Callable[["EfficientFFN", torch.Tensor, torch.Tensor, torch.Tensor], None]
_STATE = "caprese_state"


@dataclass
class LayerState:
    """What a method learned in one layer from the prompts behind one KV cache."""

    statistic: torch.Tensor | None = None
    choice: torch.Tensor | None = None
    packed: Packed | None = None

    def learn(self, statistic: torch.Tensor) -> None:
        self.statistic = statistic if self.statistic is None else self.statistic + statistic
        self.choice = self.packed = None

    def chosen(self, method: Method, width: int, batch: int) -> torch.Tensor:
        if self.choice is None:
            if self.statistic is None:
                raise CapreseError(
                    f"{method.name} has seen no prompt for this KV cache: it was filled before apply() or in a dense "
                    "pass, or a prompt length is 0; start with an empty cache and a prompt"
                )
            self.choice = method.choose(self.statistic, width)
        if self.choice.shape[0] != batch:
            raise CapreseError(
                f"the KV cache holds the choice of {self.choice.shape[0]} sequences, the batch has {batch}; "
                "expand the batch before prefill"
            )
        return self.choice


@dataclass
class State:
    """`LayerState` by layer; lives on the KV cache."""

    layers: dict[int, LayerState] = field(default_factory=dict)

    def layer(self, index: int) -> LayerState:
        return self.layers.setdefault(index, LayerState())


@dataclass
class Pass:
    """One forward pass: which tokens are prompt (dense, learned from) and which completion (efficient); [B, T] bool.

    None stands for no token at all.
    """

    prompt: torch.Tensor | None
    completion: torch.Tensor | None
    state: State


class Phases:
    """Shared by all wrapped FFNs of a model; told of every pass by two hooks on the decoder."""

    def __init__(self) -> None:
        self.current: Pass | None = None
        self.dense = False
        self.prompt_lengths: torch.Tensor | None = None
        self.observer: Observer | None = None
        self.handles: list[Any] = []

    def attach(self, decoder: nn.Module) -> None:
        self.handles = [
            decoder.register_forward_pre_hook(self._before, with_kwargs=True),
            decoder.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]

    def detach(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.current = None
        if self.dense:
            return
        tokens = args[0] if args else kwargs.get("input_ids")
        if tokens is None:
            tokens = kwargs["inputs_embeds"]
        batch, length = tokens.shape[:2]
        cache = kwargs.get("past_key_values")
        past = int(cache.get_seq_length()) if cache is not None else 0
        state = getattr(cache, _STATE, None) if past else State()
        if state is None:
            state = State()
        if cache is not None:
            setattr(cache, _STATE, state)
        mask = kwargs.get("attention_mask")
        if self.prompt_lengths is None:
            if past and length == 1:
                self.current = Pass(None, torch.ones(batch, 1, dtype=torch.bool, device=tokens.device), state)
            else:
                self.current = Pass(_valid(mask, batch, past, length, tokens.device), None, state)
            return
        if len(self.prompt_lengths) != batch:
            raise CapreseError(f"phases() was given {len(self.prompt_lengths)} prompt lengths for a batch of {batch}")
        if mask is None:
            mask = torch.ones(batch, past + length, dtype=torch.bool, device=tokens.device)
        mask = mask.bool()
        position = (mask.cumsum(-1) - 1)[:, -length:]
        valid = mask[:, -length:]
        early = position < self.prompt_lengths.to(tokens.device)[:, None]
        prompt, completion = valid & early, valid & ~early
        self.current = Pass(prompt if prompt.any() else None, completion if completion.any() else None, state)

    def _after(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        current = self.current
        cache = getattr(output, "past_key_values", None)
        if current is not None and cache is not None:
            setattr(cache, _STATE, current.state)
        if self.prompt_lengths is None:  # inside phases() it stays, so that gradient checkpointing can run it again
            self.current = None


def _valid(mask: Any, batch: int, past: int, length: int, device: torch.device) -> torch.Tensor:
    """Which of the `length` new tokens are real, [B, T], from whatever form the attention mask has."""
    if isinstance(mask, dict):  # one mask per kind of attention layer
        mask = next(iter(mask.values()))
    if mask is None:
        return torch.ones(batch, length, dtype=torch.bool, device=device)
    if mask.dim() == 2:
        return mask[:, -length:].bool()
    # 4D: a real token attends to itself, a pad does not
    own = mask[:, 0, torch.arange(length), past + torch.arange(length)]
    return own if own.dtype == torch.bool else own == 0


def phases_of(model: nn.Module) -> Phases:
    """The phases of an applied model.

    Raises:
        CapreseError: no method is applied.
    """
    for module in model.modules():
        found = getattr(module, "phases", None)
        if isinstance(found, Phases):
            return found
    raise CapreseError("no efficient method is applied to this model: caprese.apply(model, caprese.Griffin()) first")


@contextmanager
def phases(
    model: nn.Module, prompt_lengths: Sequence[int] | torch.Tensor, observer: Observer | None = None
) -> Iterator[None]:
    """Say which tokens are prompt (dense) and which completion (efficient), for passes that hold both.

    Inside, token i of sequence b (pads not counted) is prompt if i < prompt_lengths[b]. With a KV cache, tokens
    already in it count, so prompt and completion may also come in two passes.

    Args:
        prompt_lengths: one length per sequence, in tokens; 0 where the method needs no prompt.
        observer: called with (wrapper, x, residual, y) for the completion tokens of every FFN: its input, what the
            method takes away, FF(x) - FF_eff(x), and FF(x); all tokens then run dense.

    Raises:
        CapreseError: no method applied, a negative length, or a batch of another size.
    """
    shared = phases_of(model)
    lengths = torch.as_tensor(prompt_lengths)
    if lengths.dim() != 1 or lengths.is_floating_point() or (lengths < 0).any():
        raise CapreseError("prompt_lengths takes one length >= 0 per sequence")
    before = shared.prompt_lengths, shared.observer
    shared.prompt_lengths, shared.observer = lengths, observer
    try:
        yield
    finally:
        shared.prompt_lengths, shared.observer = before
        shared.current = None


@contextmanager
def dense(model: nn.Module) -> Iterator[None]:
    """The teacher: inside, the applied model computes exactly what the base model does."""
    shared = phases_of(model)
    before, shared.dense = shared.dense, True
    try:
        yield
    finally:
        shared.dense = before
