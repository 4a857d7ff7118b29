"""Whether an engine runs the weights that are loaded here: its greedy tokens and their log-probabilities say so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from caprese.errors import CapreseError
from caprese.models import device_of, unwrap

# Nats by which log-probabilities may differ, in the mean: what other kernels and orders of summing do, at least, by how
# many bits are computed with here, or so many times what computing in bfloat16 does to these weights.
_LEAST, _LEAST_IN_16_BITS, _TIMES = 0.02, 0.08, 3.0
# Nats by which a greedy token may be less likely here than the likeliest: ties fall to either side.
_TIE = 0.5
#: asked where the first prompts are the same, as those are from which a model writes prompts of its own
QUESTIONS = (
    "What is 17 * 23?",
    "Name three rivers of Europe.",
    "Write a short poem about rain.",
    "Explain why the sky is blue.",
    "Say hello in five languages.",
    "How do I sort a list in Python?",
)


@dataclass(frozen=True)
class Probe:
    """A prompt, and how an engine goes on with it at temperature 0."""

    prompt: list[int]
    ids: list[int]
    text: str
    logprobs: list[float]


@torch.no_grad()
def prove(model: nn.Module, tokenizer: PreTrainedTokenizerBase, probes: Sequence[Probe], who: str) -> str:
    """Compare an engine's answers with the loaded weights'.

    Args:
        model: dense.
        who: the engine, for the message.

    Returns: the figures, as they may be said.

    Raises:
        CapreseError: another vocabulary, no log-probabilities, or other weights, with the figure.
    """
    for each in probes:
        own = str(tokenizer.decode(each.ids, skip_special_tokens=True)).strip()
        plain = str(tokenizer.decode(each.ids, skip_special_tokens=False)).strip()
        if not plain.startswith(each.text.strip()) and own != each.text.strip():
            raise CapreseError(
                f"{who} has another vocabulary: it says {each.text[:40]!r} where its tokens are {own[:40]!r} here; "
                "serve this base"
            )
        if not each.logprobs or len(each.logprobs) > len(each.ids):
            raise CapreseError(f"{who} gives no log-probabilities, which show what it serves; let it return them")
    apart: list[torch.Tensor] = []
    rounding: list[torch.Tensor] = []
    below: list[torch.Tensor] = []
    for each in probes:
        ids = each.ids[: len(each.logprobs)]
        with torch.autocast(device_of(model).type, enabled=False):  # who draws may be inside one
            exact = _logprobs(model, each.prompt, ids)
        with torch.autocast(device_of(model).type, torch.bfloat16):
            rounded = _logprobs(model, each.prompt, ids)
        at = torch.tensor(ids)[:, None]
        there = torch.tensor(each.logprobs, dtype=torch.float64)
        apart.append((exact.gather(1, at)[:, 0] - there).abs())
        rounding.append((exact.gather(1, at)[:, 0] - rounded.gather(1, at)[:, 0]).abs())
        below.append(exact.max(1).values - exact.gather(1, at)[:, 0])
    mean, noise, worst = (
        float(torch.cat(apart).mean()),
        float(torch.cat(rounding).mean()),
        float(torch.cat(below).max()),
    )
    least = _LEAST if unwrap(model).dtype == torch.float32 else _LEAST_IN_16_BITS
    allowed = max(least, _TIMES * noise)
    figures = f"log-probabilities {mean:.4f} nats apart over {sum(map(len, apart))} tokens"
    if not (mean <= allowed and worst <= _TIE):
        raise CapreseError(
            f"{who} is not the model that is loaded here: {figures} ({allowed:.4f} at most), a greedy "
            f"token up to {worst:.2f} below the likeliest; serve the base itself, without LoRA and not in fewer bits"
        )
    return f"{who} is the model that is loaded here: {figures} ({allowed:.4f} at most)"


def _logprobs(model: nn.Module, prompt: list[int], ids: list[int]) -> torch.Tensor:
    """Of every token where `ids` stand after `prompt`, [len(ids), vocabulary]."""
    whole = torch.tensor([prompt + ids], device=device_of(model))
    logits = unwrap(model)(input_ids=whole, use_cache=False, logits_to_keep=len(ids) + 1).logits[0, :-1]
    return logits.double().log_softmax(-1).cpu()
