"""The loop of speculative decoding: draft, verify, keep what the target would have written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from caprese.inference.generate import NewTokens, clock
from caprese.inference.lossless.drafts import Draft
from caprese.inference.lossless.pace import Pace
from caprese.inference.lossless.rules import Drawn, Rule
from caprese.inference.lossless.side import Side

IsOver = Callable[[int, list[int]], bool]
"""(sequence, its tokens) -> whether the last of them ends it."""
# Sequences leave the batch when at least this part of it has ended.
_ENDED = 0.25


@dataclass
class Pair:
    """A target and its draft at work on a batch.

    Attributes:
        reselect_every: tokens after which methods choose anew from what was verified; None never.
        leave: whether sequences that ended leave the batch; else the target's KV cache is of all of them at the end.
        rows: of the sequences in the batch, which they are, counted as they were given.
        texts: their tokens, pads in front included; the last is in no cache yet.
        left: of those that go on, how many more tokens they may have, by `rows`.
        read: those that ended, once their last token was read.
    """

    target: Side
    draft: Draft
    rule: Rule
    pace: Pace
    reselect_every: int | None = None
    leave: bool = True
    rows: list[int] = field(init=False, default_factory=list)
    texts: list[list[int]] = field(init=False, default_factory=list)
    left: dict[int, int] = field(init=False, default_factory=dict)
    read: set[int] = field(init=False, default_factory=set)

    @torch.no_grad()
    def decode(
        self, ids: torch.Tensor, mask: torch.Tensor | None, max_new_tokens: int, is_over: IsOver
    ) -> Iterator[NewTokens]:
        """The first `next` reads the prompts, each of the following gives one more token of some sequences.

        Args:
            ids: prompts [B, T], padded on the left.
            mask: which of them are no pads, [B, T]; None is all.
        """
        if max_new_tokens < 1:
            return
        logits = self.target.begin(ids, mask)
        self.draft.begin(ids, mask)
        self.rows, self.texts = list(range(len(ids))), ids.tolist()
        self.left = dict.fromkeys(self.rows, max_new_tokens)
        first, _ = self.rule.draft(self.texts, logits)
        new = self._grow([[token] for token in first.tolist()], is_over)
        yield from self._given(new)
        while self.left:
            self._let_go()
            yield from self._given(self._round(is_over))
        if not self.leave:
            self._read_last()

    def _round(self, is_over: IsOver) -> list[list[int]]:
        """Draft, verify and keep; the new tokens of each sequence."""
        target, draft, device = self.target, self.draft, self.target.device
        count = self.pace.choose(self._limit())
        begin = clock(device)
        drawn = Drawn(torch.zeros(len(self.texts), 0, dtype=torch.long))
        if count:
            drawn = draft.propose(self.texts, count, self.rule)
        middle = clock(device)
        last = torch.tensor([text[-1:] for text in self.texts])
        target.mark()
        logits = target.read(torch.cat([last, drawn.ids.cpu()], 1).to(device))
        new = self.rule.judge(self.texts, drawn, logits)
        alive = [b for b, row in enumerate(self.rows) if row in self.left]
        judged = [len(new[b]) for b in alive]
        in_step = target.in_step or draft.in_step
        if in_step:
            fewest = min(judged)
            new = [tokens[:fewest] for tokens in new]
        last_of = self._outlived(drawn.ids.shape[1] + 1)
        self.read |= last_of
        new = self._grow(new, is_over)
        kept = [len(tokens) + (row in last_of) for row, tokens in zip(self.rows, new, strict=True)]
        longest = max(len(new[b]) for b in alive)  # where all ended inside the block, no more than they are long
        taken = torch.tensor([longest if in_step else count for count in kept])
        target.keep(taken, drawn.ids.shape[1] + 1, self.reselect_every)
        draft.keep(taken)
        target.move_together()
        counts, width = drawn.count(alive), drawn.ids.shape[1]
        self.pace.note(counts, judged, middle - begin, clock(device) - middle, width)
        return new

    def _outlived(self, tokens: int) -> set[int]:
        """Sequences that ended whose last token is to be read now: others may become longer by these `tokens`."""
        lengths = dict(zip(self.rows, map(len, self.texts), strict=True))
        longest = max(lengths[row] for row in self.left or self.rows) + tokens
        return {row for row in self.rows if row not in self.left and row not in self.read and lengths[row] < longest}

    def _read_last(self) -> None:
        """The last tokens that are not read yet, of sequences shorter than the longest."""
        if not (last_of := self._outlived(0)):
            return
        self.target.mark()
        self.target.read(torch.tensor([text[-1:] for text in self.texts], device=self.target.device))
        taken = torch.tensor([int(row in last_of) for row in self.rows])
        self.target.keep(taken.clamp(min=int(self.target.in_step)), 1)

    def _grow(self, new: list[list[int]], is_over: IsOver) -> list[list[int]]:
        """Add tokens to the texts that go on, up to their ends; those that were added."""
        added: list[list[int]] = [[] for _ in self.rows]
        for row, text, tokens, own in zip(self.rows, self.texts, new, added, strict=True):
            for token in tokens if row in self.left else ():
                text.append(token)
                own.append(token)
                self.left[row] -= 1
                if not self.left[row] or is_over(row, text):
                    del self.left[row]
                    break
        return added

    def _given(self, new: list[list[int]]) -> Iterator[NewTokens]:
        """New tokens, the first of each sequence first."""
        moment, rows = clock(self.target.device), list(self.rows)
        for depth in range(max(map(len, new))):
            there = [b for b, tokens in enumerate(new) if depth < len(tokens)]
            at, ids = [rows[b] for b in there], [new[b][depth] for b in there]
            yield NewTokens(torch.tensor(at), torch.tensor(ids), moment)

    def _let_go(self) -> None:
        """Sequences that ended leave, where they are enough."""
        stay = [b for b, row in enumerate(self.rows) if row in self.left]
        gone = len(self.rows) - len(stay)
        if not gone or gone < _ENDED * len(self.rows) or not self.leave or self.target.fixed:
            return
        self.rows, self.texts = [self.rows[b] for b in stay], [self.texts[b] for b in stay]
        for side in (self.target, self.draft):
            side.select(torch.tensor(stay))

    def _limit(self) -> int:
        """Drafts that can be verified now and may all be wanted."""
        limits = (max(self.left.values()), self.target.narrowest, self.target.room, self.draft.narrowest)
        return max(0, min(limit - 1 for limit in limits if limit is not None))
