"""How near the Triton kernels come to the memory's bandwidth, at the FFN shapes of known models; needs a GPU.

bfloat16. Each time is the median of replays of a CUDA graph that goes through several layers' weights in turn, so that
none of them is found in a cache, divided by the layers. GB/s count the bytes that must be read: the rows that are kept,
once for all sequences where they share the list. Beside them stand the dense products by the vendor's library and the
bandwidth of a copy. Every result is first compared with its reference.

Settings of a cell: shape; kernel, one that `jobs` names, dense_gate_or_up or dense_down; batch; sparsity; rank; trials,
other block sizes to try.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import platform
import random
import statistics
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
from caprese.models.shapes import SHAPES

ACTIVATIONS = {"llama-3.1-8b": "silu", "gemma-2-9b": "gelu_tanh", "qwen2.5-14b": "silu"}
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


class Measure:
    """Knows the bandwidth of a copy."""

    def __init__(self) -> None:
        if not torch.cuda.is_available() or not triton_runs(torch.device("cuda")):
            raise SystemExit("this measures Triton kernels and needs a GPU with Triton; there is none")
        torch.manual_seed(0)
        self.copy = functools.cache(copy_bandwidth)

    def environment(self) -> dict[str, Any]:
        triton = importlib.import_module("triton")
        versions = {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()}
        return {"device": torch.cuda.get_device_name(), "copy_gbps": self.copy(), **versions}

    @torch.inference_mode()
    def __call__(self, cell: dict[str, Any]) -> dict[str, Any]:
        shape, act, name, batch = SHAPES[cell["shape"]], ACTIVATIONS[cell["shape"]], cell["kernel"], cell["batch"]
        # a layer's weights are more than any cache holds; four of them leave nothing of the first when its turn comes
        size = shape["intermediate_size"], shape["hidden_size"], cell["rank"]
        layers = [make_layer(*size, "cuda") for _ in range(4)]
        width, hidden = layers[0].gate.shape
        if name.startswith("dense"):
            x = torch.randn(batch, hidden if name == "dense_gate_or_up" else width, device="cuda", dtype=torch.bfloat16)
            weights = [layer.gate if name == "dense_gate_or_up" else layer.down.T for layer in layers]
            return self._row(microseconds([partial(F.linear, x, weight) for weight in weights]), width * hidden * 2)
        same = [jobs(layer, batch, act, cell["sparsity"])[name] for layer in layers]
        check(name, same[0])
        needed = round(statistics.mean(job.bytes for job in same))
        row = self._row(microseconds([job.run for job in same]), needed)
        row["sweep"] = []
        for config in configs(same[0].key, cell["trials"]) if cell["trials"] else []:
            try:
                with tiles().configured(same[0].key, **config):
                    row["sweep"].append({**self._row(microseconds([job.run for job in same]), needed), **config})
            except Exception as error:  # a tile that does not fit says so in many ways
                row["sweep"].append({**config, "refused": type(error).__name__})
                torch.cuda.synchronize()
        row["best"] = min(
            (each for each in row["sweep"] if "microseconds" in each), key=lambda e: e["microseconds"], default=None
        )
        return row

    def _row(self, time: float, needed: int) -> dict[str, Any]:
        speed = needed / time / 1000
        return {"microseconds": time, "bytes": needed, "gbps": speed, "of_copy": speed / self.copy()}
