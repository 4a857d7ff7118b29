"""What a token reads, against arithmetic written out."""

from __future__ import annotations

import pytest
import torch
from families import tiny

import caprese
from caprese.adapters import attach_adapter
from caprese.efficient_methods import Method, compose, cost, cost_of, make_method, parse_methods

FFN = 32 * 96  # weights of one matrix
# llama's attention: q, k, v and out, and their biases
LINEARS = 32 * 32 + 2 * 16 * 32 + 32 * 32
# of a mixer in its place: z, x, B, C and dt; a convolution of 4; dt, A and D; the norm; out
MIXER = (32 + 64 + 4) * 32 + 64 * 5 + 3 * 4 + 32 + 33 * 32


def methods(text: str) -> tuple[Method, ...]:
    return compose([make_method(facts) for facts in parse_methods(text)])


@pytest.mark.parametrize(
    ("kind", "text", "spared"),
    [
        ("llama", "griffin:0.25:layers=[1]", 3 * FFN / 4),
        ("llama", "cats:0.75", 2 * 2 * FFN * 0.75),
        ("gpt2", "cats:0.75", 2 * FFN * 0.75),  # up is its gate, and is computed whole
        ("phi3", "static:0.5+cats:0.25", 2 * FFN * (0.5 + 2 * (1 - 0.5 * 0.75))),
        ("llama", "teal:0.25", 2 * (3 * FFN + LINEARS) / 4),
        ("llama", "teal:0.25:where=attention:layers=first-half", LINEARS / 4),
        ("llama", "int8", 2 * 3 * FFN * 3 / 4),
        ("llama", "static:0.5+nf4", 2 * 3 * FFN * (1 - 0.5 * 4.5 / 32)),
        ("llama", "none", 0),
        ("llama", "mamba:keep_attention=[0]:start=attention", LINEARS + 96 - MIXER),
        (
            "llama",
            "mamba:keep_attention=0:start=attention+griffin:0.5:layers=[0]",
            2 * (LINEARS + 96 - MIXER) + 3 * FFN / 2,
        ),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_what_a_token_reads(kind: str, text: str, spared: float, tied: bool) -> None:
    model = tiny(kind, tie_word_embeddings=tied)
    total = sum(p.numel() for p in model.parameters())
    read = cost(model, methods(text))
    assert read.base == total
    assert read.dense == read.read("dense") == total - (0 if tied else 258 * 32)
    assert read.efficient == read.recovered == read.dense - spared
    assert read.stand_ins == MIXER * (0 if "mamba" not in text else 2 if "attention=0" in text else 1)


def test_it_reads_its_branches() -> None:
    model = tiny("llama")
    read = cost(model, methods("griffin:layers=[1]"), 5)
    assert read.adapter == 2 * 5 * 32 and read.recovered == read.efficient + read.adapter
    assert cost(model, methods("griffin"), 5, bias=True).adapter == 2 * (2 * 5 + 1) * 32
    rank = 1  # 2 * 32 * 5 parameters over three layers of 32 + 96
    assert read.lora == 3 * rank * (32 + 48)
    assert cost(model, methods("int8"), 6).lora == 2 * 3 * rank * (32 + 96)  # packed rows are not chosen
    assert cost(model, methods("mamba"), 5).adapter == 2 * 32  # nothing to give back: rank 1, on one layer


def test_sequences_that_choose_for_themselves_read_more() -> None:
    model = tiny("llama")

    def spared(text: str, batch: int) -> int:
        return cost(model, methods(text), batch=batch).spared

    for text, left in (("griffin:0.5", 1 / 8), ("griffin:0.5:shared_choice=true", 1 / 2), ("static:0.5", 1 / 2)):
        assert spared(text, 3) == 2 * 3 * FFN * left, text
    assert spared("cats:[0.25, 0.5]", 2) == 2 * FFN * (1 / 16 + 1 / 4)
    assert spared("int8", 8) == spared("int8", 1)
    assert spared("mamba:keep_attention=0:start=attention", 8) == 2 * (LINEARS + 96 - MIXER)


def test_reselection_reads_the_dense_model_now_and_then() -> None:
    model = tiny("llama")
    alone, now = (cost(model, methods("griffin:0.5"), 3, reselect_every=every) for every in (None, 7))
    again = round(alone.dense / 7)
    assert (now.efficient, now.recovered) == (alone.efficient + again, alone.recovered + again)
    assert now.dense == alone.dense


@pytest.mark.parametrize("text", ["griffin:0.3:layers=[1]+teal:0.4:where=attention:greedy=false", "mamba+cats:0.7"])
def test_an_applied_model_reads_what_was_planned(text: str) -> None:
    model, chosen = tiny("llama"), methods(text)
    planned = cost(model, chosen, 3, bias=True, reselect_every=9 if "teal" in text else None)
    calibration = None
    if "teal" in text:
        rows = [caprese.Tokens(torch.arange(2, 26).view(2, 12), [4, 5])]
        calibration = caprese.calibrate(model, chosen, rows)
    caprese.apply(model, chosen, calibration=calibration, reselect_every=9 if "teal" in text else None)
    found = cost_of(attach_adapter(model, 3, bias=True))
    for variant in ("dense", "efficient", "recovered"):
        assert found.read(variant) == planned.read(variant), variant  # type: ignore[arg-type]
    assert (found.base, found.adapter, found.stand_ins) == (planned.base, planned.adapter, planned.stand_ins)
