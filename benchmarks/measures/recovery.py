"""What a method costs, and what each part of the distillation gives back; LoRA of equal size in the branch's place.

Settings of a cell: model; samples, a directory with a run's shards; method, as `--method` takes it; count, training
samples; test, test samples; problems, of chains:test, whose answers are marked (0: none); rank (0: no adapter);
adapter, branch, lora, lora:PART,... or branch+lora (of rank 1, the branch so much smaller); bias, of the branch; batch;
rate; epochs; objective, kl, hidden or on_policy; layerwise, closed or none; rounds; reselect_every, in training and
answers; then_reselect, in one more measurement.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import caprese
from caprese.adapters import branch_parameters
from caprese.data_gen import Sample, Samples, complete, load_prompts, read_shard
from caprese.distill import Branches, Checkpoints, EndToEnd, HeldOut, Layerwise, Teacher, make_batches
from caprese.distill.fit import fit_end_to_end, fit_layers
from caprese.efficient_methods import applied_ffns, calibrate, needs_calibration, reselection
from caprese.evaluation import fidelity
from caprese.evaluation.accuracy import Marker
from caprese.evaluation.estimators import interval
from caprese.models import count_parameters, encode_prompt
from measures import Once
from measures.lora import PARTS, LoraFFN, lora_size


def read_samples(directory: str, split: str) -> list[Sample]:
    """A split of a finished run's samples."""
    found = [s for path in sorted(Path(directory).glob(f"{split}-*.parquet")) for s in read_shard(path)]
    if not found:
        raise SystemExit(f"no {split} samples in {directory}; the experiment says which run makes them")
    return found


class Answers:
    """Problems of a kind's test split, and how a model answers them."""

    def __init__(self, tokenizer: Any, count: int, kind: str = "chains") -> None:
        self.tokenizer = tokenizer
        self.problems = load_prompts(f"{kind}:test", count, 1)
        self.markers = [Marker(problem) for problem in self.problems]
        self.encoded = [encode_prompt(tokenizer, problem.text, "", True) for problem in self.problems]
        self.sampling = Samples(max_new_tokens=220 if kind == "chains" else 1600, batch_size=100)

    def of(self, model: nn.Module) -> dict[str, Any]:
        """Accuracy with a 95% interval, by number of steps, and the length of the answers."""
        drawn = complete(model, self.tokenizer, self.encoded, self.sampling, "test")
        texts = self.tokenizer.batch_decode(drawn, skip_special_tokens=True)
        right = [float(mark(text)[1]) for mark, text in zip(self.markers, texts, strict=True)]
        steps: dict[str, list[float]] = {}
        for problem, mark in zip(self.problems, right, strict=True):
            steps.setdefault(str(sum(problem.text.count(sign) for sign in "+-*")), []).append(mark)
        return {
            "accuracy": sum(right) / len(right),
            "interval": interval(right),
            "by_steps": {n: sum(marks) / len(marks) for n, marks in sorted(steps.items())},
            "new_tokens": sum(map(len, drawn)) / len(drawn),
        }


class Measure(Once):
    """Holds one model, its samples and its problems, and takes cells one by one."""

    def __call__(self, cell: dict[str, Any]) -> dict[str, Any]:
        model, tokenizer = self.once("model", lambda: caprese.load_base(cell["model"]))
        train, validation, test = (
            self.once(split, lambda split=split: read_samples(cell["samples"], split))
            for split in ("train", "validation", "test")
        )
        answers = self.once("answers", lambda: Answers(tokenizer, cell["problems"])) if cell["problems"] else None
        methods = caprese.resolve_recipe(method=cell["method"]).methods
        train = train[: cell["count"]]
        calibration = None
        if needs_calibration(methods):
            calibration = calibrate(model, methods, [batch.whole() for batch in make_batches(train[:64], 8)])
        applied: Any = caprese.apply(model, methods, calibration=calibration, reselect_every=cell["reselect_every"])
        row: dict[str, Any] = {"sparsity": getattr(methods[0], "sparsity", None)}

        def figures(of: nn.Module) -> dict[str, Any]:
            found: dict[str, Any] = dict(
                fidelity(of, make_batches(test[: cell["test"]], 8), ("recovered",))["recovered"]
            )
            return found | (answers.of(of) if answers else {})

        try:
            row["efficient"] = figures(applied)
            if cell["rank"]:
                applied = self._distil(applied, cell, train, validation, figures, row)
                row["added"] = sum(p.numel() for p in branch_parameters(applied)) / count_parameters(model)
                if cell["then_reselect"]:
                    with reselection(applied, cell["then_reselect"]):
                        row["reselection"] = figures(applied)
            if answers:
                with caprese.dense(applied):
                    row["dense"] = self.once("dense", lambda: answers.of(applied))
        finally:
            caprese.remove(applied)
        return row

    def _distil(
        self, model: Any, cell: dict[str, Any], train: list[Sample], validation: list[Sample], figures: Any, row: Any
    ) -> Any:
        batch = cell["batch"]
        held_out = HeldOut(model, make_batches(validation, batch), 1.0)
        row["kl"] = {"efficient": held_out.kl()}
        adapters = {word.partition(":")[0]: word.partition(":")[2] for word in cell["adapter"].split("+")}
        parts = tuple(adapters["lora"].split(",")) if adapters.get("lora") else PARTS
        view, rank = next(iter(applied_ffns(model).values())).view, cell["rank"]
        size = 2 * rank * view.hidden_size
        if len(adapters) == 2:
            size = lora_size(view, 1, parts)
            rank -= round(size / (2 * view.hidden_size))
        if "branch" in adapters:
            how = Layerwise(how=cell["layerwise"], batch_size=batch)
            teacher = Teacher(model, make_batches(train, batch), 1.0)
            model, facts = fit_layers(model, teacher, held_out, Branches(rank, bias=cell["bias"]), how)
            row["kl"] |= {"layerwise": facts["kl"]["layerwise"]}
            row["layerwise"] = figures(model) | {"kept": facts["kl"]["layerwise"] < facts["kl"]["efficient"]}
        if "lora" in adapters:
            torch.manual_seed(0)
            fits = max(1, round(size / lora_size(view, 1, parts)))
            for wrapper in applied_ffns(model).values():
                wrapper.transformed = LoraFFN(wrapper.transformed, fits, parts)
        best = min(row["kl"].values())
        for passed in range(cell["epochs"] if cell["objective"] == "on_policy" else 1):
            if passed:
                train = self._said(model, train, passed)
            config = EndToEnd(
                objective="kl" if cell["objective"] == "on_policy" else cell["objective"],
                learning_rate=cell["rate"],
                epochs=1 if cell["objective"] == "on_policy" else cell["epochs"],
                batch_size=batch,
                micro_batch=batch,
                rounds=cell["rounds"],
            )
            run = Checkpoints(passed)
            teacher = Teacher(model, make_batches(train, batch), 1.0)
            best = fit_end_to_end(model, teacher, held_out, config, best, run).best
        row["end_to_end"] = figures(model) | {"kept": best < min(row["kl"].values())}
        row["kl"]["end_to_end"] = best
        return model

    def _said(self, model: nn.Module, samples: Sequence[Sample], seed: int) -> list[Sample]:
        """What the student itself says, as the teacher would have gone on from there."""
        tokenizer = self.known["model"][1]
        sampling = Samples(max_new_tokens=220, batch_size=100)
        drawn = complete(model, tokenizer, [s.prompt_ids for s in samples], sampling, seed)
        pairs = zip(samples, drawn, strict=True)
        return [Sample(s.prompt_ids + new, s.prompt_length, s.prompt, "", s.answer) for s, new in pairs]
