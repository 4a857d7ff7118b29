"""Speculative decoding in other engines: an exported draft, or the model in fewer bits, drafts for the dense model.

Each engine's own server runs on loopback, the dense model alone first, then with the draft; both write the same texts.

Settings of a cell: model; engine, llama.cpp or vllm; target, the dense model's type there; draft, lookup, dense (in
another type) or an adapter's directory, exported; outtype, of the draft; tokens, drafted a round; prompts, as a recipe
names them, null for everyday language; count, of prompts; new_tokens; quick, without vLLM's compiler.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

import caprese
from caprese.evaluation import environment
from caprese.exports import dense_checkpoints, dense_ggufs, export
from caprese.studies.prompts import some_prompts
from measures.served import Text, serve


class Measure:
    """Keeps the dense model, what it was written as, and its texts."""

    def __init__(self) -> None:
        self.place = tempfile.TemporaryDirectory(prefix="caprese-speculation-")
        self.model: Any = None
        self.paths: dict[tuple[str, ...], Path] = {}
        self.texts: dict[tuple[Any, ...], list[Text]] = {}

    def environment(self) -> dict[str, Any]:
        return environment(self.model)

    def __call__(self, cell: dict[str, Any]) -> dict[str, Any]:
        if self.model is None:
            self.model, self.tokenizer = caprese.load_base(cell["model"], dtype="float32")
        asked = cell["prompts"], cell["count"], cell["new_tokens"]
        prompts = some_prompts(asked[0], asked[1], self.model, self.tokenizer, asked[2])
        target = self.dense(cell["engine"], cell["target"])
        alone = (cell["engine"], cell["target"], cell["quick"], *asked)
        if alone not in self.texts:
            self.texts[alone] = self._texts(cell, prompts, target, None)
        draft: Path | str = cell["draft"]
        if draft == "dense":
            draft = self.dense(cell["engine"], cell["outtype"])
        elif draft != "lookup":
            draft = self.exported(cell["engine"], cell["draft"], cell["outtype"])
        return compared(self.texts[alone], self._texts(cell, prompts, target, draft))

    def _texts(self, cell: dict[str, Any], prompts: list[list[int]], target: Path, draft: Path | str | None) -> Any:
        with serve(cell["engine"], target, draft, cell["tokens"], cell["quick"]) as server:
            server.write(prompts[0], cell["new_tokens"])
            return [server.write(prompt, cell["new_tokens"]) for prompt in prompts]

    def dense(self, engine: str, kind: str) -> Path:
        """The dense model as an engine reads it, in a type."""
        if (engine, kind) not in self.paths:
            root = Path(self.place.name) / f"{engine}-{kind}"
            if engine == "vllm":
                path = dense_checkpoints(self.model, [kind], root)[kind]
                self.tokenizer.save_pretrained(path)
            else:
                path = dense_ggufs(self.model, self.tokenizer, [kind], root)[kind]
            self.paths[engine, kind] = path
        return self.paths[engine, kind]

    def exported(self, engine: str, adapter: str, kind: str) -> Path:
        """An adapter's model as an engine reads it, in a type."""
        if (engine, adapter, kind) not in self.paths:
            to = Path(self.place.name) / f"{engine}-{len(self.paths)}"
            how: dict[str, Any] = {"outtype": None if kind == "bfloat16" else kind}
            how |= {"format": "gguf"} if engine == "llama.cpp" else {"dtype": torch.bfloat16}
            applied = caprese.load(self.model, adapter)
            try:
                facts = export(applied, self.tokenizer, to, **how)
            finally:
                caprese.remove(applied)
            self.paths[engine, adapter, kind] = to / facts["gguf"] if engine == "llama.cpp" else to
        return self.paths[engine, adapter, kind]


def compared(dense: list[Text], ours: list[Text]) -> dict[str, Any]:
    """Texts written with drafts beside those without: {"identical" texts, "dense_ms" and "ms" a token, "speed_up",
    "acceptance", "tokens_per_round"}."""
    drafted, accepted = sum(text.drafted for text in ours), sum(text.accepted for text in ours)
    written = sum(len(text.ids) - 1 for text in ours)
    ms = [sum(text.ms_per_token for text in texts) / len(texts) for texts in (dense, ours)]
    return {
        "identical": sum(a.ids == b.ids for a, b in zip(dense, ours, strict=True)),
        "dense_ms": ms[0],
        "ms": ms[1],
        "speed_up": ms[0] / ms[1],
        "acceptance": accepted / drafted if drafted else None,
        "tokens_per_round": written / max(1, written - accepted),
    }
