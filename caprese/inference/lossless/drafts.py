"""Who drafts: the target's own cheaper layers, another model, or the text itself."""

from __future__ import annotations

from typing import Protocol

import torch
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from caprese.inference.lossless.rules import Drawn, Rule
from caprese.inference.lossless.side import How, Side


class Draft(Protocol):
    """What proposes tokens for the target to verify."""

    def begin(self, ids: torch.Tensor, mask: torch.Tensor | None) -> None:
        """The prompts [B, T], which were read by the target."""
        ...

    def propose(self, texts: list[list[int]], count: int, rule: Rule) -> Drawn:
        """`count` tokens behind each text, of which the last is in no cache yet."""
        ...

    def keep(self, taken: torch.Tensor) -> None:
        """Of the last token of each text and those proposed behind it, the first `taken` [B] stay; without a proposal
        since, one of each or none."""
        ...

    def select(self, rows: torch.Tensor) -> None:
        """Go on with these sequences alone, places in the batch."""
        ...

    @property
    def in_step(self) -> bool:
        """Whether all sequences have to keep the same number of tokens."""
        ...

    @property
    def narrowest(self) -> int | None:
        """Tokens that it can read for a proposal; None: any number."""
        ...


class Own:
    """The target with its methods and branches, on the target's KV cache: what it writes there the target overwrites.

    Attributes:
        target: whose it is.
        how: the context in which the methods act.
    """

    in_step, narrowest = False, None

    def __init__(self, target: Side, how: How) -> None:
        self.target, self.how = target, how

    def begin(self, ids: torch.Tensor, mask: torch.Tensor | None) -> None:
        """It sees what the target sees."""

    def propose(self, texts: list[list[int]], count: int, rule: Rule) -> Drawn:
        target = self.target
        as_target, target.how = target.how, self.how
        try:
            with target.ahead():
                return _one_by_one(target, texts, count, rule)
        finally:
            target.how = as_target

    def keep(self, taken: torch.Tensor) -> None:
        """The target keeps."""

    def select(self, rows: torch.Tensor) -> None:
        """The target selects."""


class Other:
    """A model with the target's tokenizer and a KV cache of its own; it may be the target's model in another guise.

    Attributes:
        drawn: tokens read for the last proposal.
        unread: tokens that stayed and were not read yet, as many in each sequence.
    """

    def __init__(self, side: Side) -> None:
        self.side = side
        self.drawn = self.unread = 0

    @property
    def in_step(self) -> bool:
        return self.side.in_step

    @property
    def narrowest(self) -> int | None:
        return self.side.narrowest

    def begin(self, ids: torch.Tensor, mask: torch.Tensor | None) -> None:
        self.side.begin(ids, mask)

    def propose(self, texts: list[list[int]], count: int, rule: Rule) -> Drawn:
        if self.unread:  # a sequence that ended may be shorter; what it reads is read by nobody
            ids = [([0] * self.unread + text)[-1 - self.unread : -1] for text in texts]
            self.side.read(torch.tensor(ids, device=self.side.device), logits_to_keep=1)
            self.unread = 0
        self.side.mark()
        drawn = _one_by_one(self.side, texts, count, rule)
        self.drawn = count
        if len(texts) > 1:  # some sequences may keep it, and the others let it go
            self.side.read(drawn.ids[:, -1:].to(self.side.device))
            self.drawn += 1
        return drawn

    def keep(self, taken: torch.Tensor) -> None:
        most = int(taken.max())
        self.unread += max(0, most - self.drawn)
        if self.drawn:
            self.side.keep(taken.clamp(max=self.drawn), self.drawn)
            self.side.move_together()
        self.drawn = 0

    def select(self, rows: torch.Tensor) -> None:
        self.side.select(rows)


class Lookup:
    """What followed the last words where they stood before, by transformers' prompt look-up; it costs nothing."""

    in_step, narrowest = False, None

    def __init__(self, longest: int = 3, whole: bool = False) -> None:
        """
        Args:
            longest: the most words that are looked for.
            whole: propose as many as are asked for, of which a sequence has some, for passes that are compiled.
        """
        self.longest, self.whole = longest, whole

    def begin(self, ids: torch.Tensor, mask: torch.Tensor | None) -> None:
        """The texts hold it."""

    def propose(self, texts: list[list[int]], count: int, rule: Rule) -> Drawn:
        found = PromptLookupCandidateGenerator(
            eos_token_id=torch.tensor([-1]),  # what stands behind an end is as good a draft; transformers 5.4 wants one
            num_output_tokens=count,
            max_matching_ngram_size=self.longest,
            max_length=10**9,
        )
        ids, counts = torch.zeros(len(texts), count, dtype=torch.long), torch.zeros(len(texts), dtype=torch.long)
        for b, text in enumerate(texts):
            given, _ = found.get_candidates(torch.tensor([text]))  # type: ignore[arg-type]
            new = given[0, len(text) :]
            ids[b, : len(new)], counts[b] = new, len(new)
        most = int(counts.max())
        return Drawn(ids if self.whole and most else ids[:, :most], counts=counts)

    def keep(self, taken: torch.Tensor) -> None:
        """It has no cache."""

    def select(self, rows: torch.Tensor) -> None:
        """It has no sequences."""


def _one_by_one(side: Side, texts: list[list[int]], count: int, rule: Rule) -> Drawn:
    """`count` tokens, of which the last is not read."""
    texts, drawn, chances = [list(text) for text in texts], [], []
    for _ in range(count):
        last = torch.tensor([text[-1:] for text in texts], device=side.device)
        new, chance = rule.draft(texts, side.read(last)[:, -1])
        drawn.append(new)
        chances.append(chance)
        for text, token in zip(texts, new.tolist(), strict=True):
            text.append(token)
    known = [chance for chance in chances if chance is not None]
    return Drawn(torch.stack(drawn, 1), known if known else None)
