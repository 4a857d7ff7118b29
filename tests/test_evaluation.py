"""What is not measured is never a figure: no NaN as 0, nothing recovered where nothing was lost, no mark unearned."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import tiny_llama

import caprese
from caprese.adapters import attach_adapter
from caprese.data_gen import Sample
from caprese.distill import make_batches
from caprese.evaluation import (
    VARIANTS,
    accuracy,
    fidelity,
    finite,
    is_correct,
    lost,
    recovered_fraction,
    time_to_next_token,
)

NAN = float("nan")


def adapted() -> torch.nn.Module:
    return attach_adapter(caprese.apply(tiny_llama(), caprese.Griffin(sparsity=0.5)), 2)


def test_a_kl_that_is_not_a_number_is_not_zero():
    model = adapted()
    next(p for n, p in model.named_parameters() if "lora_B" in n).data[:] = NAN
    figures = fidelity(model, make_batches([Sample([5, 6, 7, 8, 9], 2, "a", "b")], 1))
    assert figures["dense"]["kl"] == 0 < figures["efficient"]["kl"]
    assert math.isnan(figures["recovered"]["kl"]) and finite(figures)["recovered"]["kl"] is None


def quality(dense: float | None, efficient: float | None) -> dict[str, dict[str, float | None]]:
    return {"dense": {"kl": dense, "accuracy": dense}, "efficient": {"kl": efficient, "accuracy": efficient}}


@pytest.mark.parametrize(
    ("dense", "efficient", "kl", "accurate"),
    [
        (0.0, 0.5, True, False),
        (0.5, 0.25, False, True),
        (0.5, 0.5, False, False),
        (0.0, NAN, False, False),
        (None, 0.5, False, False),
        (0.5, None, False, False),
    ],
)
def test_what_was_lost(dense, efficient, kl, accurate):
    assert lost(quality(dense, efficient), "kl") is kl
    assert lost(quality(dense, efficient), "accuracy") is accurate


def test_of_nothing_lost_nothing_is_recovered():
    assert recovered_fraction(0.0, 0.4, 0.1) == pytest.approx(0.75)
    assert recovered_fraction(0.5, 0.5, 0.7) is None
    for missing in range(3):
        values = [0.0, 0.4, 0.1]
        values[missing] = None
        assert recovered_fraction(*values) is None


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5])
def test_latency_of_a_few_tokens(tokens):
    times = time_to_next_token(adapted(), [5, 6, 7], tokens)
    assert times.keys() == set(VARIANTS)
    for figures in times.values():
        assert 0 < figures["ttnt_ms"] < 1e5 and 0 <= figures["spread_ms"] < 1e5


def test_only_mathematics_is_marked():
    def said(completion: str, answer: str | None) -> Sample:
        return Sample([1, 2], 1, "q", completion, answer)

    assert is_correct("so it is 42", "42") is True and is_correct("so it is 41", "42") is False
    assert is_correct("The knight is Alice.", "Alice") is None
    assert is_correct("4", "1 2\n3 4") is None and is_correct("4", "1 2 3 4") is None
    assert accuracy([said("Alice", "Alice"), said("Bob", "Alice")]) is None
    assert accuracy([said("Alice", "Alice"), said("it is 42", "42"), said("it is 1", "2"), said("?", None)]) == 0.5
    assert accuracy([said("it is 42", None)]) is None and accuracy([]) is None
