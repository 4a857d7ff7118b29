"""How the cells of an experiment are measured: one file a kind, each with a `Measure`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from caprese.evaluation import environment


class Once:
    """What several cells share is made once: "model", with its tokenizer, and what was drawn from it."""

    def __init__(self) -> None:
        self.known: dict[str, Any] = {}

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` gave when it was first asked for by this name."""
        if name not in self.known:
            self.known[name] = make()
        return self.known[name]

    def environment(self) -> dict[str, Any]:
        """What the figures are measured on."""
        return environment(self.known["model"][0])
