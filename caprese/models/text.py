"""Text -> token ids, as the model wants to be asked."""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from caprese.errors import CapreseError
from caprese.models.families import unwrap


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    instruction: str,
    chat_template: bool,
    today: datetime.date | None = None,
) -> list[int]:
    """Token ids of "instruction prompt", inside the model's chat template if it has one and it is wanted.

    They never end with what the tokenizer puts behind a text, such as end of text; what it puts before stays. `today`
    is the day that a template names, the clock's if it is None.

    Raises:
        CapreseError: a chat template that does not take one plain user message, or text that is none.
    """
    content = f"{instruction} {text}".strip()
    if bad := broken(content):
        raise CapreseError(f"the prompt {content[:40]!a} holds {bad}; it is no valid text")
    if chat_template and tokenizer.chat_template:
        ids: list[int] = tokenizer(rendered_prompt(tokenizer, content, today), add_special_tokens=False).input_ids
    else:
        ids = encode_text(tokenizer, content + "\n")
    if not ids:
        raise CapreseError(f"the tokenizer has no token for anything in {content[:40]!r}; drop that prompt")
    return ids


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text that is to go on: with what the tokenizer puts before it, without what it puts behind."""
    ids: list[int] = tokenizer(text).input_ids
    return ids[: len(ids) - len(ending(tokenizer, text))]


def ending(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The token ids that the tokenizer puts behind a text of its own accord: end of text, a separator, or none."""
    ids, plain = tokenizer(text).input_ids, tokenizer(text, add_special_tokens=False).input_ids
    for end in range(len(plain), len(ids) + 1):
        if plain and ids[end - len(plain) : end] == plain:
            return list(ids[end:])
    return []


def broken(text: str) -> str | None:
    """What keeps a string from being text, in words; None if nothing does."""
    found = re.search("[\ud800-\udfff]", text)
    return None if found is None else f"half of a character ({found[0]!a}, a lone surrogate)"


def rendered_prompt(tokenizer: PreTrainedTokenizerBase, content: str, today: datetime.date | None = None) -> str:
    """One user message in the chat template, which may want its content as text or as a list of parts.

    Raises:
        CapreseError: a chat template that does not take one.
    """
    said = None
    date: dict[str, Any] = {}
    known = tokenizer.chat_template
    if today is not None and isinstance(known, str):
        day = f"{today:%d %b %Y}"  # no function can be handed in, but a template can begin with one of its own
        clock = f"{{%- macro strftime_now(format) -%}}{day}{{%- endmacro -%}}"
        date = {"date_string": day, "chat_template": clock + known if "strftime_now" in known else known}
    form: Any  # transformers' type hints know text alone
    for form in (content, [{"type": "text", "text": content}]):
        try:
            rendered = tokenizer.apply_chat_template(
                [{"role": "user", "content": form}], tokenize=False, add_generation_prompt=True, **date
            )
        except Exception as error:  # a template is a program of its own, and raises what it likes
            said = said or f"it says {(' '.join(str(error).split()) or type(error).__name__)[:200]!r}"
            continue
        if isinstance(rendered, str) and _holds(rendered, content):
            return rendered
    template, name = tokenizer.chat_template, tokenizer.name_or_path or type(tokenizer).__name__
    if isinstance(template, dict) and "default" not in template:
        said = f"there are {', '.join(map(repr, sorted(template)))}, and none is 'default'"
    raise CapreseError(
        f"the chat template of {name!r} does not take one user message: {said or 'it leaves out what the user says'}; "
        "mend or delete the tokenizer's chat template"
    )


def _holds(rendered: str, content: str) -> bool:
    """Whether all words and signs of a message are there, in their order; white space and escapes may differ."""
    at = 0
    for word in re.findall(r"\w+|[^\w\s]", content):
        at = rendered.find(word, at)
        if at < 0:
            return False
        at += len(word)
    return True


def context_of(model: nn.Module) -> int | None:
    """How many tokens a model takes; None where its config names no limit."""
    found: int | None = getattr(unwrap(model).config, "max_position_embeddings", None)
    return found or None


def check_context(
    model: nn.Module, texts: Sequence[str], encoded: Sequence[Sequence[int]], max_new_tokens: int
) -> None:
    """Every prompt must leave room for its completion.

    Raises:
        CapreseError: naming the first that does not.
    """
    context = context_of(model)
    for text, ids in zip(texts, encoded, strict=True):
        if context and len(ids) + max_new_tokens > context:
            raise CapreseError(
                f"a prompt of {len(ids)} tokens and {max_new_tokens} new ones exceed the model's context of "
                f"{context} ({text[:40]!r}...); shorten or drop it, or lower max_new_tokens"
            )
