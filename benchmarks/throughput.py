"""Layer-wise distillation: tokens per second, what each part takes, and the time of 20,000 samples.

    python benchmarks/throughput.py                                          SmolLM2-135M's shape
    python benchmarks/throughput.py --shape llama-3.1-8b --layers 2          two of its layers, projected to all

Random weights and tokens: the work does not depend on them. Parts: the dense forward pass, what the method takes away
(the residual), the accumulators X'X and X'E, the solve. With --layers, the model has so many layers and a small
vocabulary (the stage uses no head), and the projection multiplies by the layers that the whole model has.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

import caprese
from caprese.data_gen import Sample
from caprese.distill import accumulate, fit_layer, make_batches, new_moments
from caprese.distill.batches import completion_hidden, prefill
from caprese.distill.layerwise import Moments
from caprese.efficient_methods import make_method, parse_methods, phases
from caprese.evaluation import environment
from caprese.files import write_json
from caprese.models import random_model, shape_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="smollm2-135m")
    parser.add_argument("--layers", type=int, help="build only so many layers")
    parser.add_argument("--method", default="griffin:0.5")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--completion", type=int, default=128, help="tokens of each sample")
    parser.add_argument("--projected-samples", type=int, default=20_000)
    parser.add_argument("--projected-completion", type=int, default=512)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    config = shape_config(args.shape)
    whole = config.num_hidden_layers
    if args.layers:
        config.num_hidden_layers, config.vocab_size = args.layers, 1024
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    model: Any = random_model(config, dtype, args.device)
    caprese.apply(model, [make_method(facts) for facts in parse_methods(args.method)])
    generator = torch.Generator().manual_seed(0)
    rows = [
        Sample(
            torch.randint(5, config.vocab_size, (args.prompt + args.completion,), generator=generator).tolist(),
            args.prompt,
            "",
            "",
        )
        for _ in range(args.samples)
    ]
    batches = make_batches(rows, 8)

    def clock(run: Any) -> float:
        if args.device != "cpu":
            torch.accelerator.synchronize()
        begin = time.perf_counter()
        run()
        if args.device != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter() - begin

    @torch.no_grad()
    def forward(observer: Any) -> None:
        for batch in batches:
            here = batch.to(model.device)
            context = prefill(model, here)
            if observer is None:
                with caprese.dense(model):
                    completion_hidden(model, here, context)
            else:
                with phases(model, batch.prompt_lengths, observer):
                    completion_hidden(model, here, context)

    moments = new_moments(model)
    forward(None)  # warm-up
    accumulate(model, batches[:1], new_moments(model))
    seconds = {
        "forward": clock(lambda: forward(None)),
        "with_residual": clock(lambda: forward(lambda *_: None)),
        "whole": clock(lambda: accumulate(model, batches, moments)),
    }
    one: Moments = moments[0]
    solve = clock(lambda: fit_layer(one, one, args.rank))
    tokens = args.samples * args.completion
    parts = {
        "forward": seconds["forward"],
        "residual": max(0.0, seconds["with_residual"] - seconds["forward"]),
        "accumulators": max(0.0, seconds["whole"] - seconds["with_residual"]),
    }
    per_token = {name: value / tokens for name, value in parts.items()}
    scale = whole / config.num_hidden_layers
    needed = args.projected_samples * args.projected_completion
    projected = {name: value * needed * scale for name, value in per_token.items()} | {"solve": solve * whole}
    result = {
        "command": f"python benchmarks/throughput.py --shape {args.shape}"
        + (f" --layers {args.layers}" if args.layers else "")
        + f" --method {args.method} --rank {args.rank} --samples {args.samples}",
        "tokens_per_second": tokens / seconds["whole"],
        "share": {name: value / seconds["whole"] for name, value in parts.items()},
        "solve_seconds_per_layer": solve,
        "projection": {
            "samples": args.projected_samples,
            "tokens": needed,
            "layers": whole,
            "hours": {name: value / 3600 for name, value in projected.items()},
            "total_hours": sum(projected.values()) / 3600,
        },
        "environment": environment(model),
    }
    print(f"{result['tokens_per_second']:.1f} completion tokens/s in {config.num_hidden_layers} layers")
    print(", ".join(f"{name} {value:.0%}" for name, value in result["share"].items()), f"; solve {solve:.1f} s a layer")
    print(
        f"{args.shape}, {args.projected_samples} samples of {args.projected_completion} tokens: "
        f"{result['projection']['total_hours']:.1f} h"
    )
    if args.output:
        write_json(args.output, result)


if __name__ == "__main__":
    main()
