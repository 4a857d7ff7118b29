"""Weights in few bits: what the codes stand for, and products with them against float64."""

from __future__ import annotations

import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from caprese.kernels.quantized import GROUP, naive, native, products, quantize, sums


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
    for dtype, room in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float64, 1e-12)):
        x, z = (drawn(batch, size, seed=seed + 1).to(dtype) for size in (columns, count))
        for function, reference, given_x in ((products, naive.products, x), (sums, naive.sums, z)):
            wanted = reference(given_x.double(), weight, index)
            got = function(given_x, weight, index)
            assert got.dtype == dtype and got.shape == wanted.shape
            assert (got.double() - wanted).abs().max() <= room * wanted.abs().max()


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


def test_under_compile() -> None:
    weight, x = quantize(drawn(32, 64), 4), drawn(2, 64)

    def step(x: torch.Tensor) -> torch.Tensor:
        return sums(torch.relu(products(x, weight)), weight)

    assert torch.allclose(torch.compile(step, fullgraph=True)(x), step(x), atol=1e-5)
