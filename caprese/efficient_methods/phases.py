"""Which tokens of a forward pass run dense and which run efficient.

The KV cache decides. A pass on an empty cache is prefill; one token on a filled cache is decoding; several tokens on
a filled cache (chunked prefill, the next chat turn, verification) are dense again and add to what was learned. What a
method learned from a prompt is kept on that cache, so another cache on the same model never sees it.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from caprese.efficient_methods.base import Method, check_reselect
from caprese.efficient_methods.state import TAIL, State, keep_state, remember, rewind, state_of
from caprese.errors import CapreseError

if TYPE_CHECKING:
    from caprese.efficient_methods.mamba.replacement import MixerObserver
    from caprese.efficient_methods.wrapper import EfficientFFN

#: called with (wrapper, x [n, D], residual [n, D], y [n, D]) for the completion tokens of each FFN
Observer = Callable[["EfficientFFN", torch.Tensor, torch.Tensor, torch.Tensor], None]
# on a cache, while assisted decoding verifies candidates on it: a weak reference to what proposes them
PROPOSER = "caprese_proposer"


@dataclass
class Pass:
    """One forward pass: which tokens are prompt (dense, learned from) and which completion (efficient); [B, T] bool.

    None stands for no token at all. `start` is the first token's place in the cache.
    """

    prompt: torch.Tensor | None
    completion: torch.Tensor | None
    state: State
    shape: tuple[int, int]
    start: int = 0
    tail: int = TAIL
    """How many of the last tokens may be cropped away again."""


class Phases:
    """Shared by all transformed layers of a model; told of every pass by two hooks on the decoder."""

    def __init__(self, methods: tuple[Method, ...], prompt_methods: dict[int, list[Method]]) -> None:
        self.methods = methods
        self.prompt_methods = prompt_methods
        self.reselect_every: int | None = None
        self.current: Pass | None = None
        self.dense = False
        self.prefilling = False
        self.prompt_lengths: torch.Tensor | None = None
        self.observer: Observer | None = None
        #: whether attentions are replaced, so that prompts do not run as in the dense model
        self.mixes = False
        self.mixer_observer: MixerObserver | None = None
        #: layers that act, the others staying dense; None is all
        self.only: frozenset[int] | None = None
        #: inside a compiled decode step, which only computes: what is Python was done before it
        self.static = False
        self.undo: list[Callable[[], None]] = []

    def check_reselect(self, every: int | None) -> None:
        """Raise CapreseError if generated tokens cannot be read again."""
        if every is not None and any("mixer" in method.acts_on for method in self.methods):
            raise CapreseError("reselection reads generated tokens again, which a Mamba layer's state cannot")

    def acts_on(self, layer: int) -> bool:
        """Whether generated tokens run efficient in this layer now."""
        return self.observer is None and (self.only is None or layer in self.only)

    def attach(self, model: Any) -> None:
        """Hook into a bare transformers model."""
        decoder = model.get_decoder()
        self.undo += [
            decoder.register_forward_pre_hook(self._before, with_kwargs=True).remove,
            decoder.register_forward_hook(self._after, with_kwargs=True, always_call=True).remove,
        ]
        # generate's chunked prefill may end in a chunk of one token, which alone looks like decoding
        # bound methods, and no closures: a deep copy of the model then has its own
        around = {
            "_prefill": self._prefill,
            "_get_candidate_generator": self._propose,
            "get_compiled_call": self._compile,  # generate with a static cache compiles the decode step
        }
        for name, run in around.items():
            if hasattr(model, name):
                setattr(model, name, functools.partial(run, model, getattr(model, name)))
                self.undo.append(functools.partial(delattr, model, name))

    def _prefill(self, _: Any, prefill: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`generate`'s prompt is dense also where its last chunk is one token."""
        assistant = not kwargs.get("is_first_iteration", True)  # goes on from tokens it generated
        before, self.prefilling = self.prefilling, not assistant
        try:
            return prefill(*args, **kwargs)
        finally:
            self.prefilling = before

    def _propose(self, _: Any, propose: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Assisted decoding verifies what is proposed; where nothing is, that pass too looks like decoding."""
        proposer = propose(*args, **kwargs)
        cache = kwargs.get("model_kwargs", {}).get("past_key_values")
        if cache is not None:
            setattr(cache, PROPOSER, weakref.ref(proposer))
        return proposer

    def _compile(self, model: Any, compiled: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self._around(model, compiled(*args, **kwargs))

    def detach(self) -> None:
        for undo in self.undo:
            undo()
        self.undo = []

    def _around(self, model: Any, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """A compiled decode step with the bookkeeping done before it, so that it is not part of the graph."""
        if self.mixes:  # the states of mixers are not static
            return model
        wrappers: list[EfficientFFN] = [m for m in model.modules() if getattr(m, "phases", None) is self]
        decoder = model.get_decoder()

        def run(**kwargs: Any) -> Any:
            cache = kwargs.get("past_key_values")
            state = state_of(cache)
            tokens = kwargs.get("input_ids")
            tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
            if self.dense:
                if state is not None and tokens is not None:
                    state.length += tokens.shape[1]
                return compiled(**kwargs)
            decodes = state is not None and tokens is not None and tokens.shape[1] == 1 and not self.prefilling
            told = self.prompt_lengths is not None or getattr(cache, PROPOSER, lambda: None)() is not None
            if told or not decodes or not all(w.fused is not None and w.can_decode_fused for w in wrappers):
                return model(**kwargs)
            assert state is not None
            # `State.length` follows the cache, so that its own need not be fetched from the device
            self._before(decoder, (), kwargs, past=state.length)
            self.current = None
            self.static = True
            try:
                for wrapper in wrappers:
                    wrapper.fused.follow(state.layer(wrapper.layer), state.batch)
                return compiled(**kwargs)
            finally:
                self.static = False

        return run

    def _before(
        self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], past: int | None = None
    ) -> None:
        if self.static and torch.compiler.is_compiling():
            return
        self.current = None
        cache = kwargs.get("past_key_values")
        if self.dense and (torch.compiler.is_compiling() or state_of(cache) is None):
            return
        tokens = args[0] if args else kwargs.get("input_ids")
        if tokens is None:
            tokens = kwargs["inputs_embeds"]
        batch, length = tokens.shape[:2]
        device = tokens.device
        if self.dense:
            known = state_of(cache)
            assert cache is not None and known is not None
            if (there := int(cache.get_seq_length())) >= known.length:
                known.length = there + length
            return
        if past is None:
            past = int(cache.get_seq_length()) if cache is not None else 0
        state = state_of(cache) if past else None
        if state is None:
            state = State(self.prompt_methods)
        if state.length > past:
            state.crop(past)
        if cache is not None:
            keep_state(cache, state)
        mask = kwargs.get("attention_mask")
        proposer = getattr(cache, PROPOSER, lambda: None)()
        whole = torch.ones(batch, length, dtype=torch.bool, device=device)
        if self.prompt_lengths is not None:
            prompt, completion = self._split(mask, batch, past, length, device)
            if prompt is not None:
                parts = [part for part in (prompt, completion) if part is not None]
                _saw(state, torch.stack(parts).any(0), past)
        elif past and length == 1 and not self.prefilling and proposer is None:
            if self.reselect_every is not None and cache is not None:
                self._note(decoder, cache, state, past, tokens, kwargs)
            prompt, completion = None, whole
        else:
            prompt, completion = _valid(mask, batch, past, length, device), None
            _saw(state, prompt, past)
        state.length, state.batch = past + length, batch
        self.current = Pass(prompt, completion, state, (batch, length), past, max(TAIL, _proposed(proposer)))

    def _split(self, mask: Any, batch: int, past: int, length: int, device: torch.device) -> list[torch.Tensor | None]:
        """Prompt and completion tokens as `phases` was told."""
        assert self.prompt_lengths is not None
        if len(self.prompt_lengths) != batch:
            raise CapreseError(f"phases() was given {len(self.prompt_lengths)} prompt lengths for a batch of {batch}")
        if mask is None:
            mask = torch.ones(batch, past + length, dtype=torch.bool, device=device)
        mask = mask.bool()
        early = (mask.cumsum(-1) - 1)[:, -length:] < self.prompt_lengths.to(device)[:, None]
        valid = mask[:, -length:]
        return [part if part.any() else None for part in (valid & early, valid & ~early)]

    def _note(
        self, decoder: nn.Module, cache: Any, state: State, past: int, tokens: torch.Tensor, kwargs: dict[str, Any]
    ) -> None:
        """Take down one generated token; every `reselect_every` of them, send them through the dense model."""
        assert self.reselect_every is not None
        embedded = tokens.is_floating_point()
        if state.pending and state.pending[-1][0] != past - 1:
            state.pending, state.kept = [], {}  # something else ran in between: only what follows it can be rewritten
        if len(state.pending) >= self.reselect_every:
            count = len(state.pending)
            inputs = torch.cat([t for _, t, _ in state.pending], 1)
            positions = [p for _, _, p in state.pending if p is not None]
            known = state.valid if state.valid is not None else inputs.new_ones(len(tokens), 0, dtype=torch.bool)
            gap = torch.ones(len(tokens), past - known.shape[1], dtype=torch.bool, device=tokens.device)
            again: dict[str, Any] = {"inputs_embeds" if embedded else "input_ids": inputs}
            if positions:
                again["position_ids"] = torch.cat(positions, -1)
            rewind(cache, count, state.kept)
            before, self.prefilling = self.prefilling, True
            try:
                decoder(
                    **again,
                    attention_mask=torch.cat([known, gap], 1).long(),
                    past_key_values=cache,
                    use_cache=True,
                )
            finally:
                self.prefilling = before
        if not state.pending:
            state.kept = remember(cache)
        state.pending.append((past, tokens, kwargs.get("position_ids")))

    def _after(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self.static and torch.compiler.is_compiling():
            return
        current = self.current
        cache = getattr(output, "past_key_values", None)
        if current is not None and cache is not None:
            keep_state(cache, current.state)
        if self.prompt_lengths is None:  # inside phases() it stays, so that gradient checkpointing can run it again
            self.current = None


def _proposed(proposer: Any) -> int:
    """Tokens (times sequences, of which there is one) that assisted decoding may take back after a pass."""
    counts = [getattr(proposer, name, None) for name in ("num_output_tokens", "num_assistant_tokens")]
    return 1 + max((int(count) for count in counts if count), default=0)


def _saw(state: State, real: torch.Tensor, past: int) -> None:
    """Take down a dense pass: which of its tokens are real, [B, T]; reselection begins after it."""
    state.pending, state.kept = [], {}
    known = state.valid if state.valid is not None and len(state.valid) == len(real) else real[:, :0]
    gap = torch.ones(len(real), past - known.shape[1], dtype=torch.bool, device=real.device)
    state.valid = torch.cat([known, gap, real], 1)


def _valid(mask: Any, batch: int, past: int, length: int, device: torch.device) -> torch.Tensor:
    """Which of the `length` new tokens are real, [B, T], from whatever form the attention mask has."""
    if isinstance(mask, dict):  # one mask per kind of attention layer
        mask = mask.get("full_attention", next(iter(mask.values())))
    if mask is None:
        return torch.ones(batch, length, dtype=torch.bool, device=device)
    if mask.dim() == 2:
        return mask[:, -length:].bool()
    # 4D: a real token attends to itself, a pad does not. A sliding window that has moved on ends with the new tokens
    first = min(past, mask.shape[-1] - length)
    own = mask[:, 0, torch.arange(length), first + torch.arange(length)]
    own = own if own.dtype == torch.bool else own == 0
    return own.expand(batch, -1)


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


@contextmanager
def only(model: nn.Module, layers: Collection[int]) -> Iterator[None]:
    """Inside, `layers` alone act, and the others compute what the base model does.

    Raises:
        CapreseError: no method applied.
    """
    shared = phases_of(model)
    before, shared.only = shared.only, frozenset(layers)
    try:
        yield
    finally:
        shared.only = before


@contextmanager
def reselection(model: nn.Module, every: int | None) -> Iterator[None]:
    """Inside, generated tokens go through the dense model once every `every` of them; None: never.

    Raises:
        CapreseError: no method applied, `every` below 1, or a Mamba layer.
    """
    shared = phases_of(model)
    shared.check_reselect(every)
    before, shared.reselect_every = shared.reselect_every, check_reselect(every)
    try:
        yield
    finally:
        shared.reselect_every = before
