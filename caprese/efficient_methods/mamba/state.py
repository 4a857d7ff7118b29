"""A mixer's place in the KV cache: a state of fixed size, which can be taken back by the tokens since a mark.

What is marked keeps x, dt and B of the tokens that follow, and not their states (`kernels.replay`): what stays of them
is replayed, each sequence as many as it keeps.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from caprese.efficient_methods.mamba.seen import Seen
from caprese.errors import CapreseError
from caprese.kernels.replay import Tokens, replay, verify
from caprese.kernels.scan import CHUNK, decode, scan

KERNEL = 4


class MixerState(DynamicLayer):
    """However long the text is, `window` [B, KERNEL - 1, channels], the last inputs of the convolution, and `state`
    [B, H, P, N].

    Attributes:
        length: tokens read.
        seen: keys and values of what is still attended to; None where nothing is, or nothing was read.
        accepted: tokens that `state` has yet to replay; those that did not stay have dt 0.
        marked: whether what is read now may be taken back.
        always: whether it is marked whenever it is read, for a caller that only crops.
        block: the tokens since the mark.
        inputs: of the convolution, `window` and those of the block.
        running: the state behind the block; None where nobody asked for it yet.
    """

    def __init__(self) -> None:
        super().__init__()
        self.window: torch.Tensor | None = None
        self.state: torch.Tensor | None = None
        self.accepted: Tokens | None = None
        self.rates: torch.Tensor | None = None
        self.seen: Seen | None = None
        self.length = 0
        self.marked = self.always = False
        self._no_block()
        self.keys = self.values = torch.empty(0)
        self.is_initialized = True

    def _no_block(self) -> None:
        self.block: Tokens | None = None
        self.inputs: torch.Tensor | None = None
        self.running: torch.Tensor | None = None

    @property
    def last_inputs(self) -> torch.Tensor | None:
        """What the convolution sees before the next token."""
        return self.window if self.inputs is None else self.inputs[:, 1 - KERNEL :]

    def read(self, new: Tokens, rates: torch.Tensor, C: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        """y [B, T, H, P] of T more tokens.

        Args:
            rates: A of the recurrence, [H].
            inputs: of the convolution, the last ones and these, [B, KERNEL - 1 + T, channels].
        """
        self.rates = rates
        self.length += new.x.shape[1]
        if self.marked or self.always:
            return self._read_marked(new, rates, C, inputs)
        y, self.state = _run(new, rates, C, self._caught_up())
        self.window = inputs[:, 1 - KERNEL :].clone()  # and not a view on the whole text
        return y

    def _read_marked(self, new: Tokens, rates: torch.Tensor, C: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        self.marked = True
        several, first = new.x.shape[1] > 1, self.block is None
        if several and first and self.state is not None and new.x.shape[1] <= CHUNK:
            y, self.state = verify(self.state, self.accepted, new, rates, C)
            self.accepted = None
        else:
            state = self._caught_up() if first else self._behind()
            if state is not None and first and not several:
                state = state.clone()  # one token is written over it
            y, self.running = _run(new, rates, C, state)
        if self.block is None or self.inputs is None:
            self.block, self.inputs = new, inputs
        else:
            self.block = Tokens(*(torch.cat(pair, 1) for pair in zip(self.block, new, strict=True)))
            self.inputs = torch.cat([self.inputs, inputs[:, KERNEL - 1 :]], 1)
        return y

    def _caught_up(self) -> torch.Tensor | None:
        """The state at the mark."""
        if self.accepted is not None:
            assert self.state is not None and self.rates is not None
            self.state, self.accepted = replay(self.state, self.accepted, self.rates), None
        return self.state

    def _behind(self) -> torch.Tensor:
        """The state behind the block."""
        if self.running is None:
            assert self.block is not None and self.state is not None and self.rates is not None
            self.running = replay(self.state, self.block, self.rates)
        return self.running

    def mark(self) -> None:
        """What is read from now on may be taken back."""
        self.marked = True

    def keep(self, taken: torch.Tensor) -> None:
        """Of the tokens since the mark, each sequence keeps its first `taken` [B]; they are replayed with the next.

        Its length is then that of the sequence that keeps most.
        """
        self.marked = False
        if self.block is None or self.inputs is None:
            return
        x, dt, B = self.block
        tokens, taken = x.shape[1], taken.to(x.device)
        if self.seen is not None:
            self.seen.take_back(tokens, taken)
        if self.state is None:  # the first tokens of all
            self.state = x.new_zeros(*x.shape[:1], *x.shape[2:], B.shape[-1])
        stays = torch.arange(tokens, device=x.device) < taken[:, None]
        self.accepted = Tokens(x, dt * stays[..., None].to(dt.dtype), B)
        places = taken[:, None] + torch.arange(KERNEL - 1, device=x.device)
        self.window = self.inputs.gather(1, places[..., None].expand(-1, -1, self.inputs.shape[-1]))
        self.length -= tokens - int(taken.max())
        self._no_block()

    def activate_past_recording(self) -> None:
        """Every token read may be cropped away, down to where it was last cropped; transformers' assisted decoding says
        this."""
        self.always = True

    def crop(self, length: int) -> None:
        """Take back tokens, of those since the mark: be so long, or shorter by a number below 0 (transformers 5.4 says
        the first, newer ones the second)."""
        tokens = -length if length <= 0 else max(0, self.length - length)
        count = 0 if self.block is None else self.block.x.shape[1]
        if tokens > count:
            raise CapreseError(
                f"a recurrent state can be taken back by the tokens since it was marked, {count} here, and not by "
                f"{tokens}; prefill again"
            )
        if self.block is not None:
            self.keep(torch.full((len(self.block.x),), count - tokens))

    def __copy__(self) -> MixerState:
        """One that goes on by itself: decoding writes over a state."""
        twin = type(self).__new__(type(self))
        vars(twin).update(vars(self))
        twin.state, twin.running = (None if t is None else t.clone() for t in (self.state, self.running))
        twin.seen = copy.copy(self.seen)
        return twin

    def put_back(self, before: MixerState) -> None:
        """Be what `before` is a copy of."""
        vars(self).update(vars(before))
        self.seen = copy.copy(before.seen)

    def get_seq_length(self, *_: Any) -> int:
        return self.length

    def bytes_at(self, tokens: int) -> float:
        """Bytes of what a sequence of so many tokens holds while nothing is marked."""
        fixed = sum(t.nbytes / len(t) for t in (self.window, self.state) if t is not None)
        return fixed + (0 if self.seen is None else self.seen.bytes_at(tokens))

    def update(self, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        raise CapreseError("this KV cache was filled by a hybrid; the dense model starts with an empty one")

    def offload(self) -> None:
        """It is small."""

    def prefetch(self) -> None:
        """It is where it is used."""

    def each(self, change: Any) -> None:
        """Reorder, select or repeat sequences."""
        for name in ("window", "state", "accepted", "block", "inputs", "running"):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, Tokens(*map(change, value)) if isinstance(value, Tokens) else change(value))
        if self.seen is not None:
            self.seen.each(change)

    def reset(self) -> None:
        self.window = self.state = self.accepted = self.seen = None
        self.length, self.marked, self.always = 0, False, False
        self._no_block()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.each(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.each(lambda t: t[indices.to(t.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.each(lambda t: t.repeat_interleave(repeats, dim=0))


def _run(
    new: Tokens, rates: torch.Tensor, C: torch.Tensor, state: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """y of these tokens and the state behind them; one token is written over `state`."""
    x, dt, B = new
    if x.shape[1] > 1 or state is None:
        return scan(x, dt, rates, B, C, state)
    y, state = decode(x[:, 0], dt[:, 0], rates, B[:, 0], C[:, 0], state)
    return y.unsqueeze(1), state
