"""What a mixer's start and its alignment are worth: held-out KL over tokens seen, at equal tokens.

    python benchmarks/mixers.py --samples out-reasoner-mamba/samples --output benchmarks/results/mixers-reasoner

Mixers started from attention or at random, trained by KL alone, or half of the tokens by alignment first. Samples are
those of a finished run (`caprese recover --recipe reasoner-tiny-mamba`).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch

import caprese
from caprese.data_gen import read_shard
from caprese.distill import HeldOut, make_batches
from caprese.distill.batches import completion_hidden, lm_logits, prefill
from caprese.distill.end_to_end import Descent, descend
from caprese.distill.losses import hidden_kl
from caprese.distill.mixer import alignment
from caprese.efficient_methods import dense
from caprese.evaluation import environment
from caprese.files import write_json


def read(directory: Path, split: str, count: int) -> list[Any]:
    rows: list[Any] = []
    for path in sorted(directory.glob(f"{split}-*.parquet")):
        rows += read_shard(path)
        if len(rows) >= count:
            break
    return rows[:count]


def run(args: argparse.Namespace, start: str, aligned: bool, data: dict[str, list[Any]]) -> list[dict[str, float]]:
    base, _ = caprese.load_base(args.model)
    model = caprese.apply(base, caprese.Mamba(keep_attention=args.keep, start=start))
    batches = make_batches(data["train"], args.batch)
    held_out = HeldOut(model, make_batches(data["validation"], 64), 1.0)
    tokens = sum(batch.tokens for batch in batches)

    def by_kl(index: int) -> torch.Tensor:
        batch = batches[index]
        context = prefill(model, batch)
        with torch.no_grad(), dense(model):
            target = completion_hidden(model, batch, context)[batch.mask]
        return hidden_kl(completion_hidden(model, batch, context)[batch.mask], target, lambda h: lm_logits(model, h))

    def by_alignment(index: int) -> torch.Tensor:
        return alignment(model, batches[index]).mean() * batches[index].tokens

    half = args.epochs // 2 if aligned else 0
    curve = [{"tokens": 0, "kl": held_out.kl()}]
    for loss, epochs in ((by_alignment, half), (by_kl, args.epochs - half)):
        if not epochs:
            continue
        config = Descent(
            epochs=epochs,
            learning_rate=args.rate,
            batch_size=args.batch,
            micro_batch=args.batch,
            checkpoint_every=10**6,
        )
        with tempfile.TemporaryDirectory() as name:
            state = Path(name) / "state.safetensors"
            best = float("inf")
            _, _, points = descend(model, batches, loss, held_out.kl, config, 0, state, "", best, f"    {start}")
        seen = curve[-1]["tokens"]
        curve += [{"tokens": seen + tokens * (i + 1), "kl": point["kl"]} for i, point in enumerate(points)]
    return curve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="reasoner-tiny")
    parser.add_argument("--samples", type=Path, required=True)
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--train", type=int, default=1024)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--output", type=Path, required=True, help="without suffix: .json and .png are written")
    args = parser.parse_args()
    data = {"train": read(args.samples, "train", args.train), "validation": read(args.samples, "validation", 64)}
    curves: dict[str, list[dict[str, float]]] = {}
    for start in ("attention", "random"):
        for aligned in (True, False):
            name = f"{start}, {'alignment + KL' if aligned else 'KL alone'}"
            curves[name] = run(args, start, aligned, data)
            print(name, json.dumps(curves[name]), flush=True)
    base, _ = caprese.load_base(args.model)
    command = f"python benchmarks/mixers.py --model {args.model} --keep {args.keep} --train {args.train}"
    command += f" --epochs {args.epochs} --batch {args.batch} --rate {args.rate}"
    write_json(
        args.output.with_suffix(".json"), {"command": command, "curves": curves, "environment": environment(base)}
    )
    figure, axes = plt.subplots(figsize=(6, 3.6))
    for name, curve in curves.items():
        axes.plot([p["tokens"] for p in curve], [p["kl"] for p in curve], marker="o", label=name)
    axes.set(xlabel="completion tokens seen", ylabel="held-out KL", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(args.output.with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    main()
