"""Answering one prompt as it comes, with its timing."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import TextStreamer

from caprese.models import check_context, device_of, encode_prompt
from caprese.models.cache import roomy_cache
from caprese.progress import say


class _Timed(TextStreamer):
    """Text to `emit`, and the moment each token came."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, emit: Callable[[str], None] | None) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.emit = emit
        self.moments: list[float] = []
        self.text = ""

    def put(self, value: torch.Tensor) -> None:
        if not (self.skip_prompt and self.next_tokens_are_prompt):
            self.moments.append(time.perf_counter())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        if self.emit is not None:
            self.emit(text)


@torch.no_grad()
def stream(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    instruction: str = "",
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    emit: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Generate from one prompt.

    Returns: {"text", "new_tokens", "first_token_ms", "ttnt_ms"}; ttnt_ms is the median, None for a single token.
    """
    encoded = [encode_prompt(tokenizer, prompt, instruction, True)]
    check_context(model, [prompt], encoded, max_new_tokens)
    unknown = tokenizer.unk_token_id
    if unknown in encoded[0] and unknown not in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        say(("this model has no token for some of the prompt's characters; it reads them as unknown", "yellow"))
    ids = torch.tensor(encoded, device=device_of(model))
    streamer = _Timed(tokenizer, emit)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}
    torch.manual_seed(seed)
    begin = time.perf_counter()
    model.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=roomy_cache(model),
        max_new_tokens=max_new_tokens,
        streamer=streamer,
        pad_token_id=tokenizer.pad_token_id,
        **sampling,
    )
    gaps = [1000 * (b - a) for a, b in zip(streamer.moments, streamer.moments[1:], strict=False)]
    return {
        "text": streamer.text,
        "new_tokens": len(streamer.moments),
        "first_token_ms": 1000 * (streamer.moments[0] - begin),
        "ttnt_ms": statistics.median(gaps) if gaps else None,
    }
