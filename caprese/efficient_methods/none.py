"""Nothing is taken away: the adapter alone, on the dense model."""

from __future__ import annotations

from typing import ClassVar

from caprese.efficient_methods.base import Method


class Nothing(Method):
    """The dense FFN, with a slot for an adapter."""

    name: ClassVar[str] = "none"
    summary: ClassVar[str] = "nothing is taken away; an adapter on the dense model"
