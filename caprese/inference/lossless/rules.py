"""Which drafted tokens stay, so that what comes out is what the target alone would have written.

Greedy: those that are the target's own, up to the first that is not. Sampling: Leviathan's rule (arXiv 2211.17192,
algorithm 1), whose tokens have exactly the target's distribution.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from caprese.errors import CapreseError
from caprese.inference.sampling import COLDEST, greedy

Scores = Callable[[list[int], torch.Tensor], torch.Tensor]
"""(a sequence's tokens so far, logits [V]) -> scores [V], as logits processors make them."""


# by the number of the sequence in a batch, or by what they saw at the steps before
_NOT_ALONE = (
    "PrefixConstrainedLogitsProcessor",
    "UnbatchedClassifierFreeGuidanceLogitsProcessor",
    "ClassifierFreeGuidanceLogitsProcessor",
    "SynthIDTextWatermarkLogitsProcessor",
    "EncoderRepetitionPenaltyLogitsProcessor",
    "EncoderNoRepeatNGramLogitsProcessor",
)
# where a processor keeps how many pads are in front of each prompt of a batch
_OF_A_BATCH = "prompt_ignore_length"


@dataclass(frozen=True)
class Drawn:
    """Drafted tokens [B, K], and what they were drawn from."""

    ids: torch.Tensor
    probabilities: list[torch.Tensor] | None = None
    """For each of the K, [B, V]; None where no chance was at work."""
    counts: torch.Tensor | None = None
    """How many of the K each sequence has, [B]; None is all."""

    def of(self, b: int) -> int:
        """How many a sequence has."""
        return self.ids.shape[1] if self.counts is None else int(self.counts[b])

    def count(self, sequences: Sequence[int]) -> list[int]:
        """How many each of these has."""
        return [self.of(b) for b in sequences]


class Rule(Protocol):
    """How a token is taken from logits, and which drafted ones stay."""

    def draft(self, texts: list[list[int]], logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits [B, V] behind texts -> tokens [B], and the probabilities [B, V] that they were drawn with."""
        ...

    def judge(self, texts: list[list[int]], drawn: Drawn, logits: torch.Tensor) -> list[list[int]]:
        """The target's logits [B, K + 1, V] behind texts and after each of their drafts -> the new tokens of each
        sequence: the drafts that stay, and one more."""
        ...


@dataclass
class Greedy:
    """The likeliest token.

    Attributes:
        scores: logits processors; None where there are none.
    """

    scores: Scores | None = None

    def draft(self, texts: list[list[int]], logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.scores is not None:
            logits = torch.stack([self.scores(text, logits[b]) for b, text in enumerate(texts)])
        return greedy(logits, torch.arange(len(logits))), None

    def judge(self, texts: list[list[int]], drawn: Drawn, logits: torch.Tensor) -> list[list[int]]:
        drafts, best = drawn.ids.tolist(), None
        if self.scores is None:
            best = greedy(logits.flatten(0, 1), torch.arange(logits.shape[1])).view(logits.shape[:2]).tolist()
        found = []
        for b, text in enumerate(texts):
            count = drawn.of(b)
            new: list[int] = []
            while True:
                at = len(new)
                own = best[b][at] if best is not None else self._one(text + new, logits[b, at])
                new.append(own)
                if at == count or own != drafts[b][at]:
                    break
            found.append(new)
        return found

    def _one(self, text: list[int], logits: torch.Tensor) -> int:
        assert self.scores is not None
        return int(greedy(self.scores(text, logits)[None], torch.zeros(1))[0])


@dataclass
class Sampling:
    """A draw from softmax(scores).

    Attributes:
        scores: logits processors, temperature and the like among them.
        generator: of all draws; None is torch's own.
    """

    scores: Scores
    generator: torch.Generator | None = None

    def draft(self, texts: list[list[int]], logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        p = torch.stack([self._probabilities(text, logits[b]) for b, text in enumerate(texts)])
        return self._draw(p), p

    def judge(self, texts: list[list[int]], drawn: Drawn, logits: torch.Tensor) -> list[list[int]]:
        drafts, found = drawn.ids.tolist(), []
        for b, text in enumerate(texts):
            count = drawn.of(b)
            new: list[int] = []
            for at in range(count):
                token = drafts[b][at]
                p = self._probabilities(text + new, logits[b, at])
                q = None if drawn.probabilities is None else drawn.probabilities[at][b]
                if not self._stays(p, q, token):
                    new.append(int(self._draw(_rest(p, q, token)[None])))
                    break
                new.append(token)
            else:
                new.append(int(self._draw(self._probabilities(text + new, logits[b, count])[None])))
            found.append(new)
        return found

    def _stays(self, p: torch.Tensor, q: torch.Tensor | None, token: int) -> bool:
        """With probability min(1, p / q)."""
        u = float(torch.rand((), generator=self.generator, device=p.device, dtype=torch.float64))
        return u * (1.0 if q is None else float(q[token])) < float(p[token])

    def _probabilities(self, text: list[int], logits: torch.Tensor) -> torch.Tensor:
        p = self.scores(text, logits).float().softmax(-1)
        if not bool(p.sum().isfinite()):
            raise CapreseError("the model's logits are not finite; load it with `dtype` bfloat16 or float32")
        return p

    def _draw(self, p: torch.Tensor) -> torch.Tensor:
        return torch.multinomial(p, 1, generator=self.generator).squeeze(-1)


def _rest(p: torch.Tensor, q: torch.Tensor | None, token: int) -> torch.Tensor:
    """What a token is drawn from where the drafted one did not stay: the part of p above q."""
    if q is None:
        rest = p.clone()
        rest[token] = 0
    else:
        rest = (p - q.to(p.device)).clamp(min=0)  # a draft may be elsewhere
    # both the same up to rounding: then there was nothing to reject for
    return rest if bool(rest.sum() > 0) else p


def processed(processors: Any, pads: Callable[[list[int]], int]) -> Scores:
    """Scores by transformers' logits processors, which see one sequence at a time.

    Args:
        pads: how many are in front of a text, for processors that were told of a whole batch.

    Raises:
        CapreseError: one that looks at more than a sequence's own tokens, or remembers the steps before.
    """
    if bad := [type(each).__name__ for each in processors if type(each).__name__ in _NOT_ALONE]:
        raise CapreseError(f"lossless generation takes no {bad[0]}: it does not go by a sequence's own tokens alone")

    processors = LogitsProcessorList(map(copy.copy, processors))
    told = [each for each in processors if isinstance(getattr(each, _OF_A_BATCH, None), torch.Tensor)]

    def scores(text: list[int], logits: torch.Tensor) -> torch.Tensor:
        for each in told:
            setattr(each, _OF_A_BATCH, pads(text))
        made: torch.Tensor = processors(torch.tensor([text], device=logits.device), logits[None].float())
        return made[0]

    return scores


def rule_of(
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Rule:
    """Greedy at temperature 0, draws above it; 0 or 1 leaves the other settings out."""
    made: list[Any] = []
    if repetition_penalty != 1:
        made.append(RepetitionPenaltyLogitsProcessor(repetition_penalty))
    if not temperature:
        return Greedy(processed(made, _none) if made else None)
    made.append(TemperatureLogitsWarper(max(float(temperature), COLDEST)))
    made += [TopKLogitsWarper(top_k)] if top_k else []
    made += [TopPLogitsWarper(float(top_p))] if top_p < 1 else []
    return Sampling(processed(made, _none), torch.Generator(device).manual_seed(seed))


def _none(_: list[int]) -> int:
    return 0
