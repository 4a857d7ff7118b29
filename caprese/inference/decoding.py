"""Text from the decode loop as it comes, with its timing."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import TextStreamer

from caprese.inference.generate import clock, ends_of, generate
from caprese.inference.lossless import Lossless, Rule
from caprese.inference.sampling import Sampler, greedy
from caprese.models import check_context, device_of, encode_prompt
from caprese.progress import say


class _Text(TextStreamer):
    """Tokens -> text as soon as its words are whole."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, emit: Callable[[str], None] | None) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        self.emit = emit
        self.text = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        if self.emit is not None:
            self.emit(text)


def stream(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    sampler: Sampler = greedy,
    *,
    instruction: str = "",
    max_new_tokens: int = 256,
    emit: Callable[[str], None] | None = None,
    lossless: tuple[Lossless, Rule] | None = None,
) -> dict[str, Any]:
    """Generate from one prompt.

    Args:
        lossless: draft and verify so, in place of `sampler`.

    Returns: {"text", "new_tokens", "first_token_ms", "ttnt_ms"}; ttnt_ms is the median, None for a single token. With
        `lossless`, whose tokens come several at once, the mean, and "acceptance" (of drafted tokens, None where none
        was), "tokens_per_round".

    Raises:
        CapreseError: a prompt that does not fit the model's context.
    """
    encoded = [encode_prompt(tokenizer, prompt, instruction, True)]
    check_context(model, [prompt], encoded, max_new_tokens)
    unknown = tokenizer.unk_token_id
    if unknown in encoded[0] and unknown not in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        say(("this model has no token for some of the prompt's characters; it reads them as unknown", "yellow"))
    device = device_of(model)
    text = _Text(tokenizer, emit)
    ends = ends_of(model, tokenizer)
    if lossless is None:
        steps = generate(model, encoded, max_new_tokens, sampler, ends=ends)
    else:
        ids = torch.tensor(encoded, device=device)
        pair, rule = lossless
        steps = pair.decode(model, (ids, None), max_new_tokens, rule, lambda _, tokens: tokens[-1] in ends)
    moments = [clock(device)]
    for new in steps:
        moments.append(new.moment)
        text.put(new.ids)
    text.end()
    first, *gaps = (1000 * (b - a) for a, b in itertools.pairwise(moments))
    middle = statistics.median if lossless is None else statistics.mean
    result = {
        "text": text.text,
        "new_tokens": len(moments) - 1,
        "first_token_ms": first,
        "ttnt_ms": middle(gaps) if gaps else None,
    }
    return result if lossless is None else {**result, **lossless[0].tally.figures()}
