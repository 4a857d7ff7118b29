"""Closed form against the paper's Adam recipe: held-out error layer by layer, and the time of both.

    python benchmarks/layerwise.py --samples out/samples --count 32 --output benchmarks/results/layerwise.json

Both fit the same samples in the same run and are judged on the same held-out ones. Adam: 20 epochs at 1e-3, linear
schedule with 2% warm-up. "cached" keeps every layer's x and E in memory; "recomputed" runs the model for them each
time they are needed: once for the closed form, once an epoch for Adam.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

import caprese
from caprese.adapters import attach_adapter, set_branch
from caprese.data_gen import read_shard
from caprese.distill import Layerwise, accumulate, fit_layer, make_batches, new_moments
from caprese.distill.adam import collect_activations, fit_adam
from caprese.efficient_methods import applied_ffns, make_method
from caprese.evaluation import environment, layer_errors
from caprese.files import write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--samples", type=Path, default=Path("out/samples"))
    parser.add_argument("--count", type=int, default=32, help="training samples")
    parser.add_argument("--method", default="griffin")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/layerwise.json"))
    args = parser.parse_args()
    model, _ = caprese.load_base(args.model)
    rows = {
        split: [s for p in sorted(args.samples.glob(f"{split}-*.parquet")) for s in read_shard(p)]
        for split in ("train", "validation", "test")
    }
    batches = {k: make_batches(v[: args.count], 8) for k, v in rows.items()}
    caprese.apply(model, make_method({"name": args.method, "sparsity": args.sparsity}))
    adapted = attach_adapter(model, args.rank)
    seconds: dict[str, float] = {}

    def clock(name: str, begin: float) -> None:
        seconds[name] = round(time.perf_counter() - begin, 2)
        print(f"{name:28} {seconds[name]:8.1f} s", flush=True)

    # What both need to choose a ridge by is not part of either's fit.
    held = new_moments(model)
    accumulate(model, batches["validation"], held)

    begin = time.perf_counter()
    moments = new_moments(model)
    accumulate(model, batches["train"], moments)
    fits = [fit_layer(m, h, args.rank) for m, h in zip(moments, held, strict=True)]
    clock("closed, recomputed", begin)
    for wrapper, fit in zip(applied_ffns(model).values(), fits, strict=True):
        set_branch(wrapper.recovery, *fit.at(args.rank))
    closed = layer_errors(adapted, batches["test"])

    activations = [collect_activations(model, batch) for batch in batches["train"]]
    begin = time.perf_counter()
    cached = new_moments(model)
    for seen in activations:
        for m, (x, e) in zip(cached, seen.values(), strict=True):
            m.add(x, e, e)
    for m, h in zip(cached, held, strict=True):
        fit_layer(m, h, args.rank)
    clock("closed, cached", begin)
    del activations

    adam = []
    for name, keep in (("adam, cached", True), ("adam, recomputed", False)):
        torch.manual_seed(0)
        for wrapper in applied_ffns(model).values():
            wrapper.recovery.reset_lora_parameters("default", True)
        begin = time.perf_counter()
        if keep:  # the pass that fills the cache is not part of the cached time
            known = {i: collect_activations(model, b) for i, b in enumerate(batches["train"])}
            begin = time.perf_counter()
            fit_adam(adapted, batches["train"], Layerwise(how="adam", epochs=args.epochs), 0, known=known)
            del known
        else:
            config = Layerwise(how="adam", epochs=args.epochs, cache_activations=False)
            fit_adam(adapted, batches["train"], config, 0)
        clock(name, begin)
        adam = layer_errors(adapted, batches["test"])

    print("\nlayer  efficient  closed    adam   (relative FFN error on test samples)")
    wins = 0
    table = []
    for c, a in zip(closed, adam, strict=True):
        wins += c["recovered"] < a["recovered"]
        table.append(
            {"layer": c["layer"], "efficient": c["efficient"], "closed": c["recovered"], "adam": a["recovered"]}
        )
        print(f"{c['layer']:5d} {c['efficient']:10.4f} {c['recovered']:8.4f} {a['recovered']:8.4f}")
    print(f"\nclosed form lower in {wins} of {len(closed)} layers")
    write_json(
        args.output,
        {
            "command": f"python benchmarks/layerwise.py --count {args.count} --method {args.method} "
            f"--sparsity {args.sparsity} --rank {args.rank} --epochs {args.epochs}",
            "tokens": sum(b.tokens for b in batches["train"]),
            "seconds": seconds,
            "closed_lower": wins,
            "layers": table,
            "environment": environment(model),
        },
    )


if __name__ == "__main__":
    main()
