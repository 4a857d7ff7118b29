"""What comes back on prompts like those distilled on, and on others: KL by kind of prompts.

Settings of a cell: model; drawn, the limit of tokens that its samples were drawn with; method, as `--method` takes it;
prefill, dense or efficient; gsm and own, training samples of gym:gsm_symbolic and of prompts that the model writes
itself; tokens, of each completion at most; rank; bias; layerwise, closed or none; epochs; rate; batch; decay, of
weights; calibration, samples that methods choose from; validation, mixed or gsm.

Samples are drawn once, into out-benchmarks/elsewhere: the first cell of a limit takes a while.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import caprese
from caprese.adapters import fingerprint
from caprese.data_gen import ELSEWHERE, Sample, Samples, interleave, make_samples
from caprese.distill import Branches, Distillation, EndToEnd, Layerwise, fit, make_batches
from caprese.distill.precision import is_quicker, kept_casts, quick_products
from caprese.efficient_methods import calibrate, needs_calibration
from caprese.evaluation import environment, fidelity

DIRECTORY = Path("out-benchmarks/elsewhere")
SOURCES = {"gsm": "gym:gsm_symbolic", "own": "self"}
COUNTS = {56: {"gsm": 700, "own": 1300}, 128: {"gsm": 228, "own": 256}}


def shorter(rows: list[Sample], tokens: int) -> list[Sample]:
    """Samples with their completions cut."""
    return [Sample(s.input_ids[: s.prompt_length + tokens], s.prompt_length, s.prompt, "") for s in rows]


class Measure:
    """Holds one model and its samples, and takes cells one by one."""

    def __init__(self) -> None:
        self.known: dict[str, Any] = {}

    def environment(self) -> dict[str, Any]:
        """What the figures are measured on."""
        return environment(self.known["model"])

    def _prepare(self, name: str) -> None:
        if not self.known:
            model, tokenizer = caprese.load_base(name)
            self.known |= {"model": model, "tokenizer": tokenizer, "quick": is_quicker(model)}

    def _draw(self, limit: int) -> dict[str, dict[str, list[Sample]]]:
        """Samples of each kind, and of `elsewhere`, by split."""
        if limit in self.known:
            return self.known[limit]
        model, made = self.known["model"], {}
        for kind, source in SOURCES.items():
            config = Samples(
                prompts=source,
                train=COUNTS[limit][kind],
                validation=12,
                test=24,
                max_new_tokens=limit,
                self_tokens=96,
                elsewhere=60 if kind == "own" else 0,
                batch_size=64,
                shard_size=64,
            )
            with kept_casts(model, self.known["quick"]):
                made[kind] = make_samples(
                    model, self.known["tokenizer"], config, DIRECTORY / str(limit) / kind, 0, fingerprint(model)
                )
        made[ELSEWHERE] = {"test": made["own"].pop(ELSEWHERE)}
        self.known[limit] = made
        return made

    def __call__(self, cell: dict[str, Any]) -> dict[str, Any]:
        self._prepare(cell["model"])
        model, quick = self.known["model"], self.known["quick"]
        drawn = self._draw(cell["drawn"])
        begin = time.perf_counter()
        each = [drawn[kind]["train"][: cell[kind]] for kind in SOURCES]
        train = shorter(interleave([rows for rows in each if rows]), cell["tokens"])
        validation = shorter(
            [
                sample
                for kind in SOURCES
                if cell["validation"] in ("mixed", kind)
                for sample in drawn[kind]["validation"][: 6 if cell["validation"] == "mixed" else 12]
            ],
            cell["tokens"],
        )
        methods = caprese.resolve_recipe(method=cell["method"]).methods
        calibration = None
        if needs_calibration(methods):
            rows = make_batches(train[: cell["calibration"]], 8)
            calibration = calibrate(model, methods, [batch.whole(cell["prefill"]) for batch in rows])
        applied: Any = caprese.apply(model, methods, calibration=calibration, prefill=cell["prefill"])
        try:
            config = Distillation(
                Branches(cell["rank"], bias=cell["bias"]),
                layerwise=Layerwise(how=cell["layerwise"], batch_size=8),
                end_to_end=EndToEnd(
                    epochs=cell["epochs"],
                    learning_rate=cell["rate"],
                    batch_size=cell["batch"],
                    micro_batch=cell["batch"],
                    weight_decay=cell["decay"],
                ),
            )
            with quick_products(model, quick):
                fitted = fit(applied, train, validation, config)
            applied = fitted.model
            row: dict[str, Any] = {"distilled_in": round(time.perf_counter() - begin), "held_out": fitted.kl}
            for kind, splits in drawn.items():
                batches = make_batches(splits["test"], 8, first=cell["prefill"] == "efficient")
                figures = fidelity(applied, batches, ("efficient", "recovered"))
                kl = {name: found["kl"] for name, found in figures.items()}
                row[kind] = {**kl, "recovered_fraction": 1 - kl["recovered"] / kl["efficient"]}
        finally:
            caprese.remove(applied)
        return row
