"""Stage 4's settings."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from caprese.limits import Count, Some


class Evaluation(BaseModel):
    """Stage 4: what is measured on held-out prompts."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    generate: bool = True
    """Let efficient and recovered answer the test prompts too: accuracy and length in free generation."""
    latency_tokens: Some = 64
    """Tokens over which TTNT is measured, variants interleaved; 0 skips it."""
    examples: Some = 6
    """Completions shown side by side in the report."""
    batch_size: Count = 16
    """Sequences in one forward pass."""
