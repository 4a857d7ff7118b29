"""Stage 1's settings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainSerializer, PlainValidator, model_validator
from transformers import PreTrainedTokenizerBase

from caprese.data_gen.prompts import Encode, encoder
from caprese.data_gen.sources import OWN, PLACES, Source, read_sources
from caprese.errors import CapreseError
from caprese.limits import LONGEST, Count, Some, Temperature

HERE, VLLM = "here", "vllm"
#: stands for the address of an endpoint where that is nobody's business
ENDPOINT = "endpoint"
#: names the key of an endpoint that wants one
KEY = "OPENAI_API_KEY"

Text = Annotated[str, Field(min_length=1, max_length=LONGEST)]


def _facts(sources: Sequence[Source]) -> list[dict[str, Any]]:
    return [one.model_dump(mode="json", exclude_none=True) for one in sources]


def checked_teacher(teacher: str) -> str:
    """Refuse what names no teacher.

    Raises:
        CapreseError: neither a name nor an address, or one that holds a password.
    """
    if teacher not in (HERE, VLLM, ENDPOINT):
        address_of(teacher)
    return teacher


def address_of(url: str) -> str:
    """An endpoint's address as OpenAI's clients take it: with a path, /v1 if none is given.

    Raises:
        CapreseError: it is none, or holds a password.
    """
    if url == ENDPOINT:
        raise CapreseError("samples were drawn from an endpoint whose address was not kept; give one as `teacher`")
    try:
        parts = urlsplit(url)
        fits = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1)
    except ValueError:
        fits = False
    if not fits:
        raise CapreseError(f"teacher {url[:80]!r} is neither here nor vllm nor an address; give http://HOST:PORT/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise CapreseError(f"an endpoint's address holds no name, key or question; set {KEY} where it wants a key")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/') or '/v1'}"


class Samples(BaseModel):
    """Stage 1: what the teacher is asked, and how it answers."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    prompts: Annotated[tuple[Source, ...], PlainValidator(read_sources), PlainSerializer(_facts)] = (
        Source(source="gym:gsm_symbolic"),
    )
    """gym:TASK (reasoning-gym), a .jsonl or .parquet file, a `datasets` name, optionally with :SPLIT, self (prompts
    that the model writes as its user would), or a mixture: gym:gsm_symbolic=0.5,self=0.5."""
    column: str = "prompt"
    """Column of a file or dataset that holds the prompt; "answer", if there, is the reference answer."""
    instruction: str = "Please reason step by step."
    """Put before every prompt but those of `self`."""
    chat_template: bool = True
    """Use the model's chat template if it has one."""
    train: Count = 20_000
    """Samples to distil from."""
    validation: Count = 64
    """Held-out samples that choose ridge and checkpoints."""
    test: Count = 200
    """Held-out samples that only the report sees."""
    max_new_tokens: Annotated[int, Field(ge=2, le=10_000_000)] = 512
    """Length limit of a completion, in tokens."""
    temperature: Temperature = 0.7
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    elsewhere: Some = 60
    """Held-out prompts of other kinds, which come with caprese (60 of them); only the report sees them."""
    self_temperature: Temperature = 1.0
    """At which the model writes the prompts of `self`."""
    self_tokens: Annotated[int, Field(ge=2, le=10_000_000)] = 128
    """Length limit of a prompt of `self`, in tokens; longer ones are dropped."""
    teacher: Annotated[Text, AfterValidator(checked_teacher)] = HERE
    """What draws them: here; vllm, which is started for it where it is installed; or the address of an
    OpenAI-compatible endpoint that serves this base, http://HOST:PORT/v1."""
    teacher_model: Text | None = None
    """Which of the models that an endpoint serves; null: the only one."""
    teacher_concurrency: Annotated[int, Field(ge=1, le=100_000)] = 64
    """Requests to an endpoint that are under way at once."""
    batch_size: Count = 32
    """Sequences generated together."""
    shard_size: Count = 512
    """Samples per file; an interrupted run loses at most one, and what an endpoint has under way."""

    @model_validator(mode="after")
    def _of_an_endpoint(self) -> Samples:
        if self.teacher_model is not None and self.teacher in (HERE, VLLM):
            raise CapreseError("`teacher_model` is of an endpoint; give its address as `teacher`")
        return self

    @property
    def sources(self) -> tuple[Source, ...]:
        """The sources of prompts with all that they leave open, and with shares that add up to 1."""
        total = math.fsum(one.share for one in self.prompts)
        instruction = {one: "" if one.source == OWN else self.instruction for one in self.prompts}
        return tuple(
            Source(
                source=one.source,
                share=round(one.share / total, PLACES),
                column=self.column if one.column is None else one.column,
                instruction=instruction[one] if one.instruction is None else one.instruction,
            )
            for one in self.prompts
        )

    @property
    def facts(self) -> dict[str, Any]:
        """What samples depend on, however it is spelled."""
        places = {"teacher", "teacher_model", "teacher_concurrency"}
        said = self.model_dump(mode="json", exclude={"prompts", "column", "instruction", *places})
        drawn = {} if self.teacher == HERE else {"teacher": ENDPOINT}  # each engine's numbers are its own
        return {**said, **drawn, "sources": _facts(self.sources)}

    def encode(self, tokenizer: PreTrainedTokenizerBase, source: Source | None = None) -> Encode:
        """How prompts of a source, the first if none is given, are asked: text -> token ids."""
        return encoder(tokenizer, (source or self.sources[0]).instruction or "", self.chat_template)
