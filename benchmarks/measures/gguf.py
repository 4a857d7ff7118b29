"""What an exported model is worth in llama.cpp: KL to the dense model's f16 GGUF, and tokens per second.

Everything runs in llama.cpp (`make llama-cpp`, LLAMA_CPP set to its source), prompts too through what is left. KL is
over every token of the dense model's completions. One file after the other is timed, on as many threads as torch has.

Settings of a cell: model; adapter, a directory (null: dense); outtype; samples, a directory with a run's shards;
tokens, that are timed.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

import caprese
from caprese.distill.losses import kl_divergence
from caprese.evaluation import environment
from caprese.exports import dense_ggufs, export
from caprese.studies.engines import Engine
from measures.recovery import read_samples

SPLITS = ("test", "elsewhere")


class Measure:
    """Keeps the dense model's scores."""

    def __init__(self) -> None:
        self.place = tempfile.TemporaryDirectory(prefix="caprese-gguf-")
        self.model: Any = None
        self.texts: dict[str, Any] = {}
        self.dense: dict[str, torch.Tensor] = {}

    def environment(self) -> dict[str, Any]:
        return environment(self.model)

    def __call__(self, cell: dict[str, Any]) -> dict[str, Any]:
        root = Path(self.place.name)
        if self.model is None:
            self.model, self.tokenizer = caprese.load_base(cell["model"], dtype="float32")
            for split in SPLITS:
                rows = read_samples(cell["samples"], split)
                self.texts[split] = [(row.input_ids, row.prompt_length) for row in rows]
            whole = dense_ggufs(self.model, self.tokenizer, ["f16"], root / "dense")["f16"]
            self.dense = {split: self._scores(whole, split) for split in SPLITS}
        path = self._file(cell, root)
        kl = {split: self._kl(path, split) for split in SPLITS}
        engine = Engine(path.name, path, self.texts["test"][0][0], torch.get_num_threads())
        try:
            engine.advance()
            times = [engine.advance() for _ in range(cell["tokens"])]
        finally:
            engine.close()
        size = path.stat().st_size
        path.unlink()
        return {"kl": kl, "ms": statistics.median(times), "bytes": size}

    def _file(self, cell: dict[str, Any], root: Path) -> Path:
        if cell["adapter"] is None:
            return dense_ggufs(self.model, self.tokenizer, [cell["outtype"]], root / "dense")[cell["outtype"]]
        applied = caprese.load(cell["model"], cell["adapter"])
        to = root / "exported"
        facts = export(applied, self.tokenizer, to, format="gguf", outtype=cell["outtype"], overwrite=True)
        return to / facts["gguf"]

    def _scores(self, path: Path, split: str) -> torch.Tensor:
        """Logits [n, V]."""
        root = Path(self.place.name)
        (root / "texts.json").write_text(json.dumps(self.texts[split]))
        script = Path(__file__).with_name("gguf_logits.py")
        command = [sys.executable, str(script), str(path), str(root / "texts.json"), str(root / "scores.npy")]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr.strip().splitlines()[-1])
        return torch.from_numpy(np.load(root / "scores.npy"))

    def _kl(self, path: Path, split: str) -> float:
        student = self._scores(path, split)
        parts = zip(student.split(256), self.dense[split].split(256), strict=True)
        return float(torch.cat([kl_divergence(ours, theirs) for ours, theirs in parts]).mean(dtype=torch.float64))
