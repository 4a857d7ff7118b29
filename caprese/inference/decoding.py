"""Text from the decode loop as it comes, with its timing."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import TextStreamer

from caprese.inference.generate import clock, ends_of, generate
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
) -> dict[str, Any]:
    """Generate from one prompt.

    Returns: {"text", "new_tokens", "first_token_ms", "ttnt_ms"}; ttnt_ms is the median, None for a single token.

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
    moments = [clock(device)]
    for new in generate(model, encoded, max_new_tokens, sampler, ends=ends_of(model, tokenizer)):
        moments.append(new.moment)
        text.put(new.ids)
    text.end()
    first, *gaps = (1000 * (b - a) for a, b in itertools.pairwise(moments))
    return {
        "text": text.text,
        "new_tokens": len(moments) - 1,
        "first_token_ms": first,
        "ttnt_ms": statistics.median(gaps) if gaps else None,
    }
