"""Weights in few bits: what the codes stand for, and products with them against float64."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from caprese.kernels.activations import ACTIVATIONS
from caprese.kernels.quantized import GROUP, WholeFFN, naive, native, products, quantize, runs_whole, sums, whole_ffn


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits, most", [(8, 0.01), (4, 0.1)])
def test_codes_stand_for_the_weight(bits: int, most: float) -> None:
    weight = drawn(24, 96)
    stored = quantize(weight, bits)
    wide = stored.wide(torch.float64)
    assert (wide - weight).norm() / weight.norm() < most
    if bits == 8:  # to the nearest code
        assert ((wide - weight).abs() <= stored.scales[:, None] * 0.5001).all()
    assert torch.equal(stored.take(torch.tensor([3, 1])).wide(torch.float64), wide[[3, 1]])
    assert stored.codes.nbytes == weight.numel() * bits // 8


def test_four_bits_are_better_than_the_largest_by_seven() -> None:
    weight = drawn(64, 128)
    groups = weight.unflatten(1, (-1, GROUP))
    scale = groups.abs().amax(-1, True) / 7
    plain = ((groups / scale).round() * scale).flatten(1)
    assert (quantize(weight, 4).wide(torch.float32) - weight).norm() < 0.9 * (plain - weight).norm()


def test_what_counts_more_is_rounded_better() -> None:
    weight, importance = drawn(64, 128), torch.ones(128)
    importance[::4] = 100.0
    plain, aware = ((quantize(weight, 4, i).wide(torch.float32) - weight)[:, ::4].norm() for i in (None, importance))
    assert aware < 0.9 * plain


@pytest.mark.parametrize("bits", [8, 4])
def test_a_transposed_weight_is_read_by_row(bits: int) -> None:
    """down is stored transposed."""
    weight, z = drawn(64, 96).T, drawn(2, 96)
    stored = quantize(weight, bits)
    assert torch.allclose(sums(z, stored), z @ stored.wide(torch.float32), atol=1e-3)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_model_that_changes_its_type_leaves_theirs(bits: int) -> None:
    """Kernels read codes and scales by address."""
    weight, x = quantize(drawn(24, 64), bits), drawn(1, 64)
    before = products(x, weight)
    for changed in (weight.bfloat16(), weight.float(), weight.double()):
        assert torch.allclose(products(x, changed), before, rtol=0.02, atol=0.02 * float(before.abs().max()))


def test_zeros_stay_zeros() -> None:
    for bits in (8, 4):
        stored = quantize(torch.zeros(3, 64), bits)
        assert torch.equal(stored.wide(torch.float32), torch.zeros(3, 64))


def test_four_bits_want_whole_groups() -> None:
    with pytest.raises(ValueError, match="groups of 32"):
        quantize(drawn(4, 40), 4)


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([8, 4]),
    batch=st.integers(1, 17),
    rows=st.integers(1, 70),
    groups=st.integers(1, 5),
    odd=st.integers(0, 31),
    chosen=st.integers(0, 40),
    seed=st.integers(0, 9),
)
def test_products_are_those_with_the_weight(
    bits: int, batch: int, rows: int, groups: int, odd: int, chosen: int, seed: int
) -> None:
    columns = GROUP * groups + (odd if bits == 8 else 0)
    weight = quantize(drawn(rows, columns, seed=seed), bits)
    index = torch.randint(0, rows, (chosen,), dtype=torch.int32) if chosen else None
    count = chosen or rows
    # of the sum of magnitudes: a sum near zero may be wrong by as much as any other
    for dtype, room in ((torch.float32, 1e-6), (torch.bfloat16, 5e-3), (torch.float64, 1e-13)):
        x, z = (drawn(batch, size, seed=seed + 1).to(dtype) for size in (columns, count))
        for function, reference, given_x in ((products, naive.products, x), (sums, naive.sums, z)):
            wide = weight.take(index).wide(torch.float64) if index is not None else weight.wide(torch.float64)
            wide = wide.T if function is products else wide
            wanted, most = given_x.double() @ wide, given_x.double().abs() @ wide.abs()
            assert torch.allclose(reference(given_x.double(), weight, index), wanted)
            got = function(given_x, weight, index)
            assert got.dtype == dtype and got.shape == wanted.shape
            assert ((got.double() - wanted).abs() <= room * most + 1e-30).all()


@pytest.mark.parametrize("columns", [16384, 16416])
@pytest.mark.parametrize("batch", [1, 4])
def test_the_largest_sums(batch: int, columns: int) -> None:
    """Every code and input at its largest: whole numbers of 32 bits hold the first, floats the second."""
    weight = quantize(torch.ones(5, columns), 8)
    x = torch.ones(batch, columns, dtype=torch.bfloat16)
    wanted = x.double() @ weight.wide(torch.float64).T
    assert torch.allclose(products(x, weight).double(), wanted, rtol=5e-3)
    tall = quantize(torch.ones(columns, 64), 8)
    assert torch.allclose(sums(x, tall).double(), x.double() @ tall.wide(torch.float64), rtol=5e-3)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_one_large_channel_leaves_the_others_their_bits(batch: int, bits: int) -> None:
    """It meets no weight here, so all that is left is what the others have."""
    wide = drawn(96, 512)
    wide[:, 7] = 0
    weight = quantize(wide, bits)
    for times in (30.0, 1e2, 1e4, 1e8):
        x = drawn(batch, 512, seed=3).bfloat16()
        x[:, 7] *= times / x[:, 7].abs()
        wanted, most = (
            f(x.double()) @ f(weight.wide(torch.float64)).T for f in (torch.Tensor.double, torch.Tensor.abs)
        )
        assert ((products(x, weight).double() - wanted).abs() <= 5e-3 * most).all(), times


@pytest.mark.parametrize("batch", [1, 8])
def test_columns_of_small_scales_keep_their_bits_in_sums(batch: int) -> None:
    wide = drawn(64, 128)
    wide[:, 32:64] *= 1e-4
    weight, z = quantize(wide, 4), drawn(batch, 64, seed=3).bfloat16()
    wanted, most = (f(z.double()) @ f(weight.wide(torch.float64)) for f in (torch.Tensor.double, torch.Tensor.abs))
    assert ((sums(z, weight).double() - wanted).abs() <= 5e-3 * most).all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("function", [products, sums])
def test_a_sequence_that_is_no_number_leaves_the_others(function: Any, bits: int) -> None:
    weight, x = quantize(drawn(64, 64), bits), drawn(8, 64).bfloat16()
    x[3, 5] = float("inf")
    assert function(x, weight).isfinite().all(1).tolist() == [row != 3 for row in range(8)]


@settings(max_examples=150, deadline=None)
@given(
    bits=st.sampled_from([4, 8, 16, 32]),
    half=st.booleans(),
    act=st.sampled_from(sorted(ACTIVATIONS)),
    gated=st.booleans(),
    biased=st.booleans(),
    cut=st.sampled_from(["none", "keep", "threshold", "thresholds", "both"]),
    beside=st.booleans(),
    batch=st.integers(1, 9),
    width=st.integers(1, 90),
    groups=st.integers(1, 4),
    odd=st.integers(0, 31),
    chosen=st.integers(0, 40),
    rank=st.integers(0, 5),
    seed=st.integers(0, 9),
)
def test_a_whole_ffn(
    bits: int,
    half: bool,
    act: str,
    gated: bool,
    biased: bool,
    cut: str,
    beside: bool,
    batch: int,
    width: int,
    groups: int,
    odd: int,
    chosen: int,
    rank: int,
    seed: int,
) -> None:
    """Against float64, with what the codes stand for."""
    if not native.library():
        pytest.skip("there is no C compiler")
    dtype, size = torch.bfloat16 if half else torch.float32, GROUP * groups + (odd if bits != 4 else 0)
    first, second = drawn(2 * width if gated else width, size, seed=seed) / size**0.5, drawn(width, size, seed=seed + 1)
    weights: list = [w.to(torch.bfloat16 if bits == 16 else torch.float32) for w in (first, second)]
    weights = [quantize(w, bits) for w in weights] if bits < 16 else weights
    wide, down = (w.double() if bits >= 16 else w.wide(torch.float64) for w in weights)
    x = drawn(batch, size, seed=seed + 2).to(dtype)
    rows = torch.randint(0, width, (chosen,), dtype=torch.int32) if chosen else None
    count = chosen or width
    bias, last = (drawn(len(wide), seed=3), drawn(size, seed=4)) if biased else (None, None)
    keep = drawn(batch, count, seed=5) > 0 if cut in ("keep", "both") else None
    threshold = drawn(batch if cut == "thresholds" else 1, seed=6).abs() / 4 if cut not in ("none", "keep") else None
    left, right = (drawn(rank, size, seed=7).to(dtype), drawn(rank, size, seed=8).to(dtype))

    taken = torch.arange(width) if rows is None else rows.long()
    h = x.double() @ wide.T + (0 if bias is None else bias.double())
    a = ACTIVATIONS[act](h[:, :width])[:, taken]
    z = a * h[:, width:][:, taken] if gated else a
    sure = torch.ones_like(a, dtype=torch.bool)
    if keep is not None:
        z = z * keep
    if threshold is not None:
        z, sure = z * (a.abs() >= threshold[:, None]), (a.abs() - threshold[:, None]).abs() > 1e-4
    wanted = z @ down[taken] + x.double() @ left.double().T @ right.double() + (0 if last is None else last.double())
    apart = None
    if beside and gated and bits >= 16:
        weights[0], apart = weights[0][:width].clone(), weights[0][width:].clone()
    assert runs_whole(x, act)
    more: dict = {"gated": gated, "beside": apart, "rows": rows, "bias": bias, "keep": keep, "threshold": threshold}
    got = whole_ffn(x, WholeFFN(*weights, act, branch=(left, right) if rank else None, last=last, **more))
    assert got.dtype == dtype and got.shape == x.shape
    if sure.all():
        most = float(wanted.abs().max()) + float((z.abs() @ down[taken].abs()).max())
        assert (got.double() - wanted).abs().max() <= (1e-2 if half else 2e-6) * most


def test_gradients_come_through() -> None:
    weight, x = quantize(drawn(32, 64), 8), drawn(3, 64).requires_grad_()
    products(x, weight).sum().backward()
    assert torch.allclose(x.grad, weight.wide(torch.float32).sum(0).expand(3, -1), atol=1e-5)


def test_it_is_compiled_here(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler")
    assert native.library() is not None
    monkeypatch.setenv("CC", "no-such-compiler")
    native.library.cache_clear()
    try:
        assert native.library() is None
        weight, x = quantize(drawn(32, 64), 8), drawn(3, 64)
        assert torch.equal(products(x, weight), naive.products(x, weight))
    finally:
        native.library.cache_clear()


@pytest.mark.slow
@pytest.mark.skipif(
    platform.machine() != "x86_64", reason="of other machines' processors there is no flag to take away"
)
@pytest.mark.parametrize("without", ["-mno-avx512vnni", "-mno-avx512f"])
def test_on_processors_that_have_less(without: str, tmp_path: Path) -> None:
    """The same tests, with the same kernels compiled for less than this machine has."""
    here = {**os.environ, "CC": f"cc {without}", "CAPRESE_CACHE": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:xdist", __file__]
    done = subprocess.run(command, env=here, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_under_compile() -> None:
    weight, x = quantize(drawn(32, 64), 4), drawn(2, 64)

    def step(x: torch.Tensor) -> torch.Tensor:
        return sums(torch.relu(products(x, weight)), weight)

    assert torch.allclose(torch.compile(step, fullgraph=True)(x), step(x), atol=1e-5)
