"""Samplers: logits [n, V] of the sequences `rows` [n] -> their next tokens [n]."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from caprese.errors import CapreseError

Sampler = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# Tokens among which the nucleus is looked for first, and how many times as many next where they do not hold it: partial
# sorts of ever fewer rows. On a CPU a sort of all [n, V] takes longer than the model's own step.
_HEAD, _WIDER = 256, 8
# Below it a draw is the likeliest token, and logits would overflow.
COLDEST = 1e-6


def greedy(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The likeliest token of each row."""
    if logits.device.type == "cpu":  # 49,152 in bfloat16 on an AMD EPYC: 180 us by torch, 10 by numpy
        wide = logits.detach() if logits.dtype == torch.float64 else logits.detach().float()
        return torch.from_numpy(wide.numpy().argmax(-1))
    return logits.argmax(-1)


def in_nucleus(logits: torch.Tensor, temperature: float, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [n, V] -> probabilities [n, k], not normalised, and token ids [n, k] of the smallest set that holds top_p
    of the mass; what is outside it has probability 0."""
    scores = logits.float() / max(temperature, COLDEST)
    total = scores.logsumexp(-1, keepdim=True)
    if top_p >= 1:  # nothing is outside it, and nothing need be sorted
        return (scores - total).exp(), torch.arange(scores.shape[-1], device=scores.device).expand_as(scores)
    width = min(_HEAD, scores.shape[-1])
    top, index = scores.topk(width)
    probabilities = (top - total).exp()
    while width < scores.shape[-1] and (flat := probabilities.sum(-1) < top_p).any():
        room = min(_WIDER * width, scores.shape[-1]) - width
        width += room
        probabilities, index = (functional.pad(t, (0, room)) for t in (probabilities, index))
        top, index[flat] = scores[flat].topk(width)
        probabilities[flat] = (top - total[flat]).exp()
    outside = probabilities.cumsum(-1) - probabilities > top_p  # the token that crosses the border stays
    return probabilities.masked_fill(outside, 0), index


def nucleus(batch: int, temperature: float, top_p: float, seed: int, device: torch.device) -> Sampler:
    """Draws with temperature and top-p, the same tokens for the same seed.

    One uniform number a sequence and step says which token: that at whose place the running sum of probabilities
    reaches it. The numbers are those of all `batch` sequences as they began, so a sequence draws the same whether those
    that ended are still beside it or not. A draw raises CapreseError where logits are not finite.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def draw(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        probabilities, index = in_nucleus(logits, temperature, top_p)
        reached = probabilities.cumsum(-1)
        if not reached[:, -1].isfinite().all():
            raise CapreseError("the model's logits are not finite; load it with `dtype` bfloat16 or float32")
        above_zero = 1 - torch.rand(batch, 1, device=device, generator=generator)[rows]
        place = torch.searchsorted(reached, above_zero * reached[:, -1:])
        return index.gather(-1, place).squeeze(-1)

    return draw
