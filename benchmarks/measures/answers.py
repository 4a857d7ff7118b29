"""What finished adapters answer beside the dense model, by the steps of a problem.

Settings of a cell: model; problems, of chains:test; adapter, a directory, or null for the dense model.
"""

from __future__ import annotations

from typing import Any

import caprese
from caprese.evaluation import environment
from measures.recovery import Answers


class Measure:
    """Holds one model and its problems."""

    def __init__(self) -> None:
        self.model: Any = None

    def environment(self) -> dict[str, Any]:
        return environment(self.model)

    def __call__(self, cell: dict[str, Any]) -> dict[str, Any]:
        if self.model is None:
            self.model, tokenizer = caprese.load_base(cell["model"])
            self.answers = Answers(tokenizer, cell["problems"])
        if cell["adapter"] is None:
            return {"answers": self.answers.of(self.model)}
        model: Any = caprese.load(self.model, cell["adapter"])
        try:
            return {"answers": self.answers.of(model)}
        finally:
            caprese.remove(model)
