"""Sparsity auto: measured layer by layer, spent where it costs least, held to its target."""

from __future__ import annotations

import pytest
import torch
from conftest import byte_tokenizer, tiny_llama

import caprese
from caprese.data_gen import Sample
from caprese.distill import HeldOut, make_batches
from caprese.distill.sensitivity import LEVELS, Sensitivity, allocate_sparsity
from caprese.efficient_methods import Cats, Griffin, Static, weights_saved
from caprese.errors import CapreseError
from caprese.models import active_parameters, find_ffns


def samples(count: int = 6) -> list[Sample]:
    generator = torch.Generator().manual_seed(7)
    return [Sample(torch.randint(2, 258, (20,), generator=generator).tolist(), 8, "", "") for _ in range(count)]


def sensitivity(method) -> Sensitivity:
    return Sensitivity(tiny_llama(), method, make_batches(samples(), 3), make_batches(samples(), 3), 1.0)


@pytest.mark.parametrize("method", [Griffin(), Cats(), Static()])
def test_steps_are_single_layers_on_their_hull(method):
    s = sensitivity(method)
    calls = []
    steps = s.steps(calls.append)
    assert len(calls) == len(LEVELS) * 3
    prices = [step.kl / step.saved for step in steps]
    assert prices == sorted(prices)
    for layer in range(3):
        own = [step for step in steps if step.layer == layer]
        assert [step.sparsity for step in own] == sorted({step.sparsity for step in own})
        assert own[-1].sparsity == LEVELS[-1]
        # what the steps add up to is the KL of this layer alone
        top = method.model_copy(update={"layers": [layer], "sparsity": LEVELS[-1]})
        assert sum(step.kl for step in own) == pytest.approx(s.kl(top), rel=1e-4)


def test_the_wanted_part_of_the_weights_is_left():
    s = sensitivity(Griffin())
    method = allocate_sparsity(s, target_active=0.8)
    sites = find_ffns(s.model)
    own = method.by_layer(3)
    left = 1 - sum(weights_saved(sites[i], [m]) for i, m in own.items()) / active_parameters(s.model)
    assert 0.6 < left <= 0.8
    # cheaper than the same sparsity everywhere
    level = 0.2 * active_parameters(s.model) / sum(3 * 32 * 96 for _ in sites)
    assert s.kl(method) < s.kl(Griffin(sparsity=level))
    with pytest.raises(CapreseError, match="out of reach"):
        allocate_sparsity(s, target_active=0.05)


def test_the_kl_measured_with_all_layers_is_within_the_target():
    s = sensitivity(Cats())
    method = allocate_sparsity(s, target_kl=0.05)
    caprese.apply(s.model, method)
    measured = HeldOut(s.model, make_batches(samples(), 3), 1.0).kl()
    caprese.remove(s.model)
    assert 0 < measured <= 0.05
    with pytest.raises(CapreseError, match="allow more"):
        allocate_sparsity(sensitivity(Griffin()), target_kl=1e-9)


@pytest.mark.parametrize("target", [{"target_active": 0.9}, {"target_kl": 0.1}])
def test_a_method_that_saves_nothing_is_refused(target, monkeypatch):
    monkeypatch.setattr(Cats, "reads", lambda self, reads: reads)
    with pytest.raises(CapreseError, match="cats saves no weights"):
        allocate_sparsity(sensitivity(Cats()), **target)


@pytest.mark.parametrize("target", [{"target_active": 0.85}, {"target_kl": 0.1}])
def test_recover_with_sparsity_auto(small_recipe, target):
    recipe = small_recipe.model_copy(update={"sparsity": "auto", "model": "tiny", **target})
    model = tiny_llama()
    report = caprese.recover(model, byte_tokenizer(), recipe)
    assert isinstance(report["sparsity"], list) and len(report["sparsity"]) == len(report["layers"])
    assert [s["name"] for s in report["stages"]] == ["samples", "calibration", "layerwise", "end_to_end", "evaluation"]
    parameters = report["parameters"]
    if "target_active" in target:
        assert parameters["active_efficient"] <= 0.85 * parameters["active_dense"]
    loaded = caprese.load(tiny_llama(), recipe.output)
    ids = torch.tensor([[5, 6, 7]])
    assert loaded.generate(input_ids=ids, max_new_tokens=3, do_sample=False, eos_token_id=None).shape == (1, 6)
