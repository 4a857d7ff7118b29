"""Settings that several methods have, and what they may be."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator

from caprese.errors import CapreseError

#: how prompts run: as in the dense model; through what is left, as an exported checkpoint runs them; or through all
#: neurons that are not removed for good, in the bits that methods store, for which no dense copy is needed
Prefill = Literal["dense", "efficient", "stored"]


def check_reselect(every: int | None) -> int | None:
    """`every` itself, if generated tokens can be counted by it.

    Raises:
        CapreseError: no such number.
    """
    if every is not None and (not isinstance(every, int) or isinstance(every, bool) or every < 1):
        raise CapreseError(f"reselect_every {every!r}: use a number of tokens from 1, or none")
    return every


def check_sparsity(value: Any) -> float | list[float]:
    """A number in (0, 1), or a list of them."""
    each = value if isinstance(value, list) else [value]
    if not each:
        raise ValueError("a list needs one sparsity for each layer")
    for number in each:
        if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number < 1:
            raise ValueError("input should be greater than 0 and less than 1")
    return [float(number) for number in each] if isinstance(value, list) else float(value)


Layers = Literal["all", "first-half"] | list[Annotated[int, Field(strict=True)]]
Sparsity = Annotated[float | list[float], PlainValidator(check_sparsity)]
