"""What a method costs a reasoner in accuracy, and what gives it back: the paper's tables on a small scale.

    caprese recover --model reasoner-tiny        makes the samples
    python benchmarks/reasoner.py methods        or any other table of TABLES
    python benchmarks/reasoner.py --adapters out-reasoner-mamba out-reasoner-pure --output OUT.json
                                                 what finished adapters answer, by steps

Every cell applies a method to reasoner-tiny, distils an adapter, and lets dense, efficient and every stage answer test
problems that neither the model nor the adapter was trained on. Reselection is in training and in the answers, every so
many tokens as the cell says. Finished cells are read back from the output, so an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from methods import LoraFFN
from torch import nn

import caprese
from caprese.adapters import attach_adapter, branch_parameters, fingerprint, get_branches, set_branch, set_branches
from caprese.data_gen import Sample, Samples, complete, load_prompts, read_shard
from caprese.distill import Checkpoints, EndToEnd, HeldOut, accumulate, fit_layer, make_batches, new_moments
from caprese.distill.end_to_end import train
from caprese.efficient_methods import (
    applied_ffns,
    calibrate,
    make_method,
    needs_calibration,
    parse_methods,
    reselection,
)
from caprese.evaluation import environment, parameter_counts
from caprese.evaluation.accuracy import Marker
from caprese.evaluation.estimators import interval
from caprese.files import write_atomic, write_json
from caprese.models import encode_prompt

#: a tenth of the recipe's samples, and two epochs: minutes, not hours, for all tables
CELL: dict[str, Any] = {
    "method": "griffin:0.5:score=output:prior=32",
    "rank": 20,
    "samples": 2_000,
    "epochs": 2,
    "objective": "kl",
    "rate": 4e-3,
    "reselect_every": 32,
    "adapter": "branch",
}
CELL_KEYS = ("rank", "samples", "epochs", "reselect_every")
SPARSITIES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
CATS = (*SPARSITIES, 0.9, 0.95, 0.98)
SAMPLES = "griffin:0.5:score=output"
TABLES: dict[str, list[dict[str, Any]]] = {
    "methods": [{"method": m} for m in ("griffin:0.5", CELL["method"], "static:0.5", "cats:0.9", "nf4")],
    # rank 0 is no adapter
    "spared": [{"method": m, "rank": 0} for m in ("cats:0.5", "int8")],
    "griffin": [{"method": f"griffin:{s}", "rank": 0} for s in SPARSITIES],
    # 0, 1, 5 and 10% of the width, and 16%, which is 2% of the parameters
    "ranks": [{"rank": r} for r in (0, 1, 6, 13, 20)],
    "samples": [{"samples": n} for n in (200, 2_000)],
    "lora": [{"adapter": "lora"}, {}],
    "sparsity": [{"method": f"griffin:{s}:score=output:prior=32"} for s in SPARSITIES],
    "choice": [{"method": m} for m in ("griffin:0.5", SAMPLES, f"{SAMPLES}:prior=32", f"{SAMPLES}:prior=128")],
    "cats": [{"method": f"cats:{s}", "rank": 20 if s in (0.8, 0.9, 0.98) else 0} for s in CATS],
    "reselection": [{"reselect_every": n} for n in (None, 32, 16)],
    "epochs": [{"epochs": n} for n in (1, 2, 4)],
    "objectives": [{}, {"rate": 1e-3}, {"objective": "hidden"}, {"objective": "on_policy"}],
}


class Yardstick:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.model, self.tokenizer = caprese.load_base("reasoner-tiny")
        self.rows: dict[str, list[Sample]] = {
            split: [s for p in sorted(args.samples.glob(f"{split}-*.parquet")) for s in read_shard(p)]
            for split in ("train", "validation")
        }
        self.problems = load_prompts("chains:test", args.problems, 1)
        self.markers = [Marker(p) for p in self.problems]
        self.encoded = [encode_prompt(self.tokenizer, p.text, "", True) for p in self.problems]
        self.sampling = Samples(max_new_tokens=220, batch_size=100)

    def answers(self, model: nn.Module) -> dict[str, Any]:
        """Accuracy on the test problems with a 95% interval, by number of steps, and the length of the answers."""
        drawn = complete(model, self.tokenizer, self.encoded, self.sampling, "test")
        texts = self.tokenizer.batch_decode(drawn, skip_special_tokens=True)
        right = [float(mark(text)[1]) for mark, text in zip(self.markers, texts, strict=True)]
        steps: dict[int, list[float]] = {}
        for problem, mark in zip(self.problems, right, strict=True):
            steps.setdefault(sum(problem.text.count(sign) for sign in "+-*"), []).append(mark)
        return {
            "accuracy": sum(right) / len(right),
            "interval": interval(right),
            "by_steps": {str(n): [sum(marks) / len(marks), len(marks)] for n, marks in sorted(steps.items())},
            "new_tokens": sum(map(len, drawn)) / len(drawn),
        }

    def cell(self, cell: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
        begin = time.perf_counter()
        methods = [make_method(facts) for facts in parse_methods(cell["method"])]
        samples = self.rows["train"][: cell["samples"]]
        train_batches, held_batches = make_batches(samples, 64), make_batches(self.rows["validation"], 64)
        calibration = None
        if needs_calibration(methods):
            calibration = calibrate(self.model, methods, [b.whole() for b in train_batches[:: len(train_batches) // 2]])
        model: Any = caprese.apply(self.model, methods, calibration=calibration)
        row: dict[str, Any] = {"cell": cell}
        try:
            with reselection(model, cell["reselect_every"]):
                about = ("method", "reselect_every", *(["samples"] if calibration else []))
                same = next((k for k in known.values() if all(k["cell"][f] == cell[f] for f in about)), None)
                row["efficient"] = same["efficient"] if same else self.answers(model)
                if cell["rank"] == 0:
                    row["adapter_fraction"] = 0.0
                    row["kl"] = {"efficient": HeldOut(model, held_batches, 1.0).kl()}
                    return row
                model = adapted = self.adapter(model, cell)
                counts = parameter_counts(adapted)
                row["active"] = {name: counts[f"active_{name}"] for name in ("dense", "efficient", "recovered")}
                row["adapter_fraction"] = sum(p.numel() for p in branch_parameters(adapted)) / counts["base"]
                held = HeldOut(adapted, held_batches, 1.0)
                row["kl"] = {"efficient": held.kl()}
                if cell["adapter"] == "branch":
                    self.closed_form(adapted, train_batches, held_batches, cell["rank"], held, row)
                start = min(row["kl"].values())
                row["kl"]["end_to_end"] = self.end_to_end(adapted, samples, held, start, cell)
                row["end_to_end"] = self.answers(adapted)
        finally:
            caprese.remove(model)
            row["seconds"] = round(time.perf_counter() - begin, 1)
        return row

    def adapter(self, model: Any, cell: dict[str, Any]) -> Any:
        torch.manual_seed(0)
        if cell["adapter"] == "branch":
            return attach_adapter(model, cell["rank"])
        for wrapper in applied_ffns(model).values():
            view = wrapper.view
            rank = max(1, round(2 * view.hidden_size * cell["rank"] / (3 * (view.hidden_size + view.width))))
            wrapper.transformed = LoraFFN(wrapper.transformed, rank)  # type: ignore[assignment]
        return model

    def closed_form(
        self, adapted: Any, batches: Sequence[Any], held_batches: Sequence[Any], rank: int, held: HeldOut, row: Any
    ) -> None:
        zero = get_branches(adapted)
        moments, held_moments = new_moments(self.model), new_moments(self.model)
        accumulate(self.model, batches, moments)
        accumulate(self.model, held_batches, held_moments)
        for wrapper, m, h in zip(applied_ffns(self.model).values(), moments, held_moments, strict=True):
            set_branch(wrapper.recovery, *fit_layer(m, h, rank).at(rank))
        row["kl"]["layerwise"] = held.kl()
        row["layerwise"] = self.answers(adapted)
        if not row["kl"]["layerwise"] < row["kl"]["efficient"]:
            set_branches(adapted, zero)

    def end_to_end(
        self, adapted: Any, samples: list[Sample], held: HeldOut, start: float, cell: dict[str, Any]
    ) -> float:
        on_policy = cell["objective"] == "on_policy"
        config = EndToEnd(
            objective="kl" if on_policy else cell["objective"],
            learning_rate=cell["rate"],
            epochs=1 if on_policy else cell["epochs"],
            batch_size=16,
            micro_batch=16,
            checkpoint_every=10**9,
        )
        best = start
        for epoch in range(cell["epochs"] if on_policy else 1):
            if epoch:  # what the student itself says, as the teacher would have gone on from there
                drawn = complete(adapted, self.tokenizer, [s.prompt_ids for s in samples], self.sampling, epoch)
                samples = [
                    Sample(s.prompt_ids + new, s.prompt_length, s.prompt, "", s.answer)
                    for s, new in zip(samples, drawn, strict=True)
                ]
            batches = make_batches(samples, config.micro_batch)
            best = train(adapted, batches, held, config, best, Checkpoints(epoch)).best
        return best


def table(cells: list[dict[str, Any]], dense: dict[str, Any]) -> str:
    """Cells in Markdown: what differs between them, then accuracy in %, with its interval, and KL of the stages."""
    keys = [k for k in CELL if len({str(c["cell"][k]) for c in cells}) > 1] or ["method"]
    lines = [
        "| " + " | ".join([*keys, "parameters added", "dense", "efficient", "layer-wise", "end to end", "KL"]) + " |"
    ]
    lines.append("|---" * (len(keys) + 6) + "|")

    def shown(stage: Any) -> str:
        if stage is None:
            return "-"
        low, high = stage["interval"]
        return f"{stage['accuracy']:.0%} ({low:.0%}-{high:.0%})"

    for c in cells:
        kl = " -> ".join(f"{value:.4f}" for value in c["kl"].values())
        stages = [shown(s) for s in (dense, c["efficient"], c.get("layerwise"), c.get("end_to_end"))]
        facts = [str(c["cell"][k]) for k in keys]
        lines.append("| " + " | ".join([*facts, f"{c['adapter_fraction']:.2%}", *stages, kl]) + " |")
    return "\n".join(lines)


def stages_table(cells: list[dict[str, Any]], dense: dict[str, Any]) -> str:
    """Accuracy by steps of the problem, and length of the answers, at every stage."""
    rows = [("dense", "", dense)]
    for c in cells:
        stages = ((name, c.get(name)) for name in ("efficient", "layerwise", "end_to_end"))
        rows += [(c["cell"]["method"], name.replace("_", " "), stage) for name, stage in stages if stage is not None]
    steps = sorted(dense["by_steps"])
    lines = ["| method | stage | " + " | ".join(f"{n} steps" for n in steps) + " | new tokens |"]
    lines.append("|---" * (len(steps) + 3) + "|")
    for method, name, stage in rows:
        marks = [f"{stage['by_steps'][n][0]:.0%} of {stage['by_steps'][n][1]}" for n in steps]
        lines.append("| " + " | ".join([method, name, *marks, f"{stage['new_tokens']:.1f}"]) + " |")
    return "\n".join(lines)


def plot(found: dict[str, Any], dense: dict[str, Any], path: Path) -> None:
    """Accuracy by sparsity, rank, samples, epochs, reselection and number of steps, with 95% intervals."""
    import matplotlib
    from matplotlib.figure import Figure

    from caprese.report.plots import LIGHT

    def cells(name: str) -> list[dict[str, Any]]:
        keys = [json.dumps({**CELL, **over}, sort_keys=True) for over in TABLES[name]]
        return [found[key] for key in keys if key in found]

    def line(ax: Any, points: list[tuple[Any, dict[str, Any]]], label: str) -> None:
        if points:
            at = [x for x, _ in points]
            low, high = zip(*(stage["interval"] for _, stage in points), strict=True)
            (drawn,) = ax.plot(at, [stage["accuracy"] for _, stage in points], "o-", markersize=3, label=label)
            ax.fill_between(at, low, high, color=drawn.get_color(), alpha=0.12)

    def sparsity(cell: dict[str, Any]) -> float:
        return float(cell["cell"]["method"].split(":")[1])

    stages = ("efficient", "layerwise", "end_to_end")
    with matplotlib.rc_context(LIGHT.style):
        figure = Figure(figsize=(9.6, 5.4), layout="constrained")
        grid = figure.subplots(2, 3).flatten()
        for name, label in (("griffin", "GRIFFIN"), ("sparsity", "GRIFFIN, joined to samples"), ("cats", "CATS")):
            own = cells(name)
            line(grid[0], [(sparsity(c), c["efficient"]) for c in own], label)
            line(grid[0], [(sparsity(c), c["end_to_end"]) for c in own if "end_to_end" in c], f"{label}, recovered")
        for ax, name, key in zip(grid[1:5], ("ranks", "samples", "epochs", "reselection"), CELL_KEYS, strict=True):
            for stage in stages:
                own = [c for c in cells(name) if stage in c]
                line(ax, [(str(c["cell"][key]), c[stage]) for c in own], stage.replace("_", " "))
            ax.set_xlabel(key.replace("_", " "))
        base = found.get(json.dumps(CELL, sort_keys=True), {})
        for label, stage in (("dense", dense), *((s.replace("_", " "), base.get(s)) for s in stages)):
            if stage is not None:
                steps = sorted(stage["by_steps"].items())
                grid[5].plot([n for n, _ in steps], [mark[0] for _, mark in steps], "o-", markersize=3, label=label)
        grid[0].set_xlabel("sparsity")
        grid[5].set_xlabel("steps of the problem")
        for ax in grid:
            ax.set(ylabel="accuracy", ylim=(0, 1.02))
            if ax is not grid[5]:
                ax.axhline(dense["accuracy"], linewidth=0.8, linestyle="--", color="gray")
            ax.legend(fontsize=6)
        write_atomic(path, lambda tmp: figure.savefig(tmp, dpi=200, format="png"))


def answers_of(yardstick: Yardstick, adapters: Sequence[str], output: Path) -> None:
    """Accuracy of finished adapters beside the dense model's, by the steps of a problem."""
    rows = {"dense": yardstick.answers(yardstick.model)}
    for adapter in adapters:
        model: Any = caprese.load(yardstick.model, adapter)
        rows[adapter] = yardstick.answers(model)
        caprese.remove(model)
    command = f"python benchmarks/reasoner.py --problems {len(yardstick.problems)} --samples {yardstick.args.samples} "
    command += f"--adapters {' '.join(adapters)} --output {output}"
    write_json(output, {"command": command, "rows": rows, "environment": environment(yardstick.model)})
    counts = {n: count for n, (_, count) in rows["dense"]["by_steps"].items()}
    print("| | accuracy | " + " | ".join(f"{n} steps ({count})" for n, count in counts.items()) + " | new tokens |")
    print("|---" * (len(counts) + 3) + "|")
    for name, row in rows.items():
        low, high = row["interval"]
        each = " | ".join(f"{row['by_steps'][n][0]:.0%}" for n in counts)
        print(f"| {name} | {row['accuracy']:.1%} ({low:.0%}-{high:.0%}) | {each} | {row['new_tokens']:.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", choices=[*TABLES, []], help="all if none is named")
    parser.add_argument("--samples", type=Path, default=Path("out-reasoner-tiny/samples"))
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--adapters", nargs="*", help="finished adapters to ask, instead of tables")
    parser.add_argument("--output", type=Path, help="of tables: benchmarks/results/reasoner.json if not given")
    args = parser.parse_args()
    if args.adapters and args.output is None:
        parser.error("--adapters wants an --output of its own")
    args.output = args.output or Path("benchmarks/results/reasoner.json")
    yardstick = Yardstick(args)
    if args.adapters:
        return answers_of(yardstick, args.adapters, args.output)
    settings = {
        "problems": args.problems,
        "base": fingerprint(yardstick.model),
        "samples": hashlib.sha256(repr(yardstick.rows["train"][:200]).encode()).hexdigest()[:16],
    }
    result: dict[str, Any] = {"settings": settings, "cells": {}}
    if args.output.exists() and (before := json.loads(args.output.read_text()))["settings"] == settings:
        result = before
    result["environment"] = environment(yardstick.model)
    if "dense" not in result:
        result["dense"] = yardstick.answers(yardstick.model)
        write_json(args.output, result)
    for name in args.tables or TABLES:
        cells = [{**CELL, **over} for over in TABLES[name]]
        keys = [json.dumps(cell, sort_keys=True) for cell in cells]
        for cell, key in zip(cells, keys, strict=True):
            if key not in result["cells"]:
                result["cells"][key] = yardstick.cell(cell, result["cells"])
                write_json(args.output, result)
                shown = table([result["cells"][key]], result["dense"]).splitlines()[-1]
                print(name, key, shown, f"{result['cells'][key]['seconds']} s", flush=True)
        print(f"\npython benchmarks/reasoner.py {name}\n" + table([result["cells"][k] for k in keys], result["dense"]))
        if name == "methods":
            print("\n" + stages_table([result["cells"][k] for k in keys], result["dense"]))
    plot(result["cells"], result["dense"], args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
