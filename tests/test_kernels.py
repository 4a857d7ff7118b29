"""The kernels against their references, the references against the dense FFN, and kernels compiled ahead of time.

Without a GPU the kernels run in Triton's interpreter, which must be chosen before Triton is first imported, and in a
process full of tests that has long happened. So `test_in_the_interpreter` runs this file again in a process of its own;
`TRITON_INTERPRET=1 pytest tests/test_kernels.py` does the same by hand. On a GPU all runs in place.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers.activations import ACT2FN

from caprese import kernels
from caprese.kernels import cats_select, input_sparse, quantized, replay
from caprese.kernels.activations import ACTIVATIONS
from caprese.kernels.dispatch import INTERPRET, Rows, uses_triton

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
TRITON = importlib.util.find_spec("triton") is not None
KERNELS = TRITON and (GPU or INTERPRET)
"""Whether kernels can run in this process."""

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
DTYPES = (F32, F16, BF16)
# one unit in the last place of what is returned (the interpreter truncates), and sums taken in float32
RELATIVE = {F32: 3e-5, F16: 2.0**-10, BF16: 2.0**-7}
ABSOLUTE = 3e-5


def fits(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether every element is within the rounding of its type; wanted: float64."""
    assert got.shape == wanted.shape and wanted.dtype == F64
    if got.numel() == 0:
        return True
    room = RELATIVE[got.dtype] * wanted.abs() + ABSOLUTE * wanted.abs().max()
    return bool(((got.double() - wanted).abs() <= room).all())


class Case(NamedTuple):
    """An FFN with a branch, inputs, and a choice of rows."""

    x: torch.Tensor
    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor
    gate_bias: torch.Tensor
    up_bias: torch.Tensor
    bias: torch.Tensor
    index: torch.Tensor
    count: torch.Tensor

    def wide(self) -> Case:
        return Case(*(t.double() if t.is_floating_point() else t for t in self))


def make(
    batch: int, own: bool = False, dtype: torch.dtype = F32, d: int = 37, f: int = 53, k: int = 21, r: int = 5, seed=0
) -> Case:
    """No number near zero, so that no term of a sum can go missing unnoticed."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape: int, scale: float = 1.0) -> torch.Tensor:
        sign = torch.randint(0, 2, shape, generator=generator) * 2 - 1
        return (sign * (torch.rand(shape, generator=generator) + 0.5) * scale).to(DEVICE, dtype)

    s = d**-0.5
    index = torch.stack([torch.randperm(f, generator=generator)[:k] for _ in range(batch if own else 1)])
    count = torch.randint(0, k + 1, (len(index),), generator=generator)
    return Case(
        numbers(batch, d),
        *(numbers(f, d, scale=s), numbers(f, d, scale=s), numbers(f, d)),
        *(numbers(r, d, scale=s), numbers(r, d)),
        *(numbers(f), numbers(f), numbers(d)),
        index.to(DEVICE),
        count.to(DEVICE, torch.int32),
    )


def operation(name: str, part: str = "") -> Any:
    """The module of an operation, or a part of it (`naive`, `triton`); the package's attribute is the function."""
    return importlib.import_module(f"caprese.kernels.{name}{part and '.' + part}")


def tiles() -> Any:
    return importlib.import_module("caprese.kernels.tiles")


def _gate_up(function: Any) -> Any:
    """With every tensor an argument of its own."""

    def call(x, gate, up, index, act, left=None, gate_bias=None, up_bias=None, count=None, a=None) -> torch.Tensor:
        return function(x, gate, up, Rows(index, count), act, left, (gate_bias, up_bias), a)

    call.__name__ = "gate_up"
    return call


def _down(function: Any) -> Any:
    def call(z, down, index, right=None, bias=None, count=None, **more) -> torch.Tensor:
        return function(z, down, Rows(index, count), right, bias, **more)

    call.__name__ = "down"
    return call


gate_up, down = _gate_up(kernels.gate_up), _down(kernels.down)
reference_gate_up = _gate_up(operation("gate_up", "naive").gate_up)
reference_down = _down(operation("down", "naive").down)
reference_cats_select = operation("cats_select", "naive").cats_select
reference_input_sparse = operation("input_sparse", "naive").input_sparse


def both(function: Any, c: Case, *names: str | None, **keywords: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A public function as it is and its reference in float64, called with fields of a case by name.

    Keywords that are strings name fields too, but for `act`.
    """
    reference = globals()[f"reference_{function.__name__}"]

    def call(f: Any, case: Case, extra: dict[str, Any]) -> torch.Tensor:
        def field(name: Any) -> Any:
            return getattr(case, name) if isinstance(name, str) and name in case._fields else name

        return f(*map(field, names), **{key: field(value) for key, value in {**keywords, **extra}.items()})

    assert uses_triton(c.x), "the kernel is to be tested, not the reference"
    return call(function, c, {}), call(reference, c.wide(), {})


def own_or_shared(batch: int) -> tuple[bool, ...]:
    return (False,) if batch == 1 else (False, True)


BATCHES = [(batch, own) for batch in (1, 2, 3, 16) for own in own_or_shared(batch)]


class TestKernels:
    __test__ = KERNELS

    @pytest.mark.parametrize("batch, heads, size, width", [(1, 2, 16, 16), (3, 1, 20, 33), (2, 3, 64, 64)])
    @pytest.mark.parametrize("known, new", [(0, 1), (1, 4), (5, 3), (9, 1)])
    def test_verify(self, batch: int, heads: int, size: int, width: int, known: int, new: int) -> None:
        draw = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=draw).to(DEVICE)

        def tokens(length: int) -> replay.Tokens:
            dt = normal(batch, length, heads).exp()
            return replay.Tokens(normal(batch, length, heads, size), dt, normal(batch, length, heads, width))

        old, fresh, C = tokens(known), tokens(new), normal(batch, new, heads, width)
        old = old._replace(dt=old.dt * (normal(batch, known, 1) > 0))  # some were not accepted
        state, A = normal(batch, heads, size, width), -normal(heads).exp()
        y, kept = replay.triton.verify(state, old, fresh, A, C)
        wide = [replay.Tokens(*(t.double() for t in each)) for each in (old, fresh)]
        wanted = replay.naive.replay(state.double(), *wide[0], A.double()) if known else state.double()
        assert fits(kept, wanted)
        assert fits(y, replay.naive.outputs(wanted, *wide[1], A.double(), C.double()))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("batch, own", BATCHES)
    def test_types_and_batches(self, batch: int, own: bool, dtype: torch.dtype) -> None:
        c = make(batch, own, dtype)
        z, wanted = both(gate_up, c, "x", "gate", "up", "index", "silu", "left", "gate_bias", "up_bias")
        assert z.dtype == dtype and fits(z, wanted)
        y = down(z, c.down, c.index, c.right, c.bias)
        w = c.wide()
        assert y.dtype == dtype
        assert fits(y, reference_down(z.double(), w.down, c.index, w.right, w.bias))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("batch, own", BATCHES)
    def test_count(self, batch: int, own: bool, dtype: torch.dtype) -> None:
        c = make(batch, own, dtype, seed=1)
        beyond = torch.arange(c.index.shape[1], device=DEVICE) >= c.count[:, None]
        c = c._replace(index=c.index.masked_fill(beyond, 2**31 - 1))  # never looked at
        z, wanted = both(gate_up, c, "x", "gate", "up", "index", "silu", "left", "gate_bias", "up_bias", count="count")
        assert fits(z, wanted)
        z[:, : c.index.shape[1]].masked_fill_(beyond, float("nan"))
        w = c.wide()
        wanted = reference_down(z.double(), w.down, c.index, w.right, w.bias, c.count)
        assert wanted.isfinite().all() and fits(down(z, c.down, c.index, c.right, c.bias, c.count), wanted)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("batch", [1, 2, 5, 16])
    @pytest.mark.parametrize("bits, columns", [(8, 96), (4, 96), (4, 544)])  # the last: more than a block
    def test_few_bits(self, bits: int, columns: int, batch: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(bits)
        weight = kernels.quantize(torch.randn(53, columns, generator=generator), bits).to(DEVICE)
        chosen = torch.randperm(53, generator=generator)[:21].int().to(DEVICE)
        for rows, k in ((None, 53), (chosen, 21)):
            x, z = (torch.randn(batch, size, generator=generator).to(DEVICE, dtype) for size in (columns, k))
            for name, given_x in (("products", x), ("sums", z)):
                got = getattr(kernels, name)(given_x, weight, rows)
                wanted = getattr(quantized.naive, name)(given_x.double(), weight, rows)
                # where matrices are multiplied, code times scale is rounded to their type
                assert (got.double() - wanted).abs().max() <= RELATIVE[dtype] * wanted.abs().max()

    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("kind", ["gated", "plain", "given"])
    @pytest.mark.parametrize("act", ACTIVATIONS)
    def test_activations_and_biases(self, act: str, kind: str, bias: bool) -> None:
        c = make(2)
        biases = {"up_bias": "up_bias"} if bias else {}
        if bias and kind == "gated":
            biases["gate_bias"] = "gate_bias"
        extra = {"a": c.x[:, : c.index.shape[1]]} if kind == "given" else {}
        gate = "gate" if kind == "gated" else None
        assert fits(*both(gate_up, c, "x", gate, "up", "index", act, "left", **biases, **extra))

    @pytest.mark.parametrize("act", ACTIVATIONS)
    def test_activations_far_out(self, act: str) -> None:
        x = torch.tensor([[1.0]], device=DEVICE)
        weight = torch.tensor([-200.0, -30, -1e-3, 0, 1e-3, 30, 200], device=DEVICE)[:, None]
        wanted = reference_gate_up(x.double(), None, weight.double(), None, act)
        assert fits(gate_up(x, None, weight, None, act), wanted)

    @pytest.mark.parametrize("batch", [1, 3])
    @pytest.mark.parametrize("k", [0, 1, 53, None])
    @pytest.mark.parametrize("r", [0, 1, 19])
    def test_how_many_rows(self, batch: int, k: int | None, r: int) -> None:
        c = make(batch, k=53 if k is None else k, r=r)
        index = None if k is None else c.index.int()
        z, wanted = both(gate_up, c, "x", "gate", "up", index, "gelu", "left")
        assert z.shape == (batch, c.index.shape[1] + r) and fits(z, wanted)
        y = down(z, c.down, index, c.right)
        assert fits(y, reference_down(z.double(), c.wide().down, index, c.wide().right))
        if r == 0:
            assert torch.equal(gate_up(c.x, c.gate, c.up, index, "gelu"), z)
            assert torch.equal(down(z, c.down, index), y)

    @pytest.mark.parametrize("dtype", [F32, BF16])
    @pytest.mark.parametrize("batch", [1, 4])
    def test_more_than_a_block(self, batch: int, dtype: torch.dtype) -> None:
        c = make(batch, batch == 4, dtype, d=300, f=90, k=70, r=35)
        z, wanted = both(gate_up, c, "x", "gate", "up", "index", "silu", "left", count="count")
        assert fits(z, wanted)
        w = c.wide()
        wanted = reference_down(z.double(), w.down, c.index, w.right, count=c.count)
        assert fits(down(z, c.down, c.index, c.right, count=c.count), wanted)
        assert fits(down(z, c.down, c.index, c.right, count=c.count, atomic=True), wanted)

    @settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(
        st.tuples(st.integers(1, 16), st.booleans(), st.sampled_from(DTYPES)),
        st.tuples(st.integers(1, 40), st.integers(1, 40), st.floats(0, 1), st.integers(0, 20)),
        st.tuples(st.booleans(), st.booleans(), st.sampled_from(sorted(ACTIVATIONS))),
    )
    def test_any_shape(self, who: tuple, shape: tuple, options: tuple) -> None:
        batch, own, dtype = who
        d, f, part, r = shape
        counted, biased, act = options
        c = make(batch, own, dtype, d, f, round(part * f), r, seed=d)
        count = c.count if counted else None
        gate_bias, up_bias, bias = (c.gate_bias, c.up_bias, c.bias) if biased else (None, None, None)
        z = gate_up(c.x, c.gate, c.up, c.index, act, c.left, gate_bias, up_bias, count)
        w = c.wide()
        wide_biases = (w.gate_bias, w.up_bias) if biased else (None, None)
        assert fits(z, reference_gate_up(w.x, w.gate, w.up, c.index, act, w.left, *wide_biases, count))
        y = down(z, c.down, c.index, c.right, bias, count)
        wanted = reference_down(z.double(), w.down, c.index, w.right, w.bias if biased else None, count)
        assert fits(y, wanted)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("batch", [1, 2, 3, 16])
    def test_cats_select(self, batch: int, dtype: torch.dtype) -> None:
        c = make(batch, dtype=dtype, f=150)
        a = gate_up(c.x, None, c.gate, None, "silu", up_bias=c.gate_bias)
        # from the kernel's own activations, so that rounding cannot move one across
        for threshold in (
            a.abs().float().quantile(0.5),
            a.abs().float().quantile(0.7, -1),
            torch.zeros(1),
            torch.ones(1) * 9e4,
        ):
            threshold = threshold.to(DEVICE)
            kept, index, count = cats_select(c.x, c.gate, threshold, "silu", c.gate_bias)
            assert index.dtype == count.dtype == torch.int32 and kept.dtype == dtype
            for b in range(batch):
                expected = (a[b].float().abs() >= threshold.reshape(-1)[b if threshold.numel() > 1 else 0]).nonzero()[
                    :, 0
                ]
                n = int(count[b])
                assert index[b, :n].tolist() == expected.tolist()
                assert torch.equal(kept[b, :n], a[b, expected])
                assert not index[b, n:].any() and not kept[b, n:].any()

    @pytest.mark.parametrize("block", [16, 64])
    def test_cats_select_over_blocks(self, block: int) -> None:
        c = make(2, f=150)
        threshold = torch.tensor(0.3, device=DEVICE)
        with tiles().configured("compact", BLOCK=block):
            got = operation("cats_select", "triton").cats_select(c.x, c.gate, threshold, "silu")
        assert all(map(torch.equal, got, cats_select(c.x, c.gate, threshold, "silu")))

    @pytest.mark.parametrize("batch", [1, 3])
    def test_cats_whole(self, batch: int) -> None:
        """cats_select, gate_up and down are the dense FFN with the small activations at zero."""
        c = make(batch, f=150)
        threshold = torch.tensor(0.4, device=DEVICE)
        a, index, count = cats_select(c.x, c.gate, threshold, "silu", c.gate_bias)
        z = gate_up(c.x, None, c.up, index, "silu", c.left, up_bias=c.up_bias, count=count, a=a)
        y = down(z, c.down, index, c.right, c.bias, count)
        w = c.wide()
        dense = torch.nn.functional.silu(w.x @ w.gate.T + w.gate_bias)
        dense = dense * (dense.abs() >= 0.4) * (w.x @ w.up.T + w.up_bias)
        assert 0 < int(count.sum()) < batch * 150
        assert fits(y, dense @ w.down + w.x @ w.left.T @ w.right + w.bias)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("batch", [1, 2, 3, 16])
    @pytest.mark.parametrize("threshold", [0.0, 1.0, 2.0])
    def test_input_sparse(self, batch: int, dtype: torch.dtype, threshold: float) -> None:
        c = make(batch, dtype=dtype, d=70, f=300)
        level = torch.tensor(threshold, device=DEVICE)
        weight = c.gate.T.contiguous()
        wanted = reference_input_sparse(c.x.double(), weight.double(), level, c.wide().gate_bias)
        assert uses_triton(c.x)
        y = input_sparse(c.x, weight, level, c.gate_bias)
        assert y.dtype == dtype and fits(y, wanted)
        if threshold == 2:
            assert torch.equal(y, c.gate_bias.expand_as(y))
            assert not input_sparse(c.x, weight, level).any()

    def test_input_sparse_reads_only_what_is_needed(self) -> None:
        """A row that no sequence needs may hold anything; one that only one needs counts for it alone."""
        c = make(3, d=40)
        x = torch.tensor([0.1, 1.0, 0.1], device=DEVICE)[:, None].repeat(1, 40)
        x[:, ::2] = 0.1
        weight = c.gate.T.contiguous()
        weight[::2] = float("nan")
        y = input_sparse(x, weight, torch.tensor(0.5, device=DEVICE))
        assert not y[[0, 2]].any() and fits(y[1], weight[1::2].double().sum(0))

    def test_unread_rows_may_hold_anything(self) -> None:
        c = make(2)
        others = torch.ones(53, dtype=torch.bool, device=DEVICE)
        others[c.index[0]] = False
        z = gate_up(c.x, c.gate, c.up, c.index, "silu", c.left)
        y = down(z, c.down, c.index, c.right)
        for weight in (c.gate, c.up, c.down):
            weight[others] = float("nan")
        assert torch.equal(gate_up(c.x, c.gate, c.up, c.index, "silu", c.left), z)
        assert torch.equal(down(z, c.down, c.index, c.right), y)

    def test_views(self) -> None:
        """Halves of one matrix, and inputs and lists that are not contiguous."""
        c = make(2)
        gate, up = torch.cat([c.gate, c.up]).chunk(2)
        x = torch.stack([c.x, c.x], -1)[..., 0]
        index = c.index.repeat(2, 1).T.contiguous().T
        wanted = gate_up(c.x, c.gate, c.up, c.index, "silu", c.left)
        assert not x.is_contiguous() and fits(gate_up(x, gate, up, index, "silu", c.left), wanted.double())
        wide = torch.cat([c.down, c.down], 1)[:, :37]
        assert torch.equal(down(wanted, wide, c.index, c.right), down(wanted, c.down, c.index, c.right))

    def test_no_sequence(self) -> None:
        c = make(1)
        z = gate_up(c.x[:0], c.gate, c.up, c.index, "silu", c.left)
        assert z.shape == (0, 26) and down(z, c.down, c.index, c.right).shape == (0, 37)

    @pytest.mark.parametrize("own", [False, True])
    def test_more_sequences_than_a_kernel_takes(self, own: bool) -> None:
        c = make(19, own)
        z, wanted = both(gate_up, c, "x", "gate", "up", "index", "silu", "left", count="count")
        assert fits(z, wanted)
        w = c.wide()
        y = down(z, c.down, c.index, c.right, c.bias, c.count)
        assert fits(y, reference_down(z.double(), w.down, c.index, w.right, w.bias, c.count))
        threshold = torch.linspace(0.2, 0.6, 19, device=DEVICE) if own else torch.tensor(0.4, device=DEVICE)
        _, index, count = cats_select(c.x, c.gate, threshold, "silu")
        _, wanted_index, wanted_count = reference_cats_select(w.x, w.gate, threshold, "silu")
        assert torch.equal(index, wanted_index) and torch.equal(count, wanted_count)
        weight, one = c.gate.T.contiguous(), torch.tensor(1.0, device=DEVICE)
        wanted = reference_input_sparse(w.x, weight.double(), one)
        assert fits(input_sparse(c.x, weight, one), wanted)

    @pytest.mark.parametrize("config", [{"BLOCK_ROWS": 32, "BLOCK_COLS": 16}, {"DOT": 1}, {"DOT": 0}])
    def test_configs(self, config: dict[str, int]) -> None:
        w = (c := make(4, d=70)).wide()
        with tiles().configured("gate_up", **config):
            z = gate_up(c.x, c.gate, c.up, c.index, "silu", c.left)
        assert fits(z, reference_gate_up(w.x, w.gate, w.up, c.index, "silu", w.left))
        for programs in (1, 7):
            with tiles().configured("down", **config, PROGRAMS=programs):
                y = down(z, c.down, c.index, c.right)
            assert fits(y, reference_down(z.double(), w.down, c.index, w.right))

    @pytest.mark.parametrize("batch, own", [(1, False), (3, True), (4, False)])
    def test_two_runs_are_equal(self, batch: int, own: bool) -> None:
        c = make(batch, own, d=140, f=90, k=80, r=20)
        threshold = torch.tensor(0.7, device=DEVICE)

        def run() -> list[torch.Tensor]:
            z = gate_up(c.x, c.gate, c.up, c.index, "silu", c.left, count=c.count)
            sparse = input_sparse(c.x, c.gate.T.contiguous(), threshold)
            selected = cats_select(c.x, c.gate, threshold, "silu")
            return [z, down(z, c.down, c.index, c.right, c.bias, c.count), sparse, *selected]

        assert all(map(torch.equal, run(), run()))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_the_tolerance_notices_a_missing_term(self, dtype: torch.dtype) -> None:
        c = make(2, dtype=dtype)
        z, wanted = both(gate_up, c, "x", "gate", "up", "index", "silu", "left", "gate_bias", "up_bias")
        w = c.wide()
        y, wanted_y = down(z, c.down, c.index, c.right, c.bias), reference_down
        arguments = (w.down, c.index, w.right, w.bias)
        assert fits(z, wanted) and fits(y, wanted_y(z.double(), *arguments))
        for j in range(z.shape[1]):
            assert not fits(y, wanted_y(z.double().index_fill(1, torch.tensor([j], device=DEVICE), 0), *arguments))
        for i in range(c.x.shape[1]):
            x = w.x.index_fill(1, torch.tensor([i], device=DEVICE), 0)
            less = reference_gate_up(x, w.gate, w.up, c.index, "silu", w.left, w.gate_bias, w.up_bias)
            assert not fits(z, less)

    @pytest.mark.skipif(not GPU, reason="CUDA graphs and compilation need a GPU")
    @pytest.mark.parametrize("how", ["compile", "graph"])
    def test_compiled_and_captured(self, how: str) -> None:
        c = make(2, d=64, f=96, k=48, r=8, dtype=BF16)
        threshold = torch.tensor(0.3, device=DEVICE)

        def run(x: torch.Tensor) -> torch.Tensor:
            y = down(gate_up(x, c.gate, c.up, c.index, "silu", c.left), c.down, c.index, c.right)
            a, index, count = cats_select(x, c.gate, threshold, "silu")
            y = y + down(gate_up(x, None, c.up, index, "silu", count=count, a=a), c.down, index, count=count)
            return y + input_sparse(x, c.down[:64], threshold)

        wanted = run(c.x)
        if how == "compile":
            # not bit for bit: a compiled sum need not round in between
            assert torch.allclose(torch.compile(run, fullgraph=True)(c.x).float(), wanted.float(), rtol=0.03, atol=0.03)
            return
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        x = torch.zeros_like(c.x)
        with torch.cuda.graph(graph):
            y = run(x)
        x.copy_(c.x)
        graph.replay()
        assert torch.equal(y, wanted)


# References and refusals; they need no kernel.


@pytest.fixture
def plain() -> Case:
    return make(3, own=True).wide()


def test_references_are_the_dense_ffn(plain: Case) -> None:
    c = plain
    act = torch.nn.functional.silu(c.x @ c.gate.T + c.gate_bias)
    z = act * (c.x @ c.up.T + c.up_bias)
    keep = torch.zeros_like(z).scatter(1, c.index, 1)
    got = gate_up(c.x, c.gate, c.up, c.index, "silu", c.left, c.gate_bias, c.up_bias)
    assert got.dtype == F64
    torch.testing.assert_close(got[:, :21], z.gather(1, c.index))
    torch.testing.assert_close(got[:, 21:], c.x @ c.left.T)
    wanted = (z * keep) @ c.down + c.x @ c.left.T @ c.right + c.bias
    torch.testing.assert_close(down(got, c.down, c.index, c.right, c.bias), wanted)
    torch.testing.assert_close(down(z, c.down, None), z @ c.down)


def test_reference_of_a_plain_ffn(plain: Case) -> None:
    c = plain
    got = gate_up(c.x, None, c.up, None, "gelu_tanh", up_bias=c.up_bias)
    torch.testing.assert_close(got, torch.nn.functional.gelu(c.x @ c.up.T + c.up_bias, approximate="tanh"))


def test_reference_of_cats(plain: Case) -> None:
    c = plain
    for threshold in (torch.tensor(0.4, device=DEVICE), torch.tensor([0.0, 0.4, 9.0], device=DEVICE)):
        a, index, count = cats_select(c.x, c.gate, threshold, "silu", c.gate_bias)
        act = torch.nn.functional.silu(c.x @ c.gate.T + c.gate_bias)
        keep = act.abs() >= threshold.reshape(-1, 1)
        assert count.tolist() == keep.sum(1).tolist()
        z = gate_up(c.x, None, c.up, index, "silu", up_bias=c.up_bias, count=count, a=a)
        torch.testing.assert_close(
            down(z, c.down, index, count=count), (act * keep * (c.x @ c.up.T + c.up_bias)) @ c.down
        )
        for row, kept in zip(index.tolist(), keep, strict=True):
            expected = kept.nonzero()[:, 0].tolist()
            assert row == expected + [0] * (53 - len(expected))


def test_reference_of_input_sparse(plain: Case) -> None:
    c = plain
    threshold = torch.tensor([1.0], device=DEVICE)
    wanted = (c.x * (c.x.abs() >= 1)) @ c.down[:37] + c.bias
    torch.testing.assert_close(input_sparse(c.x, c.down[:37], threshold, c.bias), wanted)


def test_a_gradient_passes() -> None:
    c = make(2)
    left = c.left.clone().requires_grad_()
    z = gate_up(c.x, c.gate, c.up, c.index, "silu", left)
    down(z, c.down, c.index, c.right).sum().backward()
    wanted = torch.outer(c.right.sum(1), c.x.sum(0))
    torch.testing.assert_close(left.grad, wanted, rtol=1e-4, atol=1e-4)


REFUSED = {
    "x: expected": lambda c: gate_up(c.x[0], c.gate, c.up, c.index, "silu"),
    "act: expected": lambda c: gate_up(c.x, c.gate, c.up, c.index, "tanh"),
    "up: expected": lambda c: gate_up(c.x, c.gate, c.up[:, 1:], c.index, "silu"),
    "gate: expected": lambda c: gate_up(c.x, c.gate[1:], c.up, c.index, "silu"),
    "gate: rows": lambda c: gate_up(c.x, c.gate.T.contiguous().T, c.up, c.index, "silu"),
    "up: torch.float16": lambda c: gate_up(c.x, c.gate, c.up.half(), c.index, "silu"),
    "left: expected": lambda c: gate_up(c.x, c.gate, c.up, c.index, "silu", c.left[:, 1:]),
    "up_bias: expected": lambda c: gate_up(c.x, c.gate, c.up, c.index, "silu", up_bias=c.up_bias[1:]),
    "gate_bias: there is no gate": lambda c: gate_up(c.x, None, c.up, c.index, "silu", gate_bias=c.gate_bias),
    "index: expected": lambda c: gate_up(c.x, c.gate, c.up, c.index[:2], "silu"),
    "index: expected int32": lambda c: gate_up(c.x, c.gate, c.up, c.index.float(), "silu"),
    "count: expected": lambda c: gate_up(c.x, c.gate, c.up, c.index, "silu", count=c.count[:1]),
    "count: without": lambda c: gate_up(c.x, c.gate, c.up, None, "silu", count=c.count),
    "a: expected": lambda c: gate_up(c.x, None, c.up, c.index, "silu", a=c.gate[:3]),
    "z: expected": lambda c: down(c.x[:, :21], c.down, c.index, c.right),
    "right: expected": lambda c: down(c.x[:, :26], c.down, c.index, c.right[:, 1:]),
    "bias: expected": lambda c: down(c.x[:, :21], c.down, c.index, bias=c.bias[1:]),
    "threshold: expected": lambda c: cats_select(c.x, c.gate, c.bias[:2], "silu"),
    "gate_bias: expected": lambda c: cats_select(c.x, c.gate, c.bias[:1], "silu", c.bias[:3]),
    "weight_t: expected": lambda c: input_sparse(c.x, c.gate, c.bias[:1]),
    "threshold: expected one": lambda c: input_sparse(c.x, c.gate[:37], c.bias[:3]),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refusals(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        REFUSED[message](make(3, own=True))


@pytest.mark.parametrize(
    "name, wanted",
    [
        *(("silu", "silu"), ("gelu", "gelu"), ("gelu_pytorch_tanh", "gelu_tanh"), ("gelu_new", "gelu_tanh")),
        *(("gelu_fast", "gelu_tanh"), ("relu", "relu"), ("gelu_python", "gelu"), ("swish", "silu")),
        *(("relu2", None), ("quick_gelu", None), ("tanh", None), ("linear", None), ("mish", None)),
    ],
)
def test_activation_name(name: str, wanted: str | None) -> None:
    assert kernels.activation_name(ACT2FN[name]) == wanted


def test_activation_name_of_something_else() -> None:
    assert kernels.activation_name(torch.nn.Linear(3, 3)) is None
    assert kernels.activation_name(lambda x: x.sum()) is None
    assert kernels.activation_name(lambda x: x * float("nan")) is None


# Other processes.


def _python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("TRITON_", "PYTEST_"))}
    root = Path(__file__).parents[1]
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, *arguments],
        env={**kept, "PYTHONPATH": path, **environment},
        cwd=root,
        capture_output=True,
        text=True,
    )


@pytest.mark.skipif(not TRITON or KERNELS, reason="the kernels run in this process, or there is no Triton")
@pytest.mark.parametrize(
    "which", ["TestKernels and not dtype1 and not dtype2", pytest.param("TestKernels", marks=pytest.mark.slow)]
)
def test_in_the_interpreter(which: str) -> None:
    """In one type, or in all."""
    options = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", which)
    probe = _python(str(Path(__file__).with_name("interpreter.py")), TRITON_INTERPRET="1")
    if probe.returncode:
        said = probe.stderr.strip().splitlines()[-1]
        assert "only 0-dimensional arrays can be converted to Python scalars" in said, probe.stderr
        pytest.skip("this Triton's interpreter does not go with this NumPy")  # 3.6 and 2.4: no kernel runs, ours or not
    done = _python("-m", "pytest", *options, __file__, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


_TARGETS = ("80", "90", "100", "gfx942")


@pytest.mark.skipif(not TRITON or INTERPRET, reason="there is no Triton, or it does not compile")
@pytest.mark.parametrize("targets", [_TARGETS[1:2], pytest.param(_TARGETS, marks=pytest.mark.slow)], ids=len)
def test_ahead_of_time(tmp_path: Path, targets: tuple[str, ...]) -> None:
    """Every kernel compiles for NVIDIA's and AMD's architectures, and torch.compile traces the launchers whole."""
    done = _python(__file__, *targets, TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    sizes = [line.split() for line in done.stdout.splitlines() if line.startswith("_")]
    assert {name for name, *_ in sizes} == {
        "_gate_up",
        "_compact",
        "_down",
        "_sum_splits",
        "_products",
        "_sums",
        "_verify",
    }
    assert {target for _, target, *_ in sizes} == set(targets)
    assert all(int(size) > 1000 for *_, size, _ in sizes)
    # what every one of those devices has
    assert all(int(shared) <= 64 * 1024 for *_, shared in sizes), done.stdout
    assert "kernels traced: 10" in done.stdout


def _compile_all(wanted: Sequence[str]) -> None:
    """Print each kernel compiled: name, architecture, type, bytes of machine code, bytes of shared memory."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from caprese.kernels.cats_select.triton import _compact
    from caprese.kernels.down.triton import _down, _sum_splits
    from caprese.kernels.gate_up.triton import _gate_up
    from caprese.kernels.quantized import GROUP
    from caprese.kernels.quantized.triton import _products, _sums
    from caprese.kernels.replay.triton import _ROWS, _verify
    from caprese.kernels.tiles import config_of, launch_options

    flags = dict.fromkeys(
        ("HAS_GATE", "HAS_INDEX", "HAS_COUNT", "HAS_GATE_BIAS", "HAS_UP_BIAS", "HAS_BIAS", "ONE_THRESHOLD"), True
    )
    flags |= {
        **dict.fromkeys(("HAS_A", "OWN", "SPARSE", "ATOMIC", "WIDEN", "DOT"), False),
        "HAS_ROWS": True,
        "GROUP": GROUP,
    }
    matrix = {"DOT": True, "BATCH": 16}
    own = {"OWN": True, "BATCH": 2, "HAS_GATE": False, "HAS_A": True}
    kinds: list[tuple[Any, str, dict[str, Any]]] = [
        (_gate_up, "gate_up", {**matrix, "ACT": "gelu"}),
        (_gate_up, "gate_up", {**own, "ACT": "gelu_tanh"}),
        (_down, "down", {**matrix}),
        (_down, "down", {**own}),
        (_down, "input_sparse", {**matrix, "SPARSE": True, "HAS_INDEX": False, "HAS_COUNT": False}),
        (_compact, "compact", {}),
        (_sum_splits, "sum_splits", {}),
        (_products, "products_q8", {**matrix, "BITS": 8}),
        (_products, "products_q4", {"BATCH": 1, "BITS": 4}),
        (_sums, "sums_q4", {**matrix, "BITS": 4}),
        (_sums, "sums_q8", {"BATCH": 1, "BITS": 8}),
        (_verify, "", {"ROWS": _ROWS, "COLS": 128}),
    ]
    more: list[tuple[Any, str, dict[str, Any]]] = [
        (_gate_up, "gate_up", {"BATCH": 1, "ACT": "silu", "ones": True}),
        (_gate_up, "gate_up", {"BATCH": 2, "ACT": "relu"}),
        (_down, "down", {"BATCH": 1, "ones": True}),
        (_down, "down", {**matrix, "ATOMIC": True}),
        (_down, "input_sparse", {"BATCH": 2, "SPARSE": True, "HAS_INDEX": False}),
        (_products, "products_q4", {**matrix, "BITS": 4}),
        (_sums, "sums_q4", {"BATCH": 2, "BITS": 4}),
    ]
    pointers = {"index_ptr": "*i32", "count_ptr": "*i32", "threshold_ptr": "*fp32", "part_ptr": "*fp32"}
    pointers |= {"rows_ptr": "*i32", "parts_ptr": "*fp32"}
    codes = {8: {"codes_ptr": "*i8", "scales_ptr": "*fp32"}, 4: {"codes_ptr": "*u8", "scales_ptr": "*bf16"}}
    known_targets = {name: GPUTarget("cuda", int(name), 32) for name in _TARGETS[:3]}
    known_targets["gfx942"] = GPUTarget("hip", "gfx942", 64)
    for target, dtype in itertools.product(map(known_targets.__getitem__, wanted), ("bf16", "fp32")):
        most = target.arch in (90, "gfx942")
        for kernel, config, values in kinds + (more if most and dtype == "bf16" else []):
            if values.get("DOT") and dtype == "fp32" and not most:
                continue  # slow to compile, and no different
            settings = config_of(config, values.get("BATCH", 1)) if config else {}
            named = {**flags, **settings, **values}
            signature: dict[str, str] = {}
            constants: dict[str, Any] = {}
            for parameter in kernel.params:
                name = parameter.name
                # an integer argument that is 1 becomes a constant at launch
                if parameter.is_constexpr or (not name.endswith("_ptr") and values.get("ones")):
                    signature[name], constants[name] = "constexpr", named.get(name, 1)
                elif name.endswith("_ptr"):
                    parts = kernel is _down and name == "y_ptr"
                    known = pointers | codes.get(values.get("BITS", 0), {})
                    signature[name] = "*fp32" if parts else known.get(name, f"*{dtype}")
                else:
                    signature[name] = "i32"
            launched = launch_options(settings | values, target.backend == "hip")
            options = {key: value for key, value in launched.items() if key.startswith("num_")}
            source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
            done = triton.compile(source, target=target, options=options)
            binary = done.asm["cubin" if target.backend == "cuda" else "hsaco"]
            print(kernel.__name__, target.arch, dtype, len(binary), done.metadata.shared)


def _trace_all() -> None:
    """Print how many kernels torch.compile finds in one graph; it runs nothing, so that it needs no GPU."""
    import torch.utils._triton

    for name in ("gate_up", "cats_select", "down", "input_sparse"):
        operation(name).triton = operation(name, "triton")
    importlib.import_module("caprese.kernels.dispatch").triton_runs = lambda device: True
    torch.utils._triton.has_triton = lambda: True  # else it does not look for kernels without a GPU
    c = make(2)
    threshold = torch.tensor(0.5)
    found: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        found.append(sum("triton" in str(node.target) for node in graph.graph.nodes))
        return lambda *_: [torch.zeros(2, 37)]

    @torch.compile(fullgraph=True, backend=backend)
    def run(x: torch.Tensor) -> torch.Tensor:
        y = down(gate_up(x, c.gate, c.up, c.index, "silu", c.left), c.down, c.index, c.right)
        a, index, count = cats_select(x, c.gate, threshold, "silu")
        z = gate_up(x, None, c.up, index, "silu", count=count, a=a)
        y = y + down(z, c.down, index, count=count)
        return y + input_sparse(x, c.down[:37], threshold)

    run(c.x)
    assert len(found) == 1
    print("kernels traced:", found[0])


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    DEVICE = "cpu"
    _compile_all(sys.argv[1:])
    _trace_all()
