"""Which rows of an engine's batch are prompt, which are generated, and what each prompt has chosen."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch.nn import functional as F

from caprese.efficient_methods import Method
from caprese.kernels import PackedFFN
from caprese.models import FFN


class Span(NamedTuple):
    """Rows of one request in a pass."""

    request: str
    prompt: slice
    """Those of its prompt; a prompt may come in chunks."""
    generated: slice
    begins: bool
    """Whether they are its first: after a preemption, once more."""
    chooses: bool
    """Whether the prompt is whole with them."""


def spans_of(requests: Iterable[tuple[str, int, int, int]]) -> list[Span]:
    """The spans of a batch, whose rows lie in the order of the requests.

    A request that was preempted passes its prompt and what it had generated again; by their positions they are what
    they were.

    Args:
        requests: of each its id, rows, tokens that were computed before, tokens of its prompt.
    """
    found, at = [], 0
    for name, rows, computed, prompt in requests:
        between = at + min(rows, max(0, prompt - computed))
        whole = computed < prompt <= computed + rows
        found.append(Span(name, slice(at, between), slice(between, at + rows), computed == 0, whole))
        at += rows
    return found


@dataclass
class Chosen:
    """What one layer knows of one request."""

    statistic: torch.Tensor | None = None
    """Summed over the prompt so far, [1, S]."""
    keep: torch.Tensor | None = None
    """The chosen neurons, bool [F]."""
    count: int = 0
    """How many they are."""
    packed: PackedFFN | None = None
    """Their weights, gathered."""


@dataclass
class Layer:
    """An FFN of one decoder layer, prompts dense and generated tokens through what their prompt chose.

    Attributes:
        ffn: with the engine's own weights.
        branch: its first matrix [r, D], its second [D, r], its bias [D].
    """

    method: Method
    ffn: FFN
    branch: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
    known: dict[str, Chosen] = field(default_factory=dict)

    def forget(self, but: Collection[str]) -> None:
        """Drop what belongs to requests that are no more."""
        for name in self.known.keys() - set(but):
            del self.known[name]

    def forward(self, x: torch.Tensor, spans: list[Span]) -> torch.Tensor:
        """The FFN's output [rows, D] for x [rows, D]."""
        out = torch.empty_like(x)
        if any(_length(span.prompt) for span in spans):
            self._prompts(x, spans, out)
        if spans and (generated := [span for span in spans if _length(span.generated)]):
            self._generated(x, generated, out)
        end = max((span.generated.stop for span in spans), default=0)
        out[end:] = 0  # padding
        return out

    def _prompts(self, x: torch.Tensor, spans: list[Span], out: torch.Tensor) -> None:
        for span in spans:
            if not _length(span.prompt):
                continue
            rows = x[span.prompt]
            a, z = self.ffn.neurons(rows)
            out[span.prompt] = self.ffn.down(z)
            if span.begins:
                self.known[span.request] = Chosen()
            chosen = self._of(span.request)
            seen = self.method.statistic(rows[None], a[None], z[None], rows.new_ones(1, len(rows), dtype=torch.bool))
            chosen.statistic = seen if chosen.statistic is None else chosen.statistic + seen
            if span.chooses:
                choice = self.method.choose(chosen.statistic, self.ffn)
                keep = self.method.keep(a[None], z[None], choice)
                assert keep is not None
                chosen.keep, chosen.statistic = keep.reshape(-1), None
                chosen.count = int(keep.sum())

    def _generated(self, x: torch.Tensor, spans: list[Span], out: torch.Tensor) -> None:
        chosen = [self._of(span.request, whole=True) for span in spans]
        rows = torch.cat([x[span.generated] for span in spans])
        if sum(each.count for each in chosen) < self.ffn.width:  # together they read less than the whole
            parts = [self._alone(x[span.generated], each) for span, each in zip(spans, chosen, strict=True)]
            found = torch.cat(parts)
        else:
            for each in chosen:
                each.packed = None
            keeps = torch.stack([each.keep for each in chosen if each.keep is not None])
            counts = torch.tensor([_length(span.generated) for span in spans], device=rows.device)
            found = self.ffn.down(self.ffn.neurons(rows)[1] * keeps.repeat_interleave(counts, 0))
        first, second, bias = self.branch
        found = found + F.linear(F.linear(rows, first), second, bias)
        for span, part in zip(spans, found.split([_length(span.generated) for span in spans]), strict=True):
            out[span.generated] = part

    def _alone(self, x: torch.Tensor, chosen: Chosen) -> torch.Tensor:
        if chosen.packed is None:
            assert chosen.keep is not None
            chosen.packed = PackedFFN(self.ffn, chosen.keep.nonzero()[:, 0])
        packed: torch.Tensor = chosen.packed(x)
        return packed

    def _of(self, request: str, whole: bool = False) -> Chosen:
        found = self.known.get(request)
        if found is None or (whole and found.keep is None):
            raise RuntimeError(
                f"request {request} goes on from a prompt that was not seen here: keys from elsewhere leave no choice "
                "of neurons; start vLLM with --no-enable-prefix-caching and without a KV connector"
            )
        return found


def _length(rows: slice) -> int:
    return int(rows.stop - rows.start)
