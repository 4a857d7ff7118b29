"""`caprese bench --lossless`: what drafting and verifying cost, how much is accepted, and what that comes to."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from numpy import interp
from torch import nn

from caprese.efficient_methods import applied_ffns, dense
from caprese.errors import CapreseError
from caprese.inference.generate import NewTokens, clock, generate
from caprese.inference.lossless import Greedy, Lossless, Pace, Tally
from caprese.inference.lossless.pace import expected
from caprese.inference.lossless.rules import Rule
from caprese.models import device_of, unwrap
from caprese.models.private import needed
from caprese.progress import bar

# Each cost is the median of so many, taken in turn: before the first prompts (which compile and pack), before others.
_FIRST, _LATER = 7, 2
# tokens drafted to see what one costs
_DRAFTED = 4
# Groups of prompts, at most, on which the number of drafts settles before it is measured.
_SETTLING = 2
#: new tokens that it is measured over
LEAST = 4


def bench_lossless(
    model: nn.Module, lossless: Lossless, prompts: Sequence[Sequence[int]], new_tokens: int, rule: Rule, batch: int = 1
) -> dict[str, Any]:
    """Dense and lossless decoding of the same prompts, in turns.

    Args:
        lossless: who drafts for whom; its number of drafts, if it has none, settles on the first prompts.
        prompts: token ids; they are decoded `batch` at a time.
        rule: how tokens are taken.

    Returns: "draft_cost" and "verify_cost" (by tokens in the pass), over a dense step; "tokens" drafted a round,
        "acceptance", "tokens_per_round"; speed-ups over dense: "predicted" from acceptance and these costs, "measured",
        and "adapting", where the number of drafts goes on to adapt, down to none (None if it was given);
        "break_even", the acceptance below which drafting does not pay here;
        "dense_ms" and "lossless_ms", over all tokens of a batch; "identical", of the texts, None with draws.

    Raises:
        CapreseError: no prompts, or see `Lossless`.
    """
    if not prompts or new_tokens < LEAST or batch < 1:
        raise CapreseError(f"lossless is measured on at least one prompt, {LEAST} `new_tokens` and a `batch` of 1")
    groups = [prompts[i : i + batch] for i in range(0, len(prompts), batch)]
    if lossless.compiled:  # for one static cache, as long as any run wants it
        widest = max(*lossless.pace.choices, 2 * new_tokens)
        with lossless.static_cache(model, len(groups[0]), max(map(len, prompts)) + widest + 1):
            pass
    known = [costs(model, lossless, groups[0], rule, _FIRST)]
    adapting = lossless.pace
    paces = {"lossless": adapting}
    names = ["dense", "lossless"] + (["adapting"] if lossless.tokens is None else [])
    tallies, same = {name: Tally() for name in names}, 0
    total, steps = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0)
    try:
        with bar("lossless", len(names) * len(groups), "runs") as advance:
            if lossless.tokens is None:
                for group in groups[:_SETTLING]:
                    _run(lossless.decode(model, _padded(model, group), 2 * new_tokens, rule, _never))
                best = max((count for count in adapting.choices if count), key=adapting.speed)
                paces = {"lossless": Pace(best, lossless.compiled), "adapting": adapting}
            for number, group in enumerate(groups):
                if number:  # a machine's speed drifts, and these are compared with what is measured below
                    lossless.pace = adapting
                    known.append(costs(model, lossless, group, rule, _LATER))
                texts = {}
                for name in names if number % 2 else reversed(names):
                    if name == "dense":
                        tokens, seconds = _run(_plain(model, lossless, group, new_tokens, rule))
                    else:
                        lossless.pace = paces[name]
                        tokens, seconds = _run(lossless.decode(model, _padded(model, group), new_tokens, rule, _never))
                        tallies[name] += lossless.tally
                    texts[name] = tokens
                    total[name] += seconds
                    steps[name] += sum(map(len, tokens.values())) - len(group)
                    advance(1)
                same += sum(all(text[row] == texts["dense"][row] for text in texts.values()) for row in texts["dense"])
    finally:
        lossless.pace = adapting
    draft = statistics.median(cost for cost, _ in known)
    verify = {width: statistics.median(reading[width] for _, reading in known) for width in known[0][1]}
    ms = {name: 1000 * total[name] / steps[name] for name in names}
    return _figures(tallies["lossless"], ms, draft, verify) | {
        "identical": f"{same} of {len(prompts)}" if isinstance(rule, Greedy) else None,
        "prompts": len(prompts),
        "new_tokens": new_tokens,
        "batch": batch,
    }


def _figures(tally: Tally, ms: dict[str, float], draft: float, verify: dict[int, float]) -> dict[str, Any]:
    count = max(tally.by_count, key=lambda k: tally.by_count[k], default=0)
    figures = tally.figures()
    # rounds near an end draft fewer: each as many as it did
    a = min(figures["acceptance"] or 0.0, 1 - 1e-9)
    tokens = sum(n * expected(a, k) for k, n in tally.by_count.items())
    time = sum(n * (k * draft + interp(k + 1, [*verify], [*verify.values()])) for k, n in tally.by_count.items())
    return {
        "tokens": count,
        **figures,
        "draft_cost": draft,
        "verify_cost": {str(width): cost for width, cost in verify.items()},
        "break_even": _break_even(draft, verify),
        "predicted": float(tokens / time),
        "measured": ms["dense"] / ms["lossless"],
        "adapting": ms["dense"] / ms["adapting"] if "adapting" in ms else None,
        "dense_ms": ms["dense"],
        "lossless_ms": ms["lossless"],
    }


@torch.no_grad()
def costs(
    model: nn.Module, lossless: Lossless, prompts: Sequence[Sequence[int]], rule: Rule, times: int
) -> tuple[float, dict[int, float]]:
    """One drafted token, and verifying passes by their tokens, over a dense step.

    Args:
        times: of which each is the median, behind a first that is not counted.
    """
    ids, mask = _padded(model, prompts)
    widths = sorted({1, *(count + 1 for count in lossless.pace.choices), 1 + (lossless.tokens or 0)})
    size = len(ids), ids.shape[1] + max(_DRAFTED, *widths) + 1
    with lossless.pair(model, rule, size) as pair, lossless.around(model):
        target, draft = pair.target, pair.draft
        target.begin(ids, mask)
        draft.begin(ids, mask)
        texts = [[*row, row[-1]] for row in ids.tolist()]
        widths = [w for w in widths if target.narrowest is None or w <= target.narrowest]
        reading: dict[int, list[float]] = {width: [] for width in widths}
        drafting: list[float] = []
        for _ in range(times + 1):
            begin = clock(target.device)
            draft.propose(texts, _DRAFTED, rule)
            drafting.append((clock(target.device) - begin) / _DRAFTED)
            draft.keep(torch.ones(len(texts), dtype=torch.long))
            for width in widths:
                new = ids[:, -1:].repeat(1, width)
                with target.ahead():
                    begin = clock(target.device)
                    target.read(new)
                    reading[width].append(clock(target.device) - begin)
    step = statistics.median(reading[1][1:])
    return statistics.median(drafting[1:]) / step, {w: statistics.median(t[1:]) / step for w, t in reading.items()}


def _break_even(draft: float, verify: dict[int, float]) -> float | None:
    """The least acceptance, in hundredths, with which some number of drafts is faster than none."""
    for percent in range(1, 100):
        a = percent / 100
        if any(expected(a, w - 1) > (w - 1) * draft + cost for w, cost in verify.items() if w > 1):
            return a
    return None


def _padded(model: nn.Module, prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    longest, device = max(map(len, prompts)), device_of(model)
    ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    return ids, mask


def _plain(
    model: nn.Module, lossless: Lossless, prompts: Sequence[Sequence[int]], new_tokens: int, rule: Rule
) -> Iterator[NewTokens]:
    """The dense model's own loop, with the same rule; compiled where lossless is."""
    texts = [list(prompt) for prompt in prompts]

    def take(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        new, _ = rule.draft([texts[row] for row in rows.tolist()], logits)
        for row, token in zip(rows.tolist(), new.tolist(), strict=True):
            texts[row].append(token)
        return new

    step = needed(unwrap(model), "get_compiled_call")(None) if lossless.compiled else None
    size = len(prompts), max(map(len, prompts)) + new_tokens
    own = lossless.static_cache(model, *size) if lossless.compiled else nullcontext()
    with own as cache, dense(model) if applied_ffns(model) else nullcontext():
        yield from generate(unwrap(model), prompts, new_tokens, take, cache=cache, step=step)


def _run(steps: Iterator[NewTokens]) -> tuple[dict[int, list[int]], float]:
    """The tokens of each sequence, and the seconds from the first to the last of them."""
    tokens: dict[int, list[int]] = {}
    moments: list[float] = []
    for new in steps:
        moments.append(new.moment)
        for row, token in zip(new.rows.tolist(), new.ids.tolist(), strict=True):
            tokens.setdefault(row, []).append(token)
    return tokens, sum(b - a for a, b in itertools.pairwise(moments))


def _never(_: int, __: list[int]) -> bool:
    return False
