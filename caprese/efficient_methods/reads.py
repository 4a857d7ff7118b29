"""What is still read of an FFN."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol


class Reader(Protocol):
    """As much of a method as is asked what is left to read."""

    def reads(self, reads: Reads) -> Reads: ...


@dataclass(frozen=True)
class Reads:
    """Weights of one FFN that are read for one generated token, on average; packed ones as 16-bit weights, biases not
    counted."""

    gate: float
    up: float
    down: float

    @property
    def total(self) -> int:
        return round(self.gate + self.up + self.down)

    def times(self, factor: float) -> Reads:
        return Reads(self.gate * factor, self.up * factor, self.down * factor)

    def after(self, methods: Iterable[Reader]) -> Reads:
        """What `methods`, in the order in which they act, leave of it."""
        left = self
        for method in methods:
            left = method.reads(left)
        return left
