"""Prompts as they will run: dense, or through what is left, as every exported checkpoint runs them."""

from __future__ import annotations

import importlib
import json

import pytest
import torch
from conftest import byte_tokenizer, recovered, tiny_llama

import caprese
from caprese.adapters import Adapter
from caprese.data_gen import Prompt, Sample
from caprese.distill import Branches, Distillation, EndToEnd, Layerwise, Teacher, fit, make_batches
from caprese.distill.batches import completion_hidden, lm_logits, prefill
from caprese.distill.layerwise import accumulate, new_moments
from caprese.efficient_methods import phases_of
from caprese.evaluation import checkpoint_fidelity, fidelity
from caprese.evaluation.fidelity import tally_fidelity
from caprese.inference.generate import completions, generate

STATIC = caprese.Static(sparsity=0.4)


def samples(count, seed=0, prompt=9, length=12):
    g = torch.Generator().manual_seed(seed)
    rows = [torch.randint(2, 258, (prompt + length - i % 3,), generator=g).tolist() for i in range(count)]
    return [Sample(ids, prompt - i % 2, "a", "b") for i, ids in enumerate(rows)]


def applied(how="efficient", method=STATIC, adapter=True, **kwargs):
    model = tiny_llama()
    rows = [batch.whole(how) for batch in make_batches(samples(8, seed=9), 4)]
    known = caprese.calibrate(model, method, rows) if method.learns else None
    model = caprese.apply(model, method, calibration=known, prefill=how, **kwargs)
    return recovered(model) if adapter else model


def test_every_token_runs_through_what_is_left():
    model = applied()
    ids = torch.randint(2, 258, (2, 14), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        with caprese.phases(model, [3, 5]):
            assert torch.equal(model(input_ids=ids).logits, whole)  # what is prompt makes no difference
        with caprese.phases(model, [0, 0]):
            assert torch.allclose(model(input_ids=ids).logits, whole, atol=1e-5)
    # in chunks on a cache, and one by one
    cache = None
    parts = []
    with torch.no_grad():
        for part in ids.split([6, 1, 4, 3], 1):
            out = model(input_ids=part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-4)


def test_left_pads_change_nothing():
    model = applied()
    prompt = list(range(5, 14))
    alone = completions(generate(model, [prompt], 8), 1)[0]
    both = completions(generate(model, [prompt, list(range(20, 40))], 8), 2)[0]
    assert alone == both


def test_what_needs_dense_prompts_is_refused():
    with pytest.raises(caprese.CapreseError, match="griffin chooses from each prompt"):
        caprese.apply(tiny_llama(), caprese.Griffin(), prefill="efficient")
    with pytest.raises(caprese.CapreseError, match="leave out `reselect_every`"):
        applied(reselect_every=4)
    model = applied(adapter=False)
    with pytest.raises(caprese.CapreseError, match="leave out `reselect_every`"):
        phases_of(model).reselect(4)
    with pytest.raises(caprese.CapreseError, match="griffin chooses from each prompt"):
        caprese.Recipe(method="griffin", prefill="efficient")
    assert caprese.Recipe(method="static", prefill="efficient").prefill == "efficient"


def test_all_tokens_are_fitted_and_the_first_prediction_counts():
    model = applied(adapter=False)
    rows = samples(4)
    (batch,) = make_batches(rows, 4, first=True)
    moments = new_moments(model)
    accumulate(model, [batch], moments)
    assert moments[0].n == sum(len(s.input_ids) - 1 for s in rows)
    hidden = completion_hidden(model, batch, prefill(model, batch))
    assert len(hidden) == batch.tokens == sum(len(s.completion_ids) for s in rows)


def test_prompts_are_learned_from_throughout(monkeypatch):
    """Every token but each sample's first is predicted, by the logits of a plain pass; distillation asks for it."""
    model = applied()
    rows = samples(4)
    (batch,) = make_batches(rows, 4, first=True, throughout=True)
    ordered = sorted(rows, key=lambda s: (len(s.input_ids), s.input_ids))
    assert batch.predicted.tolist() == [token for s in ordered for token in s.input_ids[1:]]
    with torch.no_grad():
        logits = lm_logits(model, completion_hidden(model, batch, prefill(model, batch)))
        plain = [model(torch.tensor([s.input_ids])).logits[0, :-1] for s in ordered]
    assert torch.allclose(logits, torch.cat(plain), atol=1e-4)
    seen = []
    stage = importlib.import_module("caprese.distill.fit")  # the package has a function of that name
    monkeypatch.setattr(stage, "Teacher", lambda m, batches, room: seen.append(batches) or Teacher(m, batches, room))
    for how in ("efficient", "dense"):
        seen.clear()
        fit(applied(how, adapter=False), rows, rows, Distillation(Branches(2), end_to_end=EndToEnd(epochs=1)))
        assert seen and all(b.throughout is (how == "efficient") for batches in seen for b in batches)


@pytest.mark.parametrize("how", ["closed", "sequential", "adam"])
def test_distillation_sees_prompts_as_they_will_run(how):
    model = applied(adapter=False)
    config = Distillation(
        Branches(8),
        layerwise=Layerwise(how=how, batch_size=4, epochs=2),
        end_to_end=EndToEnd(epochs=2, learning_rate=3e-3, batch_size=4, micro_batch=4),
    )
    fitted = fit(model, samples(16), samples(6, seed=3), config)
    assert fitted.kl["end_to_end"] < fitted.kl["efficient"]
    held = make_batches(samples(6, seed=3), 4, first=True)
    assert fidelity(fitted.model, held)["recovered"]["kl"] == pytest.approx(fitted.kl["end_to_end"], rel=1e-4)


def test_a_saved_adapter_knows_how_its_prompts_run(tmp_path):
    model = applied()
    caprese.save(model, tmp_path)
    loaded = caprese.load(tiny_llama(), tmp_path)
    assert phases_of(loaded).prefill == "efficient"
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    path = tmp_path / "caprese_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prefill": "dense"}))
    with pytest.raises(caprese.CapreseError, match="was altered"):
        Adapter.open(tmp_path)


def test_an_exported_checkpoint_is_measured_as_it_runs(tmp_path):
    model, tokenizer = applied(), byte_tokenizer()
    prompts = {"one": [Prompt("", ids=s.prompt_ids) for s in samples(5)], "two": [Prompt("", ids=[5, 6, 7])]}
    found = {}

    def measure(path):
        found.update(checkpoint_fidelity(model, tokenizer, path, prompts))
        return found

    facts = caprese.export(model, tokenizer, tmp_path / "out", measure=measure)
    assert facts["fidelity"] == found and found["one"]["samples"] == 5
    # the same as caprese measures of the same answers, with prompts as they run
    with caprese.dense(model):
        answers = completions(generate(model, [p.ids for p in prompts["one"]], 64, ends={1}), 5)
    rows = [Sample(list(p.ids) + new, len(p.ids), "", "") for p, new in zip(prompts["one"], answers, strict=True)]
    own = tally_fidelity(Teacher(model, make_batches(rows, 8, first=True), 0))["recovered"].figures()
    assert found["one"]["kl"] == pytest.approx(own["kl"], rel=1e-3) and own["kl"] > 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "## Fidelity" in card and f"| one | 5 | {own['kl']:.4f} |" in card


def test_what_is_applied_otherwise_is_refused(tmp_path):
    caprese.save(applied("efficient"), tmp_path / "efficient")
    caprese.save(applied("dense"), tmp_path / "dense")
    assert phases_of(caprese.load(tiny_llama(), tmp_path / "efficient")).prefill == "efficient"
    model = applied("dense", adapter=False)
    known = Adapter.open(tmp_path / "dense").calibration()
    caprese.remove(model)
    model = caprese.apply(tiny_llama(), STATIC, calibration=known, prefill="efficient")
    with pytest.raises(caprese.CapreseError, match="prompts run efficient on this model, and dense for"):
        caprese.load(model, tmp_path / "dense")


def test_reselection_of_a_recipe_goes_where_nothing_runs_dense_again():
    assert caprese.resolve_recipe("reasoner-tiny", method="static:0.3", prefill="efficient").reselect_every is None
