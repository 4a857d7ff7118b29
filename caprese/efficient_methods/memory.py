"""What methods learned from the prompts behind one KV cache, kept on that cache and in step with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from caprese.efficient_methods.base import Method
from caprese.efficient_methods.hooks import mixed
from caprese.efficient_methods.reselection import Pending
from caprese.errors import CapreseError
from caprese.kernels import PackedFFN
from caprese.models import FFN

MEMORY = "caprese_memory"
# Tokens (times sequences) at the end of a pass whose activations are kept, so that a crop of a few tokens, as after
# speculative verification, can be followed exactly.
TAIL = 32
# Passes, beside the first, to whose ends a cache can be cropped back; each holds a copy of the statistics.
HISTORY = 32
Change = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Seen:
    """Activations of the last tokens learned from, [B, n, ...]; `offset` is the first one's position in the cache."""

    offset: int
    x: torch.Tensor
    a: torch.Tensor
    z: torch.Tensor
    mask: torch.Tensor

    def part(self, begin: int, end: int) -> Seen:
        """Tokens begin to end, counted within."""
        cut = slice(begin, end)
        return Seen(self.offset + begin, self.x[:, cut], self.a[:, cut], self.z[:, cut], self.mask[:, cut])

    def own(self) -> Seen:
        """A copy, which does not hold on to the rest of the pass."""
        return Seen(self.offset, self.x.clone(), self.a.clone(), self.z.clone(), self.mask.clone())


@dataclass
class LayerMemory:
    """The running statistics, the choices made from them, and how to go back."""

    statistics: dict[str, torch.Tensor] = field(default_factory=dict)
    choices: dict[str, torch.Tensor] = field(default_factory=dict)
    packed: PackedFFN | None = None
    #: (first token, end, statistics at the end) of the passes learned from
    history: list[tuple[int, int, dict[str, torch.Tensor]]] = field(default_factory=list)
    tail: Seen | None = None
    #: end of the first pass
    first_end: int = 0
    #: where the passes lie whose ends are no longer known: (first token, end)
    forgotten: tuple[int, int] | None = None
    #: of passes that verified, whose tokens may not stay
    waiting: list[Seen] = field(default_factory=list)
    #: what tokens taught that stayed since the choice was made, and where they lie
    coming: dict[str, torch.Tensor] = field(default_factory=dict)
    span: tuple[int, int] | None = None

    def learn(self, methods: list[Method], seen: Seen, tail: int = TAIL) -> None:
        """Add a pass over prompt tokens, of which the last `tail` (over the batch) can be unlearned one by one."""
        self.choose_anew()  # what was verified lies before it
        tokens = seen.x.shape[1]
        if not self.history:
            self.first_end = seen.offset + tokens
        tail = max(0, tokens - max(1, tail // len(seen.x)))
        for part in (seen.part(0, tail), seen.part(tail, tokens)):
            if part.x.shape[1]:
                self._add(methods, part)
                self.history.append((part.offset, part.offset + part.x.shape[1], dict(self.statistics)))
                self.tail = part.own()
        self._forget()

    def _forget(self) -> None:
        """Drop the oldest passes but the first, to which a conversation is most often cut back."""
        first = sum(offset < self.first_end for offset, _, _ in self.history)
        surplus = self.history[first:-HISTORY]
        if surplus:
            offset = surplus[0][0] if self.forgotten is None else self.forgotten[0]
            self.forgotten = (offset, surplus[-1][1])
            del self.history[first : first + len(surplus)]

    def confirm(self, methods: list[Method], taken: torch.Tensor) -> None:
        """Of each pass that verified, the first `taken` [B] tokens stay."""
        for seen in self.waiting:
            stays = torch.arange(seen.mask.shape[1], device=seen.mask.device) < taken[:, None]
            _sum(self.coming, methods, replace(seen, mask=seen.mask & stays))
            first = seen.offset if self.span is None else self.span[0]
            self.span = first, seen.offset + int(taken.max())
        self.waiting = []

    def choose_anew(self) -> None:
        """The next choice is made with what came since the last."""
        if self.span is None:
            return
        for name, new in self.coming.items():
            old = self.statistics.get(name)
            self.statistics[name] = new if old is None else old + new
        self.history.append((*self.span, dict(self.statistics)))
        self.coming, self.span, self.tail = {}, None, None
        self.choices, self.packed = {}, None
        self._forget()

    def _add(self, methods: list[Method], seen: Seen) -> None:
        self.choices, self.packed = {}, None
        _sum(self.statistics, methods, seen)

    def chosen(self, method: Method, ffn: FFN | PackedFFN, batch: int, known: torch.Tensor | None) -> torch.Tensor:
        """The choice of a method that learns from the prompt, [batch or 1, ...]; `known` is from samples."""
        if method.name not in self.choices:
            if method.name not in self.statistics:
                raise CapreseError(
                    f"{method.name} has seen no prompt for this KV cache: it was filled before apply() or in a dense "
                    "pass, or a prompt length is 0; start with an empty cache and a prompt"
                )
            statistic = self.statistics[method.name]
            if known is not None:
                statistic = method.joined(statistic, known)
            with torch.autocast(statistic.device.type, enabled=False):
                self.choices[method.name] = method.choose(statistic, ffn)
        choice = self.choices[method.name]
        if len(choice) != batch and not (len(choice) == 1 and getattr(method, "shared_choice", False)):
            raise CapreseError(
                f"the KV cache holds the choice of {len(choice)} sequences, the batch has {batch}; "
                "expand the batch before prefill, or the cache with batch_repeat_interleave"
            )
        return choice

    def crop(self, methods: list[Method], length: int) -> None:
        """Unlearn what lies behind token `length`."""
        self.waiting = []
        if self.span is not None and self.span[1] > length:
            self.coming, self.span = {}, None
        following = len(self.history)
        while following and self.history[following - 1][0] >= length:
            following -= 1
        if following == len(self.history) and (not following or self.history[-1][1] <= length):
            return  # only generated tokens went, which teach nothing
        if self.forgotten is not None:
            offset, end = self.forgotten
            if offset < length < end:
                raise CapreseError(
                    f"the KV cache was cropped to {length} tokens, and what was known at passes {offset}-{end} is "
                    f"gone; crop to {offset} or fewer tokens, or to {end} or more"
                )
            if length <= offset:
                self.forgotten = None
        kept = self.history[:following]
        split = kept.pop() if kept and kept[-1][1] > length else None
        if split is not None and (self.tail is None or self.tail.offset != split[0]):
            raise CapreseError(
                f"the KV cache was cropped to {length} tokens, inside a prompt pass of tokens {split[0]}-{split[1]} "
                "whose statistic cannot be taken apart; crop to where a pass began or ended, or prefill again"
            )
        tail = self.tail
        self.history, self.tail = kept, None
        self.statistics = dict(kept[-1][2]) if kept else {}
        self.choices, self.packed = {}, None
        if split is not None and tail is not None:
            self.learn(methods, tail.part(0, length - tail.offset))

    def change(self, change: Change, batch: int) -> None:
        """Reorder, select or repeat sequences; what the whole batch shares stays."""

        def each(known: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {k: change(t) if len(t) == batch else t for k, t in known.items()}

        if any(len(t) != batch for t in self.statistics.values()):
            self.tail = None  # shared by sequences that may be gone: no longer to be taken apart
        self.statistics, self.choices, self.packed = each(self.statistics), each(self.choices), None
        self.coming = each(self.coming)
        self.history = [(offset, end, each(known)) for offset, end, known in self.history]
        if self.tail is not None:
            t = self.tail
            self.tail = Seen(t.offset, change(t.x), change(t.a), change(t.z), change(t.mask))

    def fork(self) -> LayerMemory:
        own: dict[str, Any] = {name: dict(getattr(self, name)) for name in ("statistics", "choices", "coming")}
        return replace(self, history=list(self.history), waiting=list(self.waiting), **own)


def _sum(known: dict[str, torch.Tensor], methods: list[Method], seen: Seen) -> None:
    """Add what tokens teach to what is known of each method."""
    for method in methods:
        with torch.autocast(seen.x.device.type, enabled=False):  # it would round sums over tokens
            new = method.statistic(seen.x, seen.a, seen.z, seen.mask)
        if getattr(method, "shared_choice", False):
            new = new.sum(0, keepdim=True)
        old = known.get(method.name)
        known[method.name] = new if old is None else old + new


@dataclass(eq=False)
class PromptMemory:
    """What methods learned in each layer from the prompts behind one KV cache, and how far that cache goes.

    Each is equal to itself alone.
    """

    learners: dict[int, list[Method]]
    """By layer, the methods that learn from prompts."""
    layers: dict[int, LayerMemory] = field(default_factory=dict)
    #: tokens in the cache after the last pass, and sequences
    length: int = 0
    batch: int = 0
    #: which tokens of the dense passes are real, [B, n]; every generated token is
    valid: torch.Tensor | None = None
    #: the generated tokens since the last dense pass, for reselection
    pending: Pending = field(default_factory=Pending)
    #: how often it may have learned, or its sequences moved
    changes: int = 0
    #: tokens that stayed since the choice was made
    since: int = 0

    def layer(self, index: int) -> LayerMemory:
        return self.layers.setdefault(index, LayerMemory())

    def mask(self, length: int, like: torch.Tensor) -> torch.Tensor:
        """Which of the first `length` tokens are real, bool [B, length], for as many sequences as `like` has."""
        valid = self.valid if self.valid is not None and len(self.valid) == len(like) else None
        known = like.new_ones(len(like), 0, dtype=torch.bool) if valid is None else valid
        return torch.cat([known, known.new_ones(len(like), length - known.shape[1])], 1)

    def saw(self, real: torch.Tensor, offset: int) -> None:
        """Take down a dense pass behind `offset` tokens: which of its own are real, [B, T]."""
        self.changes += 1
        self.since = 0
        self.pending.clear()  # reselection begins after it
        self.valid = torch.cat([self.mask(offset, real), real], 1)

    def forget_waiting(self) -> None:
        """None of the tokens of passes that verified stays."""
        for layer in self.layers.values():
            layer.waiting = []

    def confirm(self, taken: torch.Tensor, every: int | None) -> None:
        """Each sequence keeps the first `taken` [B] tokens of the passes that verified; the choice is made anew once
        `every` tokens stayed, None never."""
        if every is None or not self.learners:
            self.forget_waiting()
            return
        self.since += int(taken.max())
        for index, layer in self.layers.items():
            layer.confirm(self.learners[index], taken)
        if self.since >= every:
            self.since, self.changes = 0, self.changes + 1
            for layer in self.layers.values():
                layer.choose_anew()

    def crop(self, length: int) -> None:
        """Follow a cache that became shorter."""
        self.changes += 1
        self.since = 0
        for index, layer in self.layers.items():
            layer.crop(self.learners[index], length)
        self.pending.crop(length)
        if self.valid is not None:
            self.valid = self.valid[:, :length]
        self.length = length

    def change(self, change: Change) -> None:
        """Follow a cache whose sequences were reordered, selected or repeated."""
        self.changes += 1
        for layer in self.layers.values():
            layer.change(change, self.batch)
        self.valid = None if self.valid is None else change(self.valid)
        self.pending.change(change, self.batch)
        self.batch = len(change(torch.zeros(self.batch)))

    def settle(self) -> None:
        """Give up the way back: the cache will not be cropped into its prompt."""
        for layer in self.layers.values():
            layer.history, layer.tail = [], None

    @property
    def nbytes(self) -> int:
        """Memory of what was learned, without the way back."""
        known = [t for layer in self.layers.values() for t in (*layer.statistics.values(), *layer.choices.values())]
        return sum(t.nbytes for t in known)

    def fork(self) -> PromptMemory:
        """One that goes its own way; tensors are never changed in place, so they are shared."""
        layers = {index: layer.fork() for index, layer in self.layers.items()}
        pending = self.pending.fork()
        return PromptMemory(self.learners, layers, self.length, self.batch, self.valid, pending, since=self.since)

    def __deepcopy__(self, memo: dict[int, Any]) -> PromptMemory:
        return self.fork()


class _Following:
    """Mixed into the class of a cache that has a memory, so that this sees its sequences move."""

    def _follow(self, change: Change) -> None:
        memory = memory_of(self)
        if memory is not None:
            memory.change(change)

    def crop(self, *args: Any, **kwargs: Any) -> None:
        super().crop(*args, **kwargs)  # type: ignore[misc]
        memory = memory_of(self)
        # at once: what is done to the sequences next is done to what is left
        if memory is not None and memory.length > (length := int(self.get_seq_length())):  # type: ignore[attr-defined]
            memory.crop(length)

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        setattr(self, MEMORY, None)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._follow(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._follow(lambda t: t[indices.to(t.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._follow(lambda t: t.repeat_interleave(repeats, dim=0))


def memory_of(cache: Any) -> PromptMemory | None:
    """The memory on a cache, if there is one."""
    return getattr(cache, MEMORY, None)


def keep_memory(cache: Any, memory: PromptMemory) -> None:
    """Put `memory` on a cache, which from now on moves it along."""
    if not isinstance(cache, _Following):
        kind: Any = type(cache)
        cache.__class__ = mixed(_Following, kind)
    setattr(cache, MEMORY, memory)
