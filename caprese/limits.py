"""What a setting may be: far beyond all use, and small enough that nothing hangs before it is refused."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

Count = Annotated[int, Field(ge=1, le=100_000_000)]
"""Of samples, tokens, steps or rows, at least one."""
Some = Annotated[int, Field(ge=0, le=100_000_000)]
"""The same, or none."""
Rate = Annotated[float, Field(gt=0, le=1e38, allow_inf_nan=False)]
"""A learning rate that float32 holds; one that is too high shows in the loss."""
Temperature = Annotated[float, Field(ge=1e-4, le=100, allow_inf_nan=False)]
"""Of sampling; below it is greedy, and divides by what is all but 0."""
Amount = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]
"""Anything else that is not below 0."""
Seed = Annotated[int, Field(ge=0, lt=2**32)]
LONGEST = 4096
"""Characters of a text in a setting."""
