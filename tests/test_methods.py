"""GRIFFIN and CATS against plain float64 references written from the papers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import caprese
from caprese.efficient_methods import Cats, Griffin, Reads, Static, needs_calibration
from caprese.errors import CapreseError

PROMPT = {"griffin": Griffin, "cats": Cats}


def ffn(width: int) -> SimpleNamespace:
    """As much of an FFN as a choice looks at."""
    down = torch.randn(5, width, generator=torch.Generator().manual_seed(9))
    return SimpleNamespace(width=width, weights=lambda: SimpleNamespace(down=down))


def activations(seed: int, batch: int, tokens: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a = torch.nn.functional.silu(torch.randn(batch, tokens, width, generator=generator))
    return a, a * torch.randn(batch, tokens, width, generator=generator)


def griffin_scores(z: torch.Tensor) -> torch.Tensor:
    """s_j = || z_ij / ||z_i||_2 ||_2 over tokens i; z [T, F]."""
    z = z.double()
    return (z / z.norm(dim=1, keepdim=True)).norm(dim=0)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 999),
    batch=st.integers(1, 3),
    tokens=st.integers(1, 9),
    width=st.integers(2, 40),
    sparsity=st.floats(0.01, 0.99),
    data=st.data(),
)
def test_griffin_keeps_the_neurons_of_the_reference(seed, batch, tokens, width, sparsity, data):
    a, z = activations(seed, batch, tokens, width)
    lengths = [data.draw(st.integers(1, tokens)) for _ in range(batch)]
    mask = torch.stack([torch.arange(tokens) >= tokens - n for n in lengths])  # left padding
    method = Griffin(sparsity=sparsity)
    choice = method.choose(method.statistic(a, a, z, mask), ffn(width))
    k = max(1, round((1 - sparsity) * width))
    for row, n in enumerate(lengths):
        scores = griffin_scores(z[row, tokens - n :])
        kept = choice[row, 0]
        assert int(kept.sum()) == k
        if k < width:
            assert scores[kept].min() >= scores[~kept].max() * (1 - 1e-5)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), prior=st.sampled_from([0.5, 3.0, 100.0]), output=st.booleans())
def test_griffin_with_a_prior_counts_samples_as_so_many_tokens(seed, prior, output):
    """What n tokens of samples say weighs as much as `prior` tokens of the prompt, in all."""
    _, seen = activations(seed, 1, 11, 24)
    _, z = activations(seed + 1, 2, 3, 24)
    method = Griffin(sparsity=0.5, prior=prior, score="output" if output else "activation")
    assert method.learns == {"prompt", "samples"} and Griffin().learns == {"prompt"}
    model = ffn(24)
    known = method.calibrated(method.statistic(seen, seen, seen, torch.ones(1, 11, dtype=torch.bool)), model)
    assert method.fits(known, 24, 0) and known.sum().item() == pytest.approx(1)
    mask = torch.ones(2, 3, dtype=torch.bool)
    choice = method.choose(method.joined(method.statistic(z, z, z, mask), known), model)
    for row in range(2):
        scores = griffin_scores(z[row]).square() + prior * griffin_scores(seen[0]).square() / 11
        scores = scores * model.weights().down.double().norm(dim=0).square() if output else scores
        kept = choice[row, 0]
        assert int(kept.sum()) == 12 and scores[kept].min() >= scores[~kept].max() * (1 - 1e-5)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 999), tokens=st.integers(1, 30), width=st.integers(8, 60), sparsity=st.floats(0.05, 0.95))
def test_cats_threshold_is_the_quantile(seed, tokens, width, sparsity):
    a, z = activations(seed, 1, tokens, width)
    method = Cats(sparsity=sparsity)
    tau = float(method.choose(method.statistic(a, a, z, torch.ones(1, tokens, dtype=torch.bool)), ffn(width)))
    values = a.abs().flatten().double().sort().values
    drop = int(sparsity * len(values))
    # the threshold lies at the quantile, up to the width of a bin
    low = values[max(0, drop - 1)]
    high = values[min(len(values) - 1, drop)]
    assert low * (1 - 2**-6) <= tau <= high * (1 + 2**-6) or drop == 0
    dropped = int((a.abs() < tau).sum())
    near = int(((values > tau * (1 - 2**-5)) & (values < tau * (1 + 2**-5))).sum())
    assert abs(dropped - drop) <= near + 1


@pytest.mark.parametrize("name", PROMPT)
def test_statistics_add_up_over_chunks(name):
    a, z = activations(1, 2, 12, 33)
    method = PROMPT[name](sparsity=0.6)
    mask = torch.ones(2, 12, dtype=torch.bool)
    whole = method.statistic(a, a, z, mask)
    cuts = (slice(0, 5), slice(5, 6), slice(6, 12))
    parts = sum(method.statistic(a[:, s], a[:, s], z[:, s], mask[:, s]) for s in cuts)
    assert torch.allclose(whole.double(), parts.double(), rtol=1e-6)
    assert torch.equal(method.choose(whole, ffn(33)), method.choose(parts, ffn(33)))


@pytest.mark.parametrize("method", [Griffin(), Griffin(score="output"), Cats(), Static()])
def test_autocast_rounds_no_statistic(method, tiny):
    """Products in bfloat16 are for what is computed, not for sums over tokens that a choice is made from."""
    seen = []

    class Watched(type(method)):
        def statistic(self, *tensors):
            seen.append(super().statistic(*(t.float() if t.is_floating_point() else t for t in tensors)))
            return seen[-1]

    watched = Watched(**method.model_dump())
    ids = torch.randint(2, 250, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        rows = [caprese.Tokens(ids, torch.tensor([4, 5]))]
        known = caprese.calibrate(tiny, watched, rows) if needs_calibration(watched) else None
        caprese.apply(tiny, watched, calibration=known)
        with caprese.phases(tiny, [4, 5]):
            tiny(ids)
    caprese.remove(tiny)
    assert seen and all(s.dtype == torch.float32 or not s.is_floating_point() for s in seen)


@pytest.mark.parametrize("name", PROMPT)
def test_padding_does_not_enter_the_statistic(name):
    a, z = activations(2, 1, 7, 20)
    padded = [torch.cat([torch.full((1, 3, 20), 50.0), t], 1) for t in (a, z)]
    mask = torch.tensor([[False] * 3 + [True] * 7])
    method = PROMPT[name](sparsity=0.5)
    alone = method.statistic(a, a, z, torch.ones(1, 7, dtype=torch.bool))
    assert torch.allclose(method.statistic(padded[0], *padded, mask).double(), alone.double(), rtol=1e-6)


def test_a_zero_token_does_not_poison_griffin():
    z = torch.zeros(1, 2, 8)
    z[0, 1, 3] = 1.0
    statistic = Griffin(sparsity=0.5).statistic(z, z, z, torch.ones(1, 2, dtype=torch.bool))
    assert torch.isfinite(statistic).all() and int(statistic.argmax()) == 3


@pytest.mark.parametrize("sparsity", [0, 1, -1, 1.5, float("nan")])
def test_sparsity_stays_inside_its_range(sparsity):
    with pytest.raises(ValueError):
        Griffin(sparsity=sparsity)


def test_layer_lists():
    assert Griffin(layers="all").layer_indices(5) == [0, 1, 2, 3, 4]
    assert Griffin(layers="first-half").layer_indices(5) == [0, 1, 2]
    assert Cats(layers=[4, 1]).layer_indices(5) == [1, 4]
    for bad in ([], [5], [-1], [1, 1]):
        with pytest.raises(CapreseError, match="do not fit"):
            Griffin(layers=bad).layer_indices(5)


def test_what_is_left_to_read():
    ffn = Reads(400, 400, 400)
    assert ffn.after([Griffin(sparsity=0.5)]) == Reads(200, 200, 200)
    assert ffn.after([Cats(sparsity=0.5)]) == Reads(400, 200, 200)
    assert ffn.after([Static(sparsity=0.25), Cats(sparsity=0.5)]).total == 300 + 2 * 150
    assert Reads(0, 400, 400).after([Cats(sparsity=0.5)]) == Reads(0, 400, 200)  # its gate is up
