"""Held-out KL against the number of samples, and the two end-to-end objectives side by side.

    python benchmarks/curves.py --counts 19,38,76,152 --train 76 --objectives kl,hidden

For every count: the closed form alone. For the count given by --train: end to end from there, each objective at each of
its learning rates, the best by validation kept; KL on the test samples, which chose nothing.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import caprese
from caprese.adapters import attach_adapter, get_branches, set_branch, set_branches
from caprese.data_gen import read_shard
from caprese.distill import EndToEnd, HeldOut, accumulate, fit_layer, make_batches, new_moments
from caprese.distill.end_to_end import train
from caprese.efficient_methods import applied_ffns, make_method
from caprese.evaluation import environment
from caprese.files import write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--samples", type=Path, default=Path("out/samples"))
    parser.add_argument("--method", default="griffin")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--counts", default="19,38,76,152")
    parser.add_argument("--train", default="", help="counts to train end to end")
    parser.add_argument("--objectives", default="kl")
    parser.add_argument("--rates", default="4e-3")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/curves.json"))
    args = parser.parse_args()
    model, _ = caprese.load_base(args.model)
    rows = {
        split: [s for p in sorted(args.samples.glob(f"{split}-*.parquet")) for s in read_shard(p)]
        for split in ("train", "validation", "test")
    }
    caprese.apply(model, make_method({"name": args.method, "sparsity": args.sparsity}))
    adapted = attach_adapter(model, args.rank)
    validation = HeldOut(adapted, make_batches(rows["validation"], 8), 1.0)
    test = HeldOut(adapted, make_batches(rows["test"], 8), 1.0)
    efficient = test.kl()
    print(f"efficient: KL {efficient:.4f}", flush=True)
    held, moments = new_moments(model), new_moments(model)
    accumulate(model, make_batches(rows["validation"], 8), held)
    points: list[dict[str, Any]] = []

    def note(**point: Any) -> None:
        point["recovered_fraction"] = 1 - point["kl"] / efficient
        points.append(point)
        print(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in point.items()), flush=True)

    done = 0
    trained = [int(n) for n in args.train.split(",") if n]
    for count in sorted({*(int(n) for n in args.counts.split(",")), *trained}):
        batches = make_batches(rows["train"][done:count], 8)
        accumulate(model, batches, moments)
        done = count
        for wrapper, m, h in zip(applied_ffns(model).values(), moments, held, strict=True):
            set_branch(wrapper.recovery, *fit_layer(m, h, args.rank).at(args.rank))
        note(stage="layerwise", samples=count, kl=test.kl())
        if count not in trained:
            continue
        start, start_kl = get_branches(adapted), validation.kl()
        for objective in args.objectives.split(","):
            for rate in args.rates.split(","):
                set_branches(adapted, start)
                config = EndToEnd(
                    objective=objective, learning_rate=float(rate), epochs=args.epochs, batch_size=8, micro_batch=8
                )
                begin = time.perf_counter()
                best = train(adapted, make_batches(rows["train"][:count], 8), validation, config, start_kl).best
                note(
                    stage="end_to_end",
                    objective=objective,
                    learning_rate=float(rate),
                    samples=count,
                    validation_kl=best,
                    seconds=round(time.perf_counter() - begin, 1),
                    kl=test.kl(),
                )
        set_branches(adapted, start)
    write_json(
        args.output,
        {
            "command": f"python benchmarks/curves.py --method {args.method} --sparsity {args.sparsity} "
            f"--rank {args.rank} --counts {args.counts} --train {args.train} --objectives {args.objectives} "
            f"--rates {args.rates} --epochs {args.epochs}",
            "efficient_kl": efficient,
            "points": points,
            "environment": environment(model),
        },
    )


if __name__ == "__main__":
    main()
