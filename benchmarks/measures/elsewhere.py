"""What comes back on prompts like those distilled on, and on others: KL by kind of prompts.

Settings of a cell: model; drawn, the limit of tokens that its samples were drawn with; temperature, of answers;
self_temperature, of the prompts that the model writes; method, as `--method` takes it;
prefill, dense or efficient; gsm and own, training samples of gym:gsm_symbolic and of prompts that the model writes
itself; tokens, of each completion at most; given, how much of a prompt is one (the rest counts as completion); rank;
bias; layerwise, closed or none; ridge; epochs; rate; batch; decay, of weights; calibration, samples that methods choose
from; validation, mixed or gsm; on_policy, tokens that the student says itself from each prompt for one more epoch at
half the rate (0: none; null: that epoch on the same samples).

Samples are drawn once, into out-benchmarks/elsewhere: the first cell takes a while.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

import caprese
from caprese.adapters import fingerprint
from caprese.data_gen import ELSEWHERE, Sample, Samples, complete, interleave, make_samples
from caprese.distill import (
    Branches,
    Checkpoints,
    Distillation,
    EndToEnd,
    HeldOut,
    Layerwise,
    Teacher,
    fit,
    make_batches,
)
from caprese.distill.fit import fit_end_to_end
from caprese.distill.precision import is_quicker, kept_casts, quick_products
from caprese.efficient_methods import calibrate, needs_calibration
from caprese.evaluation import environment, fidelity

DIRECTORY = Path("out-benchmarks/elsewhere")
SOURCES = {"gsm": "gym:gsm_symbolic", "own": "self"}
# How the samples of most cells, and those that all are tested on, are drawn, and how many there are to learn from.
POOL = {"drawn": 56, "self_temperature": 1.0, "temperature": 0.7}
COUNTS = {"gsm": 700, "own": 1300}


def shorter(rows: list[Sample], tokens: int, given: float = 1.0) -> list[Sample]:
    """Samples with their completions cut, and begun where so much of the prompt is given."""
    return [Sample(s.input_ids[: s.prompt_length + tokens], round(given * s.prompt_length), s.prompt, "") for s in rows]


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

    def _draw(self, how: dict[str, Any], counts: dict[str, int], elsewhere: int = 0) -> Any:
        """Samples of each kind by split; the prompts of gsm are the same however they are drawn."""
        name = "-".join(str(how[key]) for key in POOL)
        key = name, *(counts[kind] for kind in SOURCES)
        if key not in self.known:
            made = {}
            for kind, source in SOURCES.items():
                config = Samples(
                    prompts=source,
                    train=counts[kind],
                    validation=12,
                    test=24,
                    max_new_tokens=how["drawn"],
                    temperature=how["temperature"],
                    self_temperature=how["self_temperature"],
                    self_tokens=96,
                    elsewhere=elsewhere if kind == "own" else 0,
                    batch_size=64,
                    shard_size=64,
                )
                model, tokenizer = self.known["model"], self.known["tokenizer"]
                with kept_casts(model, self.known["quick"]):
                    made[kind] = make_samples(model, tokenizer, config, DIRECTORY / name / kind, 0, fingerprint(model))
            self.known[key] = made
        return self.known[key]

    def __call__(self, cell: dict[str, Any]) -> dict[str, Any]:
        self._prepare(cell["model"])
        model, quick = self.known["model"], self.known["quick"]
        pool = self._draw(POOL, COUNTS, elsewhere=60)
        drawn = pool if all(cell[key] == value for key, value in POOL.items()) else self._draw(cell, cell)
        begin = time.perf_counter()
        each = [drawn[kind]["train"][: cell[kind]] for kind in SOURCES]
        train = shorter(interleave(each, [cell[kind] for kind in SOURCES]), cell["tokens"], cell["given"])
        held_out = [
            sample
            for kind in SOURCES
            if cell["validation"] in ("mixed", kind)
            for sample in pool[kind]["validation"][: 6 if cell["validation"] == "mixed" else 12]
        ]
        validation = shorter(held_out, cell["tokens"])
        methods = caprese.resolve_recipe(method=cell["method"]).methods
        calibration = None
        if needs_calibration(methods):
            rows = make_batches(train[: cell["calibration"]], 8)
            calibration = calibrate(model, methods, [batch.whole(cell["prefill"]) for batch in rows])
        applied: Any = caprese.apply(model, methods, calibration=calibration, prefill=cell["prefill"])
        config = Distillation(
            Branches(cell["rank"], bias=cell["bias"]),
            layerwise=Layerwise(how=cell["layerwise"], batch_size=cell["batch"], ridge=cell["ridge"]),
            end_to_end=EndToEnd(
                epochs=cell["epochs"],
                learning_rate=cell["rate"],
                batch_size=cell["batch"],
                micro_batch=cell["batch"],
                weight_decay=cell["decay"],
            ),
        )
        try:
            with quick_products(model, quick):
                fitted = fit(applied, train, validation, config)
            applied = fitted.model
            if cell["on_policy"] != 0:
                self._go_on(applied, train, validation, config, fitted.kl["end_to_end"], cell)
            row: dict[str, Any] = {
                "samples": len(train),
                "distilled_in": round(time.perf_counter() - begin),
                "held_out": fitted.kl,
            }
            row["ranks"] = fitted.ranks
            tests = {**{kind: pool[kind]["test"] for kind in SOURCES}, ELSEWHERE: pool["own"][ELSEWHERE]}
            for kind, samples in tests.items():
                batches = make_batches(samples, 8, first=cell["prefill"] == "efficient")
                figures = fidelity(applied, batches, ("efficient", "recovered"))
                kl = {name: found["kl"] for name, found in figures.items()}
                row[kind] = {**kl, "recovered_fraction": 1 - kl["recovered"] / kl["efficient"]}
        finally:
            caprese.remove(applied)
        return row

    def _go_on(
        self,
        applied: Any,
        train: list[Sample],
        validation: list[Sample],
        config: Distillation,
        start: float,
        cell: dict[str, Any],
    ) -> None:
        """One more epoch at half the rate, on what the student says to the same prompts, or on the same samples."""
        if cell["on_policy"]:
            sampling = Samples(max_new_tokens=cell["on_policy"], batch_size=64)
            with torch.no_grad():
                said = complete(applied, self.known["tokenizer"], [s.prompt_ids for s in train], sampling, 1)
            train = [
                Sample(s.prompt_ids + new, s.prompt_length, s.prompt, "") for s, new in zip(train, said, strict=True)
            ]
        more = config.end_to_end.model_copy(update={"epochs": 1, "learning_rate": cell["rate"] / 2})
        with quick_products(applied, self.known["quick"]):
            efficient = cell["prefill"] == "efficient"
            batches = make_batches(train, cell["batch"], efficient, efficient)
            teacher = Teacher(applied, batches, more.cache_gigabytes)
            held_out = HeldOut(applied, make_batches(validation, cell["batch"], efficient), more.cache_gigabytes)
            fit_end_to_end(applied, teacher, held_out, more, start, Checkpoints(1))
