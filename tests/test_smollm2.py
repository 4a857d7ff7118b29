"""End to end on a real language model, small: what the demo does, in a minute."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import islice

import pytest
import torch

import caprese
from caprese.data_gen import OWN, Here, OwnPrompts, Samples, Shards
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


def test_it_writes_prompts_of_its_own(smollm2, tmp_path):
    model, tokenizer = smollm2
    config = Samples(prompts="self", self_tokens=48, batch_size=16)
    writer = OwnPrompts(model, Here(model, tokenizer), config, Shards(tmp_path, OWN, {"seed": 0}, 16))
    texts = [prompt.text for prompt in islice(writer(8), 8)]
    assert len(set(texts)) == 8 and all("<|im_" not in text for text in texts)
    assert sum(len(text.split()) > 4 for text in texts) >= 7
    assert writer.sieve.counts["usable"] >= 0.4 * writer.sieve.counts.total()


@pytest.mark.parametrize(("method", "sparsity"), [("griffin", 0.5), pytest.param("cats", 0.7, marks=pytest.mark.slow)])
def test_recover(smollm2, hub, tmp_path, method, sparsity):
    model, tokenizer = smollm2
    recipe = resolve_recipe(
        "smollm2-135m",
        method=method,
        sparsity=sparsity,
        output=str(tmp_path / "out"),
        samples={
            "prompts": "gym:gsm_symbolic",
            "train": 12,
            "validation": 4,
            "test": 4,
            "max_new_tokens": 40,
            "elsewhere": 3,
            "shard_size": 16,
        },
        end_to_end={"epochs": 1, "learning_rate": 1e-3, "batch_size": 4, "micro_batch": 4},
        evaluation={"generate": False, "latency_tokens": 8},
    )
    report = caprese.recover(model, tokenizer, recipe)
    quality = report["quality"]
    assert report["parameters"]["fraction"] < 0.01
    # a few samples already give a good part back
    assert report["recovered_fraction"]["kl"] > 0.25
    assert report["sources"].keys() == {"gym:gsm_symbolic", "elsewhere"}
    assert quality["recovered"]["top1_agreement"] > quality["efficient"]["top1_agreement"]
    better = sum(row["recovered"] < row["efficient"] for row in report["layers_error"])
    assert better >= 28
    if method == "griffin" and hub is not None:
        goes_round(model, tokenizer, tmp_path, hub)


def goes_round(model, tokenizer, tmp_path, hub):
    """Pushed, and loaded from the hub in a fresh process: the same tokens."""
    caprese.push(tmp_path / "out", "alice/smollm2-griffin")
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    adapted = caprese.load(model, tmp_path / "out")
    expected = adapted.generate(input_ids=ids, max_new_tokens=24, do_sample=False)[0].tolist()
    caprese.remove(adapted)
    script = (
        "import json, sys, torch, caprese\n"
        "model = caprese.load('smollm2-135m', 'alice/smollm2-griffin')\n"
        "ids = torch.tensor(json.loads(sys.argv[1]))\n"
        "print(json.dumps(model.generate(input_ids=ids, max_new_tokens=24, do_sample=False)[0].tolist()))"
    )
    env = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    run = [sys.executable, "-c", script, json.dumps(ids.tolist())]
    done = subprocess.run(run, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == expected
