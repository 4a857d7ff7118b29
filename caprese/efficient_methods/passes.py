"""Which tokens of a forward pass are prompt, and run dense, and which completion, and run efficient.

The KV cache decides. A pass on an empty cache is prefill; one token on a filled cache is decoding; several tokens on
a filled cache (chunked prefill, the next chat turn, verification) are dense again and add to what was learned. What a
method learned from a prompt is kept on that cache, so another cache on the same model never sees it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import nn

from caprese.efficient_methods.base import Method
from caprese.efficient_methods.hooks import Call, proposed
from caprese.efficient_methods.masks import real_tokens, split_tokens
from caprese.efficient_methods.memory import TAIL, PromptMemory, keep_memory, memory_of
from caprese.efficient_methods.settings import Prefill, check_reselect
from caprese.errors import CapreseError

#: what is said where the dense model is asked for and its weights are gone
NO_DENSE = (
    "the dense weights of this model were let go (caprese.drop_dense), so there is no teacher, no way back and no "
    "telling this base from others; load it again and keep them"
)
#: called with (applied FFN, x [n, D], residual [n, D], y [n, D]) for the completion tokens of each FFN
Observer = Callable[[Any, torch.Tensor, torch.Tensor, torch.Tensor], None]


@dataclass(frozen=True)
class Pass:
    """One forward pass: which tokens are prompt (dense, learned from) and which completion (efficient); [B, T] bool.

    None stands for no token at all.
    """

    prompt: torch.Tensor | None
    completion: torch.Tensor | None
    memory: PromptMemory
    shape: tuple[int, int]
    offset: int = 0
    """The first token's position in the cache."""
    tail: int = TAIL
    """How many of the last tokens may be cropped away again."""
    verifies: bool = False
    """Whether what is learned waits for `PromptMemory.confirm`, which knows the tokens that stay."""


def check_prefill(prefill: Prefill, methods: Sequence[Method], reselect_every: int | None) -> None:
    """Refuse prompts that are not to run dense where something needs them to.

    Raises:
        CapreseError: no such way, methods that choose from a whole prompt, or generated tokens that are to run dense
            again.
    """
    if prefill not in get_args(Prefill):
        raise CapreseError(f"`prefill` is {prefill!r}; use {', '.join(get_args(Prefill))}")
    choosers = [method.name for method in methods if "prompt" in method.learns]
    if prefill == "efficient" and choosers:
        raise CapreseError(
            f"{choosers[0]} chooses from each prompt, which all neurons have to see; "
            '`prefill="efficient"` is for methods that do not'
        )
    if prefill != "dense" and reselect_every is not None:
        raise CapreseError(
            f'reselection runs tokens dense; with `prefill="{prefill}"` leave out `reselect_every` '
            "(None, where an adapter was saved with it)"
        )


class Phases:
    """What the transformed layers of one model share. They read it; its fields are set in this file alone.

    Attributes:
        methods: all that are applied.
        reselect_every: generated tokens after which they go through the dense model once; None never.
        prefill: how prompts run.
        lean: whether the dense weights were let go.
        current: the pass that runs; None where all is dense and nothing is learned.
        ended: the last pass, for what comes after the decoder: the head.
        dense: whether the teacher runs.
        verifying: whether drafts are verified: as prompts run, and what is learned waits.
        only: layers that act, the others staying dense; None is all.
        observer: what is shown the completion tokens of every FFN, which then runs dense.
        compiled: inside a compiled decode step, which only computes: what is Python was done before it.
        undo: what takes off again all that `apply` put on the model, which adds to it.
    """

    def __init__(self, methods: tuple[Method, ...], learners: dict[int, list[Method]]) -> None:
        self.methods = methods
        self.reselect_every: int | None = None
        self.prefill: Prefill = "dense"
        self.lean = False
        self.current: Pass | None = None
        self.ended: Pass | None = None
        self.dense = self.verifying = False
        self.only: frozenset[int] | None = None
        self.observer: Observer | None = None
        self.compiled = False
        self.undo: list[Callable[[], None]] = []
        self._learners = learners
        self._prefilling = False
        self._prompt_lengths: torch.Tensor | None = None

    @property
    def dense_prompts(self) -> bool:
        """Whether prompts run as in the dense model."""
        return self.prefill == "dense" and all(method.dense_prompts for method in self.methods)

    @property
    def stored_prompts(self) -> bool:
        """Whether prompts run through the weights as methods store them."""
        return self.prefill == "stored" and not self.verifying

    def acts_on(self, layer: int) -> bool:
        """Whether generated tokens run efficient in this layer now."""
        return self.observer is None and (self.only is None or layer in self.only)

    def reselect(self, every: int | None) -> None:
        """Send generated tokens through the dense model once every `every` of them; None never.

        Raises:
            CapreseError: `every` below 1, or tokens that cannot be read again.
        """
        if every is not None and (refused := [m.no_reselection for m in self.methods if m.no_reselection]):
            raise CapreseError(refused[0])
        check_prefill(self.prefill, self.methods, every)
        self.reselect_every = check_reselect(every)

    def run_prompts(self, prefill: Prefill) -> None:
        """Run prompts dense, through what is left, or through the weights as methods store them.

        Raises:
            CapreseError: methods that choose from a whole prompt, or generated tokens that are to run dense again.
        """
        check_prefill(prefill, self.methods, self.reselect_every)
        self.prefill = prefill

    @contextmanager
    def within(self, current: Pass) -> Iterator[None]:
        """Inside, layers that are called one by one are in this pass."""
        with self._set(current=current):
            yield

    @contextmanager
    def prefilling(self) -> Iterator[None]:
        """Inside, a single token on a filled cache is prompt too."""
        with self._set(_prefilling=True):
            yield

    @contextmanager
    def telling(self, prompt_lengths: torch.Tensor, observer: Observer | None = None) -> Iterator[None]:
        """See `phases`; behind it no pass is left."""
        try:
            with self._set(_prompt_lengths=prompt_lengths, observer=observer):
                yield
        finally:
            self.current = None

    @contextmanager
    def _set(self, **fields: Any) -> Iterator[None]:
        before = {name: getattr(self, name) for name in fields}
        vars(self).update(fields)
        try:
            yield
        finally:
            vars(self).update(before)

    def decode_step(self, model: Any, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """A compiled decode step with the bookkeeping done before it, so that it is not part of the graph."""
        if not all(method.static_cache for method in self.methods):
            return model
        wrappers: list[Any] = [m for m in model.modules() if getattr(m, "phases", None) is self and hasattr(m, "fused")]
        decoder = model.get_decoder()

        def run(**kwargs: Any) -> Any:
            call = Call.of((), kwargs)
            memory = memory_of(call.cache)
            if self.dense:
                if memory is not None:
                    memory.length += call.tokens.shape[1]
                return compiled(**kwargs)
            told = self._prompt_lengths is not None or self._prefilling or self.verifying
            told = told or proposed(call.cache) is not None
            ready = all(w.fused is not None and w.can_decode_fused for w in wrappers)
            if memory is None or told or call.tokens.shape[1] != 1 or not ready:
                return model(**kwargs)
            # `PromptMemory.length` follows the cache, so that its own need not be fetched from the device
            self.before(decoder, (), kwargs, memory.length)
            self.current = None
            with self._set(compiled=True):
                for wrapper in wrappers:
                    wrapper.fused.follow(memory.layer(wrapper.layer), memory.batch)
                return compiled(**kwargs)

        return run

    def before(
        self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], past: int | None = None
    ) -> None:
        """Say which tokens of the pass that begins are prompt, and what its cache remembers.

        Args:
            past: tokens in the cache, where they are known.
        """
        if self.compiled and torch.compiler.is_compiling():
            return
        self.current = self.ended = None
        cache = kwargs.get("past_key_values")
        memory = memory_of(cache)
        if self.dense and (torch.compiler.is_compiling() or memory is None):
            return
        call = Call.of(args, kwargs)
        batch, length = call.tokens.shape[:2]
        if past is None:
            past = int(cache.get_seq_length()) if cache is not None else 0
        if self.dense:
            assert memory is not None
            if past >= memory.length:
                memory.length = past + length
            return
        if memory is None or not past:
            memory = PromptMemory(self._learners)
        if memory.length > past:
            memory.crop(past)
        if cache is not None:
            keep_memory(cache, memory)
        prompt: torch.Tensor | None
        completion: torch.Tensor | None = None
        candidates = proposed(cache)
        if self.verifying:
            prompt = real_tokens(call, past)
        elif self.prefill == "efficient":
            prompt, completion = None, real_tokens(call, past)
        elif self._prompt_lengths is not None:
            prompt, completion = split_tokens(call, past, self._prompt_lengths)
            if prompt is not None:
                memory.saw(prompt if completion is None else prompt | completion, past)
        elif past and length == 1 and not self._prefilling and candidates is None:
            if self.reselect_every is not None and cache is not None:
                self._reselect(decoder, call, memory, past)
            prompt, completion = None, torch.ones(batch, length, dtype=torch.bool, device=call.tokens.device)
        else:
            prompt = real_tokens(call, past)
            memory.saw(prompt, past)
        memory.length, memory.batch = past + length, batch
        # assisted decoding may take back all it proposed and one (times sequences, of which there is one)
        tail = max(TAIL, 1 + (candidates or 0))
        self.current = Pass(prompt, completion, memory, (batch, length), past, tail, self.verifying)

    def _reselect(self, decoder: nn.Module, call: Call, memory: PromptMemory, past: int) -> None:
        """Take down one generated token, after those before it were rewritten if they are enough."""
        assert self.reselect_every is not None
        pending = memory.pending
        if pending.passes and pending.passes[-1].offset != past - 1:
            pending.clear()  # something else ran in between: only what follows it can be rewritten
        if len(pending.passes) >= self.reselect_every:
            with self.prefilling():
                pending.rewrite(decoder, call.cache, memory.mask(past, call.tokens))
        pending.add(call, past)

    def after(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Leave what was learned on the cache that the pass made."""
        if self.compiled and torch.compiler.is_compiling():
            return
        current = self.ended = self.current
        cache = getattr(output, "past_key_values", None)
        if current is not None and cache is not None:
            keep_memory(cache, current.memory)
        if self._prompt_lengths is None:  # inside phases() it stays, so that gradient checkpointing can run it again
            self.current = None


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

    Inside, token i of sequence b (pads not counted) is prompt if i < prompt_lengths[b], unless prompts run efficient.
    With a KV cache, tokens already in it count, so prompt and completion may also come in two passes.

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
    with shared.telling(lengths, observer):
        yield


def _with_dense(model: nn.Module) -> Phases:
    """The phases of an applied model that has its dense weights."""
    shared = phases_of(model)
    if shared.lean:
        raise CapreseError(NO_DENSE)
    return shared


@contextmanager
def dense(model: nn.Module) -> Iterator[None]:
    """The teacher: inside, the applied model computes exactly what the base model does.

    Raises:
        CapreseError: no method applied, or its dense weights were let go.
    """
    with _with_dense(model)._set(dense=True):
        yield


@contextmanager
def drafting(model: nn.Module) -> Iterator[None]:
    """Around speculative decoding: prompts run as in the dense model, and nothing is reselected but by `verifying`."""
    with phases_of(model)._set(prefill="dense", reselect_every=None):
        yield


@contextmanager
def verifying(model: nn.Module) -> Iterator[None]:
    """Inside, passes verify drafts: FFNs run dense, and what methods learn waits for `PromptMemory.confirm`.

    Where attention is replaced, it stays so: what is verified is that model's text.

    Raises:
        CapreseError: no method applied, or its dense weights were let go.
    """
    with _with_dense(model)._set(verifying=True):
        yield


@contextmanager
def only(model: nn.Module, layers: Collection[int]) -> Iterator[None]:
    """Inside, `layers` alone act, and the others compute what the base model does.

    Raises:
        CapreseError: no method applied, or its dense weights were let go.
    """
    with _with_dense(model)._set(only=frozenset(layers)):
        yield


@contextmanager
def reselection(model: nn.Module, every: int | None) -> Iterator[None]:
    """Inside, generated tokens go through the dense model once every `every` of them; None: never.

    Raises:
        CapreseError: no method applied, `every` below 1, or tokens that cannot be read again.
    """
    shared = phases_of(model)
    with shared._set(reselect_every=shared.reselect_every):
        shared.reselect(every)
        yield
