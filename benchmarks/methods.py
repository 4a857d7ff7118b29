"""Every method at three sparsities: what it costs, and what each stage gives back; LoRA of equal size beside it.

    python benchmarks/methods.py            after make demo, whose samples it uses

For each method and sparsity, on the demo's test samples: KL(dense || x), top-1 agreement and active parameters of the
efficient model, + the closed form, + end to end from there, + reselection every 32 tokens; and of the efficient model
with LoRA on gate, up and down in place of the recovery branch, trained end to end on the same samples for as long.
A stage that does not help on the validation samples is not kept. Finished rows are read back from the output, so an
interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import caprese
from caprese.adapters import attach_adapter, branch_parameters, get_branches, set_branch, set_branches
from caprese.data_gen import Sample, read_shard
from caprese.distill import EndToEnd, HeldOut, accumulate, fit_layer, make_batches, new_moments
from caprese.distill.batches import completion_hidden, lm_logits
from caprese.distill.end_to_end import train
from caprese.distill.losses import kl_divergence
from caprese.efficient_methods import (
    applied_ffns,
    calibrate,
    make_method,
    needs_calibration,
    parse_methods,
    reselection,
)
from caprese.evaluation import environment, parameter_counts
from caprese.files import write_json

SPARSE = ("griffin", "cats", "teal", "static")
STAGES = ("efficient", "layerwise", "end_to_end", "reselection", "lora")


class LoraFFN(nn.Module):
    """LoRA on gate, up and down of an efficient FFN, as the paper compares: W x + B A x."""

    def __init__(self, inner: Any, rank: int) -> None:
        super().__init__()
        self.inner = inner
        self.act, self.gated, self.fused = inner.act, True, False
        self.hidden_size, self.width, self.device = inner.hidden_size, inner.width, torch.device("cpu")
        self.recovery = nn.Module()  # by this name `train` takes it for the branch
        d, f = inner.hidden_size, inner.width
        for name, fan_in, fan_out in (("gate", d, f), ("up", d, f), ("down", f, d)):
            a = nn.Parameter(torch.randn(rank, fan_in) / fan_in**0.5)
            self.recovery.register_parameter(f"lora_A_{name}", a)
            self.recovery.register_parameter(f"lora_B_{name}", nn.Parameter(torch.zeros(fan_out, rank)))

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        packed = getattr(self.inner, f"{name}_proj", None)  # a quantised FFN has modules, the others weights
        if packed is not None:
            y = packed(x)
        else:
            weights = self.inner.weights()
            y = F.linear(x, getattr(weights, name), getattr(weights, f"{name}_bias"))
        a, b = (getattr(self.recovery, f"lora_{part}_{name}") for part in "AB")
        return y + F.linear(F.linear(x, a), b)

    def neurons(self, x: torch.Tensor, x_up: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        a = self.act(self._linear("gate", x))
        return a, a * self._linear("up", x if x_up is None else x_up)

    def down(self, z: torch.Tensor) -> torch.Tensor:
        return self._linear("down", z)

    def weights(self) -> Any:
        """For choices alone: rows gathered from these would lack the LoRA."""
        return self.inner.weights()


class Bench:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.model, _ = caprese.load_base(args.model)
        rows: dict[str, list[Sample]] = {
            split: [s for p in sorted(args.samples.glob(f"{split}-*.parquet")) for s in read_shard(p)]
            for split in ("train", "validation", "test")
        }
        self.train = rows["train"][: args.count]
        rows = {"train": self.train, "validation": rows["validation"], "test": rows["test"][: args.test]}
        self.batches = {split: make_batches(part, 8) for split, part in rows.items()}

    @torch.no_grad()
    def figures(self, model: nn.Module, test: HeldOut) -> dict[str, Any]:
        """KL(dense || x) and top-1 agreement on the test samples."""
        kl, same, tokens = 0.0, 0, 0
        for index in range(len(self.batches["test"])):
            batch, context, target = test.teacher[index]
            hidden = completion_hidden(model, batch, context)
            student, teacher = lm_logits(model, hidden), lm_logits(model, target)
            kl += float(kl_divergence(student, teacher).sum(dtype=torch.float64))
            same += int((student.argmax(-1) == teacher.argmax(-1)).sum())
            tokens += len(hidden)
        return {"kl": kl / tokens, "top1_agreement": same / tokens}

    def end_to_end(self, model: nn.Module, held_out: HeldOut, start: float) -> float:
        config = EndToEnd(
            objective="kl", learning_rate=self.args.rate, epochs=self.args.epochs, batch_size=4, micro_batch=4
        )
        return train(model, make_batches(self.train, 4), held_out, config, start).best

    def row(self, spec: str) -> dict[str, Any]:
        begin = time.perf_counter()
        methods = [make_method(facts) for facts in parse_methods(spec)]
        model = self.model
        calibration = None
        if needs_calibration(methods):
            calibration = calibrate(model, methods, [batch.whole() for batch in self.batches["train"]])
        caprese.apply(model, methods, calibration=calibration)
        row: dict[str, Any] = {"method": spec}
        try:
            adapted = attach_adapter(model, self.args.rank)
            counts = parameter_counts(adapted)
            row["active"] = {name: counts[f"active_{name}"] for name in ("dense", "efficient", "recovered")}
            row["adapter"] = counts["adapter"]
            validation = HeldOut(adapted, self.batches["validation"], 1.0)
            test = HeldOut(adapted, self.batches["test"], 1.0)
            row["efficient"] = self.figures(adapted, test)
            start = validation.kl()
            zero = get_branches(adapted)
            moments, held = new_moments(model), new_moments(model)
            accumulate(model, self.batches["train"], moments)
            accumulate(model, self.batches["validation"], held)
            for wrapper, m, h in zip(applied_ffns(model).values(), moments, held, strict=True):
                set_branch(wrapper.recovery, *fit_layer(m, h, self.args.rank).at(self.args.rank))
            row["layerwise"] = self.figures(adapted, test)
            after = validation.kl()
            row["layerwise"]["kept"] = after < start
            if not after < start:
                set_branches(adapted, zero)
            best = self.end_to_end(adapted, validation, min(start, after))
            row["end_to_end"] = self.figures(adapted, test) | {"kept": best < min(start, after)}
            with reselection(adapted, 32):
                row["reselection"] = self.figures(adapted, HeldOut(adapted, self.batches["test"], 1.0))
            bare = adapted.unload()
            size = counts["adapter"] / len(applied_ffns(bare))
            view = next(iter(applied_ffns(bare).values())).view
            rank = max(1, round(size / (3 * (view.hidden_size + view.width))))
            torch.manual_seed(0)
            for wrapper in applied_ffns(bare).values():
                wrapper.transformed = LoraFFN(wrapper.transformed, rank)  # type: ignore[assignment]
            best = self.end_to_end(bare, HeldOut(bare, self.batches["validation"], 1.0), start)
            row["lora"] = self.figures(bare, HeldOut(bare, self.batches["test"], 1.0)) | {
                "rank": rank,
                "parameters": sum(p.numel() for p in branch_parameters(bare)),
                "kept": best < start,
            }
        finally:
            caprese.remove(model)
        row["seconds"] = round(time.perf_counter() - begin, 1)
        return row


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown: KL, and top-1 agreement behind it."""
    lines = [
        "| method | active, efficient | active, recovered | efficient | + layer-wise | + end-to-end | + reselection 32 "
        "| LoRA of equal size |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        dense = row["active"]["dense"]
        active = [f"{row['active'][name] / dense:.3f}" for name in ("efficient", "recovered")]
        cells = [f"{row[s]['kl']:.4f} ({row[s]['top1_agreement']:.0%})" for s in STAGES]
        cells = [c + ("" if row[s].get("kept", True) else "*") for c, s in zip(cells, STAGES, strict=True)]
        lines.append("| " + " | ".join([row["method"], *active, *cells]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--samples", type=Path, default=Path("out/samples"))
    parser.add_argument("--sparsity", default="0.3,0.5,0.7")
    parser.add_argument("--methods", default="", help="instead of all: specifications with a space between them")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--count", type=int, default=60, help="training samples")
    parser.add_argument("--test", type=int, default=24, help="test samples")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/methods.json"))
    args = parser.parse_args()
    specs = args.methods.split() or [f"{m}:{s}" for m in SPARSE for s in args.sparsity.split(",")] + ["nf4", "int8"]
    settings = {
        "model": args.model,
        "rank": args.rank,
        "count": args.count,
        "test": args.test,
        "epochs": args.epochs,
        "rate": args.rate,
    }
    known: dict[str, Any] = {}
    if args.output.exists():
        before = json.loads(args.output.read_text())
        if before["settings"] == settings:
            known = {row["method"]: row for row in before["rows"]}
    bench = Bench(args)
    command = f"python benchmarks/methods.py --count {args.count} --test {args.test} --epochs {args.epochs}"
    command += f" --rate {args.rate:g}"
    for spec in specs:
        if spec not in known:
            known[spec] = bench.row(spec)
            print(table([known[spec]]).splitlines()[-1], f"{known[spec]['seconds']} s", flush=True)
        facts = {"command": command, "settings": settings, "rows": list(known.values())}
        write_json(args.output, {**facts, "environment": environment(bench.model)})
    print(table([known[spec] for spec in specs]))


if __name__ == "__main__":
    main()
