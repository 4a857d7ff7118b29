"""What is not measured is never a figure: no NaN as 0, nothing recovered where nothing was lost, no mark unearned."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from contextlib import contextmanager

import pytest
import torch
from conftest import byte_tokenizer, tiny_llama

import caprese
from caprese.adapters import attach_adapter
from caprese.data_gen import Sample, Samples
from caprese.distill import make_batches
from caprese.evaluation import (
    VARIANTS,
    Evaluation,
    accuracy,
    evaluate,
    fidelity,
    finite,
    is_correct,
    latency,
    lost,
    recovered_fraction,
    time_to_next_token,
)
from caprese.evaluation.fidelity import variant
from caprese.evaluation.latency import rounds_within
from caprese.inference import is_fused
from caprese.models import unwrap

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


@pytest.mark.parametrize("tokens", [1, 3, 4, 11])
def test_latency_by_a_clock_that_is_known(monkeypatch, tokens):
    """Every pass of a variant takes as long as is said; the first of each turn, and the prompt, are not counted."""
    now, order, running = [0.0], [], [""]
    took = {"dense": itertools.cycle([5, 5, 7, 11]), "efficient": itertools.cycle([3]), "recovered": itertools.count(1)}
    model = adapted()

    @contextmanager
    def known(of, name):
        running[0] = name
        with variant(of, name):
            yield

    def passes(_, args, kwargs, output):
        order.append(running[0])
        new = kwargs["input_ids"].shape[1] == 1
        first = len(order) < 2 or order[-2] != running[0]
        now[0] += 1000.0 if not new else 100.0 if first else next(took[running[0]]) / 1000

    monkeypatch.setattr(latency, "variant", known)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    unwrap(model).register_forward_hook(passes, with_kwargs=True)
    times = time_to_next_token(model, [5, 6, 7], tokens)
    count = max(tokens, latency.TURN - 1)
    milliseconds = {
        "dense": ([5, 5, 7, 11] * 3)[:count],
        "efficient": [3] * count,
        "recovered": list(range(1, count + 1)),
    }
    for name in VARIANTS:
        low, middle, high = statistics.quantiles(milliseconds[name], n=4)
        assert times[name] == pytest.approx({"ttnt_ms": middle, "spread_ms": high - low})
    turns = [name for name, _ in itertools.groupby(order[len(VARIANTS) :])]
    around = [VARIANTS[(turn + place) % 3] for turn in range(-(-count // (latency.TURN - 1))) for place in range(3)]
    assert order[: len(VARIANTS)] == list(VARIANTS) and turns == [name for name, _ in itertools.groupby(around)]
    assert not is_fused(model)


def test_only_mathematics_is_marked():
    def said(completion: str, answer: str | None) -> Sample:
        return Sample([1, 2], 1, "q", completion, answer)

    assert is_correct("so it is 42", "42") is True and is_correct("so it is 41", "42") is False
    assert is_correct("The knight is Alice.", "Alice") is None
    assert is_correct("4", "1 2\n3 4") is None and is_correct("4", "1 2 3 4") is None
    assert accuracy([said("Alice", "Alice"), said("Bob", "Alice")]) is None
    assert accuracy([said("Alice", "Alice"), said("it is 42", "42"), said("it is 1", "2"), said("?", None)]) == 0.5
    assert accuracy([said("it is 42", None)]) is None and accuracy([]) is None


def test_what_the_context_has_no_room_for_is_not_timed():
    model = caprese.apply(tiny_llama(), caprese.Griffin())
    assert rounds_within(model, range(10)) > 4
    model.config.max_position_embeddings = 22
    assert rounds_within(model, range(10)) == 2 and rounds_within(model, range(17)) == 0
    times = time_to_next_token(model, list(range(2, 12)), 64, ("dense", "efficient"))
    assert all(each["ttnt_ms"] > 0 for each in times.values())


def test_kinds_of_which_nothing_is_measured_are_left_out(tmp_path):
    model, tokenizer = caprese.apply(tiny_llama(), caprese.Griffin()), byte_tokenizer()
    adapted = attach_adapter(model, 2)
    rows = [Sample([5, 6, 7, 8, 9], 3, "a", "b", source="long"), Sample([5, 6, 7, 8], 3, "c", "d", source="short")]
    settings = Evaluation(latency_tokens=0, generate=False, batch_size=2)
    found = evaluate(adapted, tokenizer, rows, Samples(), settings, tmp_path, {"seed": 0})
    assert found["sources"].keys() == {"long"} and found["sources"]["long"]["samples"] == 1
    with pytest.raises(caprese.CapreseError, match="nothing to measure"):
        evaluate(adapted, tokenizer, rows[1:], Samples(), settings, tmp_path, {"seed": 0})
