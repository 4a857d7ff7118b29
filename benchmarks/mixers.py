"""What a mixer's start and its alignment are worth: held-out KL over tokens seen, at equal tokens.

    python benchmarks/mixers.py --samples out-reasoner-mamba/samples --output benchmarks/results/mixers-reasoner

Mixers started from attention or at random, trained by KL alone, or for a part of the tokens by something else first.
Samples are those of a finished run (`caprese recover --recipe reasoner-tiny-mamba`). A curve that the output file has
from the same settings is not made again.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch import nn

import caprese
from caprese.data_gen import read_shard
from caprese.distill import (
    Alignment,
    Batch,
    Checkpoints,
    HeldOut,
    alignment,
    hidden_alignment,
    make_batches,
    match_scale,
)
from caprese.distill.batches import completion_hidden, lm_logits, prefill
from caprese.distill.descend import Descent, descend
from caprese.distill.fit import joined
from caprese.distill.losses import hidden_kl
from caprese.distill.sensitivity import select_attention
from caprese.efficient_methods import dense, only, replacements
from caprese.evaluation import environment
from caprese.files import write_json

# what each is trained by, in equal parts of the tokens: by what its attention gave (align), that and how it mixed
# (matrices), all hidden states (hidden), KL with half of the mixers (half), KL
TRAININGS = {
    "alignment + KL": ("align", "kl"),
    "KL alone": ("kl",),
    "alignment with matrices + KL": ("matrices", "kl"),
    "alignment, hidden states, KL": ("align", "hidden", "kl"),
    "alignment, half of the mixers, KL": ("align", "half", "kl"),
    "alignment + KL, layers by sensitivity": ("align", "kl"),
}
STARTS = ("attention", "random")
CURVES = [
    *((start, name) for start in STARTS for name in ("alignment + KL", "KL alone")),
    *(("attention", name) for name in list(TRAININGS)[2:]),
]


def read(directory: Path, split: str, count: int) -> list[Any]:
    rows: list[Any] = []
    for path in sorted(directory.glob(f"{split}-*.parquet")):
        rows += read_shard(path)
        if len(rows) >= count:
            break
    return rows[:count]


def by_kl(model: nn.Module, batch: Batch) -> torch.Tensor:
    context = prefill(model, batch)
    with torch.no_grad(), dense(model):
        target = completion_hidden(model, batch, context)
    return hidden_kl(completion_hidden(model, batch, context), target, lambda h: lm_logits(model, h))


def by(measure: Callable[[nn.Module, Batch], torch.Tensor]) -> Callable[[nn.Module, Batch], torch.Tensor]:
    return lambda model, batch: measure(model, batch).mean() * batch.tokens


LOSSES = {
    "align": by(alignment),
    "matrices": by(functools.partial(alignment, matrices=1.0)),
    "hidden": by(hidden_alignment),
    "half": by_kl,
    "kl": by_kl,
}


@contextmanager
def acting(model: nn.Module, part: str) -> Iterator[None]:
    layers = [at.layer for at in replacements(model)]
    with only(model, joined(layers, 0.5) if part == "half" else layers):
        yield


def run(args: argparse.Namespace, start: str, training: str, data: dict[str, list[Any]]) -> list[dict[str, float]]:
    base, _ = caprese.load_base(args.model)
    batches, validation = make_batches(data["train"], args.batch, True), make_batches(data["validation"], 64, True)
    method = caprese.Mamba(keep_attention=args.keep, start=start, seed=args.seed)
    if training.endswith("sensitivity"):  # which sees some tokens of its own
        asked = method.model_copy(update={"selected": "sensitivity"})
        config = Alignment(learning_rate=args.rate, batch_size=args.batch, micro_batch=args.batch)
        method, cost = select_attention(base, asked, batches, validation, config, 1.0, Checkpoints(args.seed))
        print(f"attention stays in {method.keep_attention}; a mixer alone costs {cost}", flush=True)
    model = caprese.apply(base, method)
    match_scale(model, batches[len(batches) // 2])
    held_out = HeldOut(model, validation, 1.0)
    tokens = sum(batch.tokens for batch in batches)
    parts = TRAININGS[training]
    curve = [{"tokens": 0, "kl": held_out.kl()}]
    for part in parts:
        config = Descent(
            epochs=args.epochs // len(parts),
            learning_rate=args.rate,
            batch_size=args.batch,
            micro_batch=args.batch,
            checkpoint_every=10**6,
        )

        def loss(index: int, measure: Any = LOSSES[part]) -> torch.Tensor:
            return measure(model, batches[index])

        def check() -> float:
            with only(model, [at.layer for at in replacements(model)]):
                return held_out.kl()

        with acting(model, part):
            begin, seed = float("inf"), Checkpoints(args.seed)
            points = descend(model, batches, loss, check, config, begin, seed, f"{start}: {part}").checks
        seen = curve[-1]["tokens"]
        curve += [{"tokens": seen + tokens * (i + 1), "kl": point["kl"]} for i, point in enumerate(points)]
    return curve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="reasoner-tiny")
    parser.add_argument("--samples", type=Path, required=True)
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--train", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=6, help="in all; each part gets its share")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--curves", type=int, default=len(CURVES), help="only the first so many")
    parser.add_argument("--output", type=Path, required=True, help="without suffix: .json and .png are written")
    args = parser.parse_args()
    command = f"python benchmarks/mixers.py --model {args.model} --keep {args.keep} --train {args.train}"
    command += f" --epochs {args.epochs} --batch {args.batch} --rate {args.rate} --seed {args.seed}"
    data = {"train": read(args.samples, "train", args.train), "validation": read(args.samples, "validation", 64)}
    path = args.output.with_suffix(".json")
    known = json.loads(path.read_text()) if path.exists() else {}
    curves: dict[str, list[dict[str, float]]] = known["curves"] if known.get("command") == command else {}
    base, _ = caprese.load_base(args.model)
    for start, training in CURVES[: args.curves]:
        name = f"{start}, {training}"
        if name in curves:
            continue
        begin = time.perf_counter()
        curves[name] = run(args, start, training, data)
        print(f"{time.perf_counter() - begin:.0f} s  {name}: {json.dumps(curves[name])}", flush=True)
        write_json(path, {"command": command, "curves": curves, "environment": environment(base)})
    figure, axes = plt.subplots(figsize=(6, 3.6))
    for name, curve in curves.items():
        axes.plot([p["tokens"] for p in curve], [p["kl"] for p in curve], marker="o", markersize=3, label=name)
    axes.set(xlabel="completion tokens seen", ylabel="held-out KL", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=7)
    figure.tight_layout()
    figure.savefig(args.output.with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    main()
