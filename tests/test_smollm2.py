"""End to end on a real language model, small: what the demo does, in a minute."""

from __future__ import annotations

import pytest
import torch

import caprese
from caprese.recipes import resolve_recipe


@pytest.fixture(scope="module")
def smollm2():
    return caprese.load_base("smollm2-135m")


def test_it_writes_english(smollm2):
    model, tokenizer = smollm2
    ids = tokenizer("The capital of France is", return_tensors="pt")
    text = tokenizer.decode(model.generate(**ids, max_new_tokens=8, do_sample=False)[0])
    assert "Paris" in text


def test_unequal_prompts_in_a_batch_get_the_tokens_they_get_alone(smollm2):
    model, tokenizer = smollm2
    tokenizer.padding_side = "left"
    texts = ["Hello", "The sun is a star, and the moon", "Once upon a time there was a small village by the sea, and"]
    caprese.apply(model, caprese.Griffin(sparsity=0.5))
    try:
        batch = tokenizer(texts, return_tensors="pt", padding=True)
        together = model.generate(**batch, max_new_tokens=12, do_sample=False, eos_token_id=None)
        for row, text in enumerate(texts):
            ids = tokenizer(text, return_tensors="pt")
            alone = model.generate(**ids, max_new_tokens=12, do_sample=False, eos_token_id=None)
            assert torch.equal(alone[0, -12:], together[row, -12:])
    finally:
        caprese.remove(model)


@pytest.mark.parametrize(("method", "sparsity"), [("griffin", 0.5), ("cats", 0.7)])
def test_recover(smollm2, tmp_path, method, sparsity):
    model, tokenizer = smollm2
    recipe = resolve_recipe(
        "smollm2-135m",
        method=method,
        sparsity=sparsity,
        output=str(tmp_path / "out"),
        samples={"train": 12, "validation": 4, "test": 4, "max_new_tokens": 40, "shard_size": 16},
        end_to_end={"epochs": 1, "learning_rate": 1e-3, "batch_size": 4, "micro_batch": 4},
        evaluation={"generate": False, "latency_tokens": 8},
    )
    report = caprese.recover(model, tokenizer, recipe)
    quality = report["quality"]
    assert report["parameters"]["fraction"] < 0.01
    # a twelfth of the demo's samples already gives a good part back
    assert report["recovered_fraction"]["kl"] > 0.25
    assert quality["recovered"]["top1_agreement"] > quality["efficient"]["top1_agreement"]
    better = sum(row["recovered"] < row["efficient"] for row in report["layers_error"])
    assert better >= 28
