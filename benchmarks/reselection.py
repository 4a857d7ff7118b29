"""Reselection in free generation: how far the answers stay with the dense model, and what it takes.

    python benchmarks/reselection.py            after make demo, whose adapter and prompts it uses

The dense, the efficient and the recovered model answer held-out prompts one at a time, the recovered one with
reselection every 128, 32 and 8 tokens and without, taking turns prompt by prompt. Then the dense model reads each
answer: KL(dense || x) and top-1 agreement over the answer's own tokens, where errors have accumulated.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import caprese
from caprese.data_gen import Sample, Samples, complete, read_shard
from caprese.distill import make_batches
from caprese.efficient_methods import reselection
from caprese.evaluation import environment, fidelity, variant
from caprese.files import write_json

RHO = (None, 128, 32, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--adapter", default="out")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=192)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/reselection.json"))
    args = parser.parse_args()
    base, tokenizer = caprese.load_base(args.model)
    model: Any = caprese.load(base, args.adapter, fused=True)
    paths = sorted((Path(args.adapter) / "samples").glob("test-*.parquet"))
    prompts = [s for path in paths for s in read_shard(path)][: args.prompts]
    settings = Samples(max_new_tokens=args.new_tokens, batch_size=1)
    runs = [("dense", None), ("efficient", None), *(("recovered", rho) for rho in RHO)]
    answers: dict[Any, list[Sample]] = {run: [] for run in runs}
    times: dict[Any, list[float]] = {run: [] for run in runs}
    for number, prompt in enumerate(prompts):
        for name, rho in runs:
            with variant(model, name), reselection(model, rho):
                begin = time.perf_counter()
                (new,) = complete(model, tokenizer, [prompt.prompt_ids], settings, (0, number))
                times[name, rho].append(1000 * (time.perf_counter() - begin) / len(new))
            answers[name, rho].append(Sample(prompt.prompt_ids + new, prompt.prompt_length, prompt.prompt, ""))
        print(f"{number + 1} of {len(prompts)} prompts", flush=True)
    rows = []
    for name, rho in runs:
        with reselection(model, rho), torch.no_grad():
            figures = fidelity(model, make_batches(answers[name, rho], 4), (name,))[name]
        tokens = sum(len(s.completion_ids) for s in answers[name, rho])
        row = {"variant": name, "reselect_every": rho, "tokens": tokens}
        # the median over prompts: a slow moment of the machine hits one of them
        rows.append({**row, "ms_per_token": statistics.median(times[name, rho]), **figures})
    dense = rows[0]["ms_per_token"]
    print("| | reselect every | KL | top-1 agreement | ms per token, prompt included | of dense |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['variant']} | {row['reselect_every'] or '-'} | {row['kl']:.4f} | {row['top1_agreement']:.1%} "
            f"| {row['ms_per_token']:.1f} | {row['ms_per_token'] / dense:.2f} |"
        )
    command = f"python benchmarks/reselection.py --prompts {args.prompts} --new-tokens {args.new_tokens}"
    write_json(args.output, {"command": command, "rows": rows, "environment": environment(model)})


if __name__ == "__main__":
    main()
