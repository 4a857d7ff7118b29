"""Text -> token ids, as the model wants to be asked."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedTokenizerBase

from caprese.errors import CapreseError
from caprese.models.families import unwrap


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str, instruction: str, chat_template: bool) -> list[int]:
    """Token ids of "instruction prompt", inside the model's chat template if it has one and it is wanted."""
    content = f"{instruction} {text}".strip()
    if chat_template and tokenizer.chat_template:
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        return tokenizer(rendered, add_special_tokens=False).input_ids
    return tokenizer(content + "\n").input_ids


def check_context(model: nn.Module, texts: Sequence[str], encoded: Sequence[list[int]], max_new_tokens: int) -> None:
    """Every prompt must leave room for its completion.

    Raises:
        CapreseError: naming the first that does not.
    """
    context = getattr(unwrap(model).config, "max_position_embeddings", None)
    for text, ids in zip(texts, encoded, strict=True):
        if context and len(ids) + max_new_tokens > context:
            raise CapreseError(
                f"a prompt of {len(ids)} tokens and {max_new_tokens} new ones exceed the model's context of "
                f"{context} ({text[:40]!r}...); shorten or drop it, or lower max_new_tokens"
            )
