"""Stage 4's settings."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class Evaluation(BaseModel):
    """Stage 4: what is measured on held-out prompts."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    generate: bool = True
    """Let efficient and recovered answer the test prompts too: accuracy and length in free generation."""
    latency_tokens: Annotated[int, Field(ge=0)] = 64
    """Tokens over which TTNT is measured, variants interleaved; 0 skips it."""
    examples: Annotated[int, Field(ge=0)] = 6
    """Completions shown side by side in the report."""
    batch_size: Annotated[int, Field(ge=1)] = 16
    """Sequences in one forward pass."""
