"""How near the kernels come to the memory's bandwidth, at the FFN shapes of known models.

    python benchmarks/ffn_kernels.py              every kernel, model and batch with the default block sizes
    python benchmarks/ffn_kernels.py --sweep      and other block sizes on the first model, the best of them printed

bfloat16, half of the neurons or channels removed, rank 256. Each time is the median of replays of a CUDA graph that
goes through several layers' weights in turn, so that none of them is found in a cache, divided by the layers. GB/s
count the bytes that must be read: the rows that are kept, once for all sequences where they share the list. Beside
them stand the dense products by the vendor's library and the bandwidth of a copy. Every result is first compared with
its reference.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import platform
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from caprese import kernels
from caprese.files import write_json
from caprese.kernels import Rows, triton_runs
from caprese.kernels.down.naive import down as naive_down
from caprese.kernels.gate_up.naive import gate_up as naive_gate_up
from caprese.kernels.input_sparse.naive import input_sparse as naive_input_sparse
from caprese.models.shapes import SHAPES

MODELS = {"llama-3.1-8b": "silu", "gemma-2-9b": "gelu_tanh", "qwen2.5-14b": "silu"}
BATCHES = (1, 4, 16)
SWEEP: dict[str, tuple[int, ...]] = {
    "BLOCK_ROWS": (8, 16, 32, 64),
    "BLOCK_COLS": (64, 128, 256, 512),
    "DOT_FROM": (1, 3, 17),
    "PROGRAMS": (256, 512, 1024, 2048),
    "num_warps": (2, 4, 8),
    "num_stages": (2, 3, 4),
}


class Layer(NamedTuple):
    """The weights of an FFN with a branch; `gate_t` is gate stored transposed."""

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    gate_t: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor


def tiles() -> Any:
    """What the Triton kernels share; there is none without Triton."""
    return importlib.import_module("caprese.kernels.tiles")


class Job(NamedTuple):
    """One kernel on one layer: what launches it, its result without the kernel, and the bytes it must read."""

    key: str
    run: Callable[[], torch.Tensor]
    reference: Callable[[], torch.Tensor]
    bytes: int


def make_layer(width: int, hidden: int, rank: int, device: str) -> Layer:
    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16) * shape[-1] ** -0.5

    gate = weight(width, hidden)
    return Layer(
        gate,
        weight(width, hidden),
        weight(width, hidden),
        gate.T.contiguous(),
        weight(rank, hidden),
        weight(rank, hidden),
    )


def jobs(layer: Layer, batch: int, act: str, sparsity: float) -> dict[str, Job]:
    """Every kernel with inputs of this layer's size."""
    width, hidden = layer.gate.shape
    rank, device = len(layer.left), layer.gate.device
    k = round(width * (1 - sparsity))
    item = layer.gate.element_size()
    x = torch.randn(batch, hidden, device=device, dtype=layer.gate.dtype)
    shared, own = (
        torch.stack([torch.randperm(width, device=device)[:k].sort().values for _ in range(n)]).int()
        for n in (1, batch)
    )
    z = torch.randn(batch, k + rank, device=device, dtype=x.dtype)
    a = naive_gate_up(x, None, layer.gate, Rows(), act)
    threshold = a.float().abs().quantile(sparsity, -1)
    a_kept, kept, count = kernels.cats_select(x, layer.gate, threshold, act)
    z_kept = kernels.gate_up(x, None, layer.up, Rows(kept, count), act, layer.left, a=a_kept)
    chosen = int(count.sum())

    small = x.float().abs().flatten().quantile(sparsity)
    z_all = a * F.linear(x, layer.up)
    small_z = z_all.float().abs().flatten().quantile(sparsity)
    needed = int((x.float().abs() >= small).any(0).sum())
    needed_z = int((z_all.float().abs() >= small_z).any(0).sum())

    found = {
        "gate_up": Job(
            "gate_up",
            lambda: kernels.gate_up(x, layer.gate, layer.up, Rows(shared), act, layer.left),
            lambda: naive_gate_up(x, layer.gate, layer.up, Rows(shared), act, layer.left),
            (2 * k + rank) * hidden * item,
        ),
        "down": Job(
            "down",
            lambda: kernels.down(z, layer.down, Rows(shared), layer.right),
            lambda: naive_down(z, layer.down, Rows(shared), layer.right),
            (k + rank) * hidden * item,
        ),
        "cats_select": Job(
            "gate_up",
            lambda: kernels.cats_select(x, layer.gate, threshold, act)[2].float()[:, None],
            lambda: count.float()[:, None],
            width * hidden * item,
        ),
        "cats_up": Job(
            "gate_up",
            lambda: kernels.gate_up(x, None, layer.up, Rows(kept, count), act, layer.left, a=a_kept),
            lambda: naive_gate_up(x, None, layer.up, Rows(kept, count), act, layer.left, a=a_kept),
            (chosen + rank) * hidden * item,
        ),
        "cats_down": Job(
            "down",
            lambda: kernels.down(z_kept, layer.down, Rows(kept, count), layer.right),
            lambda: naive_down(z_kept, layer.down, Rows(kept, count), layer.right),
            (chosen + rank) * hidden * item,
        ),
        "input_sparse_gate": Job(
            "input_sparse",
            lambda: kernels.input_sparse(x, layer.gate_t, small),
            lambda: naive_input_sparse(x, layer.gate_t, small),
            needed * width * item,
        ),
        "input_sparse_down": Job(
            "input_sparse",
            lambda: kernels.input_sparse(z_all, layer.down, small_z),
            lambda: naive_input_sparse(z_all, layer.down, small_z),
            needed_z * hidden * item,
        ),
    }
    if batch > 1:
        found["gate_up_own"] = Job(
            "gate_up",
            lambda: kernels.gate_up(x, layer.gate, layer.up, Rows(own), act, layer.left),
            lambda: naive_gate_up(x, layer.gate, layer.up, Rows(own), act, layer.left),
            (2 * k * batch + rank) * hidden * item,
        )
        found["down_own"] = Job(
            "down",
            lambda: kernels.down(z, layer.down, Rows(own), layer.right),
            lambda: naive_down(z, layer.down, Rows(own), layer.right),
            (k * batch + rank) * hidden * item,
        )
    return found


def check(name: str, job: Job) -> None:
    """Refuse to time what is wrong."""
    got, wanted = job.run().float(), job.reference().float()
    error = float((got - wanted).norm() / wanted.norm())
    if not error < 0.01:
        raise SystemExit(f"{name}: relative error {error:.3g} against the reference")


def microseconds(calls: Sequence[Callable[[], Any]], replays: int = 20) -> float:
    """The median time of one call."""
    for call in calls:
        call()  # compiles, which a graph cannot hold
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(replays + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / len(calls))
    return statistics.median(times[3:])


def copy_bandwidth() -> float:
    """GB/s of a device copy, reading and writing."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / microseconds([lambda: target.copy_(source)]) / 1000


def configs(key: str, trials: int, seed: int = 0) -> list[dict[str, int]]:
    """Some of the block sizes a kernel can have, the default first."""
    default = tiles().CONFIGS[key]
    options = [SWEEP[name] for name in default]
    every = [dict(zip(default, values, strict=True)) for values in itertools.product(*options)]
    # larger tiles than this do not fit in registers
    every = [c for c in every if c["BLOCK_ROWS"] * c["BLOCK_COLS"] <= 256 * 32 * c["num_warps"] // 4 and c != default]
    return [dict(default), *random.Random(seed).sample(every, min(trials, len(every)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--kernels", nargs="+", help="only these")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument("--sweep", action="store_true", help="block sizes other than the default, on the first model")
    parser.add_argument("--trials", type=int, default=24, help="--sweep: how many for each kernel and batch")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/kernels.json"))
    args = parser.parse_args()
    if not torch.cuda.is_available() or not triton_runs(torch.device("cuda")):
        print(
            "benchmarks/ffn_kernels.py measures Triton kernels and needs a GPU with Triton; there is none",
            file=sys.stderr,
        )
        sys.exit(2)
    import triton

    torch.manual_seed(0)
    copy = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}: copy {copy:.0f} GB/s")
    result: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "environment": {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "python": platform.python_version(),
        },
        "sparsity": args.sparsity,
        "rank": args.rank,
        "copy_gbps": copy,
        "rows": [],
        "sweep": [],
    }
    with torch.inference_mode():
        for model, batch in itertools.product(args.models, args.batches):
            measure(result, model, batch, args, sweep=args.sweep and model == args.models[0])
            write_json(args.output, result)


def measure(result: dict[str, Any], model: str, batch: int, args: argparse.Namespace, sweep: bool) -> None:
    """Add a model's rows at one batch size."""
    shape, act, copy = SHAPES[model], MODELS[model], result["copy_gbps"]
    # a layer's weights are more than any cache holds; four of them leave nothing of the first when it is its turn again
    layers = [make_layer(shape["intermediate_size"], shape["hidden_size"], args.rank, "cuda") for _ in range(4)]
    per_layer = [jobs(layer, batch, act, args.sparsity) for layer in layers]

    width, hidden = layers[0].gate.shape
    x = torch.randn(batch, hidden, device="cuda", dtype=torch.bfloat16)
    z = torch.randn(batch, width, device="cuda", dtype=torch.bfloat16)
    dense = {
        "dense_gate_or_up": [partial(F.linear, x, layer.gate) for layer in layers],
        "dense_down": [partial(F.linear, z, layer.down.T) for layer in layers],
    }
    for name, calls in dense.items():
        add(result, model, name, batch, microseconds(calls), width * hidden * 2, copy)
    for name in per_layer[0]:
        if args.kernels and name not in args.kernels:
            continue
        same = [each[name] for each in per_layer]
        check(name, same[0])
        needed = round(statistics.mean(job.bytes for job in same))
        add(result, model, name, batch, microseconds([job.run for job in same]), needed, copy)
        if not sweep:
            continue
        best: tuple[float, dict[str, int]] | None = None
        for config in configs(same[0].key, args.trials):
            try:
                with tiles().configured(same[0].key, **config):
                    time = microseconds([job.run for job in same])
            except Exception as error:  # a tile that does not fit says so in many ways
                print(f"  {config}: {type(error).__name__}")
                torch.cuda.synchronize()
                continue
            result["sweep"].append(
                {"model": model, "kernel": name, "batch": batch, "microseconds": time, "config": config}
            )
            if best is None or time < best[0]:
                best = (time, config)
        if best is not None:
            print(f"  best of the sweep: {best[0]:.1f} us, {needed / best[0] / 1000:.0f} GB/s, {best[1]}")


def add(result: dict[str, Any], model: str, kernel: str, batch: int, time: float, needed: int, copy: float) -> None:
    speed = needed / time / 1000
    row = {"model": model, "kernel": kernel, "batch": batch, "microseconds": time, "bytes": needed, "gbps": speed}
    result["rows"].append({**row, "of_copy": speed / copy})
    print(f"{model:14s} {kernel:18s} batch {batch:2d} {time:8.1f} us {speed:6.0f} GB/s {speed / copy:5.0%} of a copy")


if __name__ == "__main__":
    main()
