"""How near the Triton kernels come to the memory's bandwidth, at the FFN shapes of known models.

bfloat16. Each time is the median of replays of a CUDA graph that goes through several layers' weights in turn, so that
none of them is found in a cache, divided by the layers. GB/s count the bytes that must be read: the rows that are kept,
once for all sequences where they share the list. Beside them stand the dense products by the vendor's library and the
bandwidth of a copy. Every result is first compared with its reference. Without a GPU, where Triton interprets
(TRITON_INTERPRET=1), times are of no worth, but all of it runs.

Settings of a cell: shape; kernel, one that `jobs` names, dense_gate_or_up or dense_down; batch; sparsity; rank; trials,
other block sizes to try, which processes on every core compile first.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import importlib
import itertools
import json
import multiprocessing
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from caprese import kernels
from caprese.kernels import Rows, triton_runs
from caprese.kernels.down.naive import down as naive_down
from caprese.kernels.gate_up.naive import gate_up as naive_gate_up
from caprese.kernels.input_sparse.naive import input_sparse as naive_input_sparse
from caprese.kernels.quantized.naive import products as naive_products
from caprese.kernels.quantized.naive import sums as naive_sums
from caprese.models.shapes import SHAPES

Config = dict[str, int]
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
ACTIVATIONS = {"smollm2-135m": "silu", "llama-3.1-8b": "silu", "gemma-2-9b": "gelu_tanh", "qwen2.5-14b": "silu"}
SWEEP: dict[str, tuple[int, ...]] = {
    "BLOCK_ROWS": (4, 8, 16, 32, 64),
    "BLOCK_COLS": (64, 128, 256, 512, 1024),
    "DOT": (0, 1),
    "PROGRAMS": (256, 512, 1024, 2048),
    "num_warps": (2, 4, 8),
    "num_stages": (1, 2, 3, 4),
}
# a tile and its stages are to fit into the shared memory of every device that the kernels are compiled for
TILE = 8192


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


def jobs(layer: Layer, batch: int, act: str, sparsity: float, name: str) -> dict[str, Job]:
    """The kernels with inputs of this layer's size; of those in few bits, which take longest to make, only `name`."""
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
    for bits in [bits for bits in (8, 4) if name.endswith(f"_q{bits}")]:
        rows = kernels.quantize(torch.cat([layer.gate[:k], layer.up[:k]]), bits)
        columns = kernels.quantize(layer.down[:k], bits)
        found |= {
            f"products_q{bits}": Job(
                f"products_q{bits}",
                partial(kernels.products, x, rows),
                partial(naive_products, x.float(), rows),
                rows.codes.nbytes + rows.scales.nbytes,
            ),
            f"sums_q{bits}": Job(
                f"sums_q{bits}",
                partial(kernels.sums, z[:, :k], columns),
                partial(naive_sums, z[:, :k].float(), columns),
                columns.codes.nbytes + columns.scales.nbytes,
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
        raise ValueError(f"{name}: relative error {error:.3g} against the reference")


def microseconds(calls: Sequence[Callable[[], Any]], replays: int = 20) -> float:
    """The median time of one call."""
    for call in calls:
        call()  # compiles, which a graph cannot hold
    if not GPU:
        times = [time.perf_counter()]
        for call in calls:
            call()
            times.append(time.perf_counter())
        return 1e6 * statistics.median(after - before for before, after in itertools.pairwise(times))
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
    source = torch.empty(2 ** (30 if GPU else 26), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() / microseconds([lambda: target.copy_(source)]) / 1000


def configs(key: str, batch: int, trials: int, seed: int = 0) -> list[Config]:
    """Some of the block sizes a kernel can have, the present ones first."""
    default = tiles().config_of(key, batch)
    options = [SWEEP[name] for name in default]
    every = [dict(zip(default, values, strict=True)) for values in itertools.product(*options)]

    def fits(c: Config) -> bool:
        tile = c["BLOCK_ROWS"] * c["BLOCK_COLS"]
        if c["DOT"]:  # a matrix product wants 16 of what it sums over, and a tile in shared memory
            weights = 2 * tile if key.endswith("_q4") else tile
            return batch > 1 and c["BLOCK_ROWS"] >= 16 and weights * c["num_stages"] <= TILE
        sums = tile * tiles().padded_batch(batch, False) * (1 if "PROGRAMS" in c and key != "sums_q4" else 2)
        if key == "products_q4":  # it sums words, of four bytes, which it keeps too
            sums = (sums + tile) // 4
        return batch <= 4 and sums <= 96 * 32 * c["num_warps"] and tile * c["num_stages"] <= TILE  # in registers

    every = [c for c in every if fits(c) and c != default]
    return [dict(default), *random.Random(seed).sample(every, min(trials, len(every)))]


@functools.lru_cache(1)
def _known(cell: str) -> Job:
    return _jobs(json.loads(cell), 1)[0]


def launch(cell: str, config: Config) -> None:
    """Run a cell's kernel in some config, in a process of its own: what is compiled stays on disk."""
    job = _known(cell)
    with contextlib.suppress(Exception), tiles().configured(job.key, **config):
        job.run()


@functools.cache
def compilers() -> concurrent.futures.Executor:
    """Processes on every core."""
    return concurrent.futures.ProcessPoolExecutor(len(os.sched_getaffinity(0)), multiprocessing.get_context("spawn"))


@torch.inference_mode()
def _jobs(cell: dict[str, Any], layers: int) -> list[Job]:
    """A cell's kernel on several layers, whose weights are more than any cache holds."""
    shape = SHAPES[cell["shape"]]
    size = shape["intermediate_size"], shape["hidden_size"], cell["rank"]
    made = [make_layer(*size, DEVICE) for _ in range(layers)]
    act, name = ACTIVATIONS[cell["shape"]], cell["kernel"]
    return [jobs(layer, cell["batch"], act, cell["sparsity"], name)[name] for layer in made]


class Measure:
    """Knows the bandwidth of a copy."""

    def __init__(self) -> None:
        if not triton_runs(torch.device(DEVICE)):
            raise SystemExit(
                "this measures Triton kernels: it needs a GPU with Triton, or TRITON_INTERPRET=1 to try it"
            )
        torch.manual_seed(0)
        self.copy = functools.cache(copy_bandwidth)

    def environment(self) -> dict[str, Any]:
        triton = importlib.import_module("triton")
        versions = {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()}
        name = torch.cuda.get_device_name() if GPU else "cpu, interpreted"
        return {"device": name, "copy_gbps": self.copy(), **versions}

    @torch.inference_mode()
    def __call__(self, cell: dict[str, Any]) -> dict[str, Any]:
        shape, name, batch = SHAPES[cell["shape"]], cell["kernel"], cell["batch"]
        width, hidden = shape["intermediate_size"], shape["hidden_size"]
        if name.startswith("dense"):
            columns, rows = (hidden, width) if name == "dense_gate_or_up" else (width, hidden)
            x = torch.randn(batch, columns, device=DEVICE, dtype=torch.bfloat16)
            weights = [torch.randn(rows, columns, device=DEVICE, dtype=torch.bfloat16) for _ in range(4)]
            return self._row(microseconds([partial(F.linear, x, weight) for weight in weights]), width * hidden * 2)
        same = _jobs(cell, 4 if GPU else 1)
        check(name, same[0])
        key, needed = same[0].key, round(statistics.mean(job.bytes for job in same))
        row = {"key": key, **self._row(microseconds([job.run for job in same]), needed), "refused": 0}
        tried = configs(key, batch, cell["trials"]) if cell["trials"] else []
        if tried and GPU:
            list(compilers().map(partial(launch, json.dumps(cell)), tried))
        timed: list[dict[str, Any]] = []
        for config in tried:
            try:
                with tiles().configured(key, **config):
                    check(name, same[0])
                    timed.append({**self._row(microseconds([job.run for job in same]), needed), "config": config})
            except Exception:  # a tile that does not fit says so in many ways
                row["refused"] += 1
        row["timed"] = len(timed)
        row["best"] = min(timed, key=lambda each: each["microseconds"], default=None)
        return row

    def _row(self, time: float, needed: int) -> dict[str, Any]:
        speed = needed / time / 1000
        return {"microseconds": time, "bytes": needed, "gbps": speed, "of_copy": speed / self.copy()}
