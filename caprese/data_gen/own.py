"""Prompts that the model writes itself, as its user would.

An instruct model that is given the head of its chat template, up to where a user's text begins, goes on with one (the
idea of Magpie, arXiv 2406.08464). A base model begins texts from its start token; their beginnings are its prompts.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from caprese.data_gen.prompts import TODAY
from caprese.errors import CapreseError
from caprese.models import broken
from caprese.models.text import encode_text, rendered_prompt

# Two prompts are near-identical if they share more than this part of their word triples.
_NEAR = 0.7
# A prompt repeats itself if fewer than this part of its word triples are distinct.
_DISTINCT = 0.5
# Draws for each prompt that can be used with which the model is said to write too few.
_PATIENCE = 10
_MARK = "caprese"


@dataclass(frozen=True)
class Head:
    """What comes before a user's text, and what ends it."""

    ids: list[int]
    ends: frozenset[int]
    """Tokens that end it, beside the model's own ends of text."""
    tail: str
    """The text that follows it in the template; empty for a base model."""


def head_of(tokenizer: PreTrainedTokenizerBase, chat_template: bool) -> Head:
    """Where a user's text begins.

    Raises:
        CapreseError: a chat template that takes no user message, or neither template nor start token.
    """
    if chat_template and tokenizer.chat_template:
        text = rendered_prompt(tokenizer, _MARK, TODAY)
        before, _, after = text.partition(_MARK)
        ids = list(tokenizer(before, add_special_tokens=False).input_ids)
        after = after.strip()
        following = tokenizer(after, add_special_tokens=False).input_ids[:1] if after else []
        marks = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}  # not all of them are said to be special
        if ids:
            mark = frozenset(following) & marks
            return Head(ids, mark, str(tokenizer.decode(following)) if mark else re.split(r"\s", after)[0])
    plain = tokenizer(_MARK, add_special_tokens=False).input_ids
    ids = encode_text(tokenizer, _MARK)
    ids = ids[: len(ids) - len(plain)]
    start = [i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None]
    if not ids and not start:
        raise CapreseError(
            "prompts `self`: the tokenizer has neither a chat template nor a start token to draw from; give other "
            "prompts"
        )
    return Head(ids or start[:1], frozenset(), "")


@dataclass
class Sieve:
    """Keeps what can be asked, and counts why the rest cannot."""

    tokenizer: PreTrainedTokenizerBase
    head: Head
    ends: frozenset[int]
    """The model's own."""
    fits: Callable[[str], bool] = lambda _: True
    """Whether the model's context takes a prompt and its answer."""
    counts: Counter[str] = field(default_factory=Counter)
    _kept: list[int] = field(default_factory=list)
    _by_triple: dict[tuple[str, ...], list[int]] = field(default_factory=lambda: defaultdict(list))

    def take(self, draw: Sequence[int]) -> str | None:
        """The prompt in a draw's tokens; None if it is empty, cut off, repeats itself, or is like one before."""
        text, reason = self._read(draw)
        words = re.findall(r"\w+|[^\w\s]", text.lower())
        triples = [tuple(words[i : i + 3]) for i in range(max(1, len(words) - 2))]
        distinct = set(triples)
        if reason is None and not re.search(r"\w", text):
            reason = "empty"
        elif reason is None and len(triples) >= 12 and len(distinct) < _DISTINCT * len(triples):
            reason = "repeats itself"
        elif reason is None and self._is_near(distinct):
            reason = "like another"
        elif reason is None and not self.fits(text):
            reason = "too long"
        self.counts[reason or "usable"] += 1
        if reason is not None:
            return None
        for triple in distinct:
            self._by_triple[triple].append(len(self._kept))
        self._kept.append(len(distinct))
        return text

    def check(self, wanted: int) -> None:
        """Give up on a model that writes too few.

        Raises:
            CapreseError: hardly any of what it has drawn can be used.
        """
        if self.counts.total() >= max(100, _PATIENCE * self.counts["usable"]):
            raise CapreseError(f"prompts `self`: {self}, and {wanted} are wanted; give other prompts, or less of these")

    def __str__(self) -> str:
        dropped = ", ".join(f"{n} {reason}" for reason, n in self.counts.most_common() if reason != "usable")
        usable = f"{self.counts['usable']} of {self.counts.total()} prompts that the model wrote can be used"
        return f"{usable} ({dropped})" if dropped else usable

    def _read(self, draw: Sequence[int]) -> tuple[str, str | None]:
        """The text of a draw, and what is wrong with it."""
        ended = bool(draw) and draw[-1] in self.ends | self.head.ends
        text = str(self.tokenizer.decode(list(draw[: len(draw) - ended]), skip_special_tokens=False))
        known = {*self.tokenizer.all_special_tokens, *map(str, self.tokenizer.added_tokens_decoder.values())}
        marks = [token for token in known if token.strip()]
        if not self.head.tail:  # a base model: some beginning of what it writes, the longer the later it was drawn
            whole = re.split("|".join(map(re.escape, [*marks, "\N{REPLACEMENT CHARACTER}"])), text)[0]
            return " ".join(whole.split()[: 4 + self.counts.total() % 29]), None
        inside, found, _ = text.partition(self.head.tail)
        special = [token for token in marks if token in inside]
        if not (ended or found):
            return inside, "cut off"
        return inside.strip(), "broken" if special or broken(inside) or "\N{REPLACEMENT CHARACTER}" in inside else None

    def _is_near(self, triples: set[tuple[str, ...]]) -> bool:
        shared = Counter(number for triple in triples for number in self._by_triple.get(triple, ()))
        return any(n / (len(triples) + self._kept[number] - n) > _NEAR for number, n in shared.items())
