"""What an exported checkpoint in few bits is worth: KL to the dense model in float32, and its size.

In plain transformers with compressed-tensors, in float32 but for what the checkpoint itself rounds: weights, and in
w8a8 and fp8 the linear layers' inputs; prompts too run through what is left. KL is over every token of the dense
model's completions.

Settings of a cell: model; adapter, a directory (null: dense); outtype (bfloat16 keeps all its bits); samples, a
directory with a run's shards; rows, the first so many of each kind (null: all).
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import caprese
from caprese.distill.losses import kl_divergence
from caprese.evaluation import environment
from caprese.exports import dense_checkpoints, export
from measures.recovery import read_samples

SPLITS = ("test", "elsewhere")


class Measure:
    """Keeps the dense model's scores."""

    def __init__(self) -> None:
        self.model: Any = None
        self.samples: dict[str, Any] = {}
        self.dense: dict[str, list[torch.Tensor]] = {}

    def environment(self) -> dict[str, Any]:
        return environment(self.model)

    def __call__(self, cell: dict[str, Any]) -> dict[str, Any]:
        if self.model is None:
            self.model, self.tokenizer = caprese.load_base(cell["model"], dtype="float32")
            self.samples = {split: read_samples(cell["samples"], split)[: cell["rows"]] for split in SPLITS}
            self.dense = {split: self._scores(self.model, split) for split in SPLITS}
        with tempfile.TemporaryDirectory(prefix="caprese-compressed-") as place:
            path = self._checkpoint(cell, Path(place))
            size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
            student = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
            return {"kl": {split: self._kl(student, split) for split in SPLITS}, "bytes": size}

    def _checkpoint(self, cell: dict[str, Any], place: Path) -> Path:
        kind = cell["outtype"]
        if cell["adapter"] is None:
            return dense_checkpoints(self.model, [kind], place)[kind]
        applied = caprese.load(cell["model"], cell["adapter"])
        outtype = None if kind == "bfloat16" else kind
        export(applied, self.tokenizer, place / "exported", dtype=torch.bfloat16, outtype=outtype)
        return place / "exported"

    @torch.no_grad()
    def _scores(self, model: Any, split: str) -> list[torch.Tensor]:
        """Logits of each completion's tokens [n, V]."""
        rows = self.samples[split]
        logits = (model(torch.tensor([row.input_ids])).logits[0] for row in rows)
        return [each[row.prompt_length - 1 : -1] for each, row in zip(logits, rows, strict=True)]

    def _kl(self, student: Any, split: str) -> float:
        parts = zip(self._scores(student, split), self.dense[split], strict=True)
        return float(torch.cat([kl_divergence(ours, theirs) for ours, theirs in parts]).mean(dtype=torch.float64))
