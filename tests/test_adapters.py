"""Adapters are PEFT's, and know their base."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from conftest import recovered, tiny_llama
from peft import LoraConfig, PeftModel
from test_phases import prompts

import caprese
from caprese.adapters import attach_adapter, branch_parameters, fingerprint, get_branches
from caprese.efficient_methods import RecoverySlot, applied_ffns

OLD = Path(__file__).parent / "data" / "adapter-0.1"
"""An adapter for reasoner-tiny that caprese 0.1.0 made, with the tokens that it gave there, greedily."""


@pytest.fixture
def saved(tmp_path):
    model = recovered(caprese.apply(tiny_llama(), caprese.Griffin(sparsity=0.5)))
    caprese.save(model, tmp_path)
    return model, tmp_path


def greedy(model, ids):
    return model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)


def test_load_gives_the_same_tokens(saved):
    model, path = saved
    ids = prompts(6)[0]
    assert torch.equal(greedy(caprese.load(tiny_llama(), path), ids), greedy(model, ids))


@pytest.mark.parametrize("fused", [False, True])
def test_an_adapter_of_the_version_before_gives_the_tokens_it_gave(fused):
    model, tokenizer = caprese.load_base("reasoner-tiny")
    model = caprese.load(model, OLD, fused=fused)
    for answer in json.loads((OLD / "expected.json").read_text()):
        ids = tokenizer(answer["prompt"], return_tensors="pt").input_ids
        assert ids[0].tolist() == answer["ids"]
        out = model.generate(input_ids=ids, max_new_tokens=80, do_sample=False)
        assert out[0, ids.shape[1] :].tolist() == answer["tokens"]


def test_files_are_pefts_and_the_sidecar(saved):
    _, path = saved
    assert sorted(p.name for p in path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "caprese_config.json",
    ]
    (path.parent / "plain").touch()
    assert len({p.stat().st_mode for p in [*path.iterdir(), path.parent / "plain"]}) == 1  # others may read all of them
    config = json.loads((path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["recovery"] and config["r"] == config["lora_alpha"] == 4
    sidecar = json.loads((path / "caprese_config.json").read_text())
    assert sidecar["methods"] == [
        {
            "name": "griffin",
            "sparsity": 0.5,
            "layers": "all",
            "shared_choice": False,
            "score": "activation",
            "prior": 0.0,
        }
    ]


def test_a_local_base_leaves_no_path_behind(tiny_dir, tmp_path):
    model, _ = caprese.load_base(str(tiny_dir))
    caprese.save(recovered(caprese.apply(model, caprese.Griffin())), tmp_path)
    for file in tmp_path.glob("*.json"):
        assert str(tiny_dir.parent) not in file.read_text()


def test_a_wrong_base_is_refused(saved):
    _, path = saved
    with pytest.raises(caprese.CapreseError, match="other weights"):
        caprese.load(tiny_llama(seed=1), path)
    tuned = tiny_llama()
    tuned.model.layers[1].mlp.up_proj.weight.data.mul_(1.01)
    with pytest.raises(caprese.CapreseError, match="ffn"):
        caprese.load(tuned, path)


def test_an_applied_model_takes_only_the_calibration_it_has(tmp_path):
    method = caprese.Static(sparsity=0.5)
    ids = torch.randint(2, 258, (2, 2, 24), generator=torch.Generator().manual_seed(1))
    one, other = (caprese.calibrate(tiny_llama(), method, [caprese.Tokens(each, [3, 3])]) for each in ids)
    caprese.save(recovered(caprese.apply(tiny_llama(), method, calibration=one)), tmp_path)
    caprese.load(caprese.apply(tiny_llama(), method, calibration=one), tmp_path)
    model = caprese.apply(tiny_llama(), method, calibration=other)
    with pytest.raises(caprese.CapreseError, match=r"with another calibration; caprese\.remove"):
        caprese.load(model, tmp_path)


def test_reselection_is_checked_wherever_the_model_is(saved):
    _, path = saved
    for model in (tiny_llama(), caprese.apply(tiny_llama(), caprese.Griffin(sparsity=0.5))):
        with pytest.raises(caprese.CapreseError, match="reselect_every 0: use a number of tokens from 1"):
            caprese.load(model, path, reselect_every=0)


def test_the_fingerprint_is_of_weights_not_of_types_or_wrappers():
    base = fingerprint(tiny_llama())
    assert fingerprint(recovered(caprese.apply(tiny_llama(), caprese.Griffin()))) == base
    assert fingerprint(tiny_llama().to(torch.bfloat16)) == base
    assert fingerprint(tiny_llama(seed=2)) != base
    edge = tiny_llama()  # float16's smallest normal number, once it is rounded to bfloat16
    edge.model.layers[0].mlp.up_proj.weight.data[0, 0] = 2.0**-14 * (1 - 1e-4)
    assert fingerprint(edge) == fingerprint(copy.deepcopy(edge).to(torch.bfloat16)) != base


def test_the_slot_is_weightless_and_zero(tiny):
    slot = next(iter(applied_ffns(caprese.apply(tiny, caprese.Griffin())).values())).recovery
    assert type(slot) is RecoverySlot and not list(slot.parameters()) and not slot.state_dict()
    x = torch.randn(2, 3, 32)
    assert torch.equal(slot(x), torch.zeros_like(x))


def test_a_fresh_adapter_changes_nothing(tiny):
    caprese.apply(tiny, caprese.Griffin(sparsity=0.5))
    ids = prompts(7)[0]
    before = greedy(tiny, ids)
    assert torch.equal(greedy(attach_adapter(tiny, 4), ids), before)


def test_another_lora_is_no_branch(tiny):
    caprese.apply(tiny, caprese.Griffin())
    adapted = attach_adapter(tiny, 4)
    known = get_branches(adapted)
    other = PeftModel(adapted.base_model.model, LoraConfig(target_modules=["q_proj"], r=2), "other")
    assert get_branches(other).keys() == known.keys() and len(branch_parameters(other)) == len(known) == 6


def test_disable_several_and_switch(saved):
    model, path = saved
    ids = prompts(6)[0]
    with caprese.phases(model, [2]):
        on = model(input_ids=ids).logits
        with model.disable_adapter():
            off = model(input_ids=ids).logits
    assert not torch.allclose(on, off)
    other = caprese.load(tiny_llama(), path)
    other.load_adapter(str(path), "second")
    other.set_adapter("second")
    assert torch.equal(greedy(other, ids), greedy(model, ids))


def test_the_adapter_runs_on_completion_tokens_only(saved):
    model, _ = saved
    ids = prompts(9)[0]
    with caprese.dense(model):
        dense = model(input_ids=ids).logits
    assert torch.equal(model(input_ids=ids).logits, dense)  # prefill
    with caprese.phases(model, [5]):
        mixed = model(input_ids=ids).logits
    assert torch.equal(mixed[:, :5], dense[:, :5]) and not torch.allclose(mixed[:, 5:], dense[:, 5:])


def test_bfloat16_base_with_adapter(saved):
    _, path = saved
    model = caprese.load(tiny_llama().to(torch.bfloat16), path)
    assert isinstance(model, PeftModel)
    assert greedy(model, prompts(5)[0]).shape == (1, 13)
    assert all(torch.isfinite(v).all() for v in get_branches(model).values())


def test_ranks_are_checked(tiny):
    caprese.apply(tiny, caprese.Griffin())
    for rank, said in (
        (0, "rank 0 does not fit"),
        (33, "choose 1 to 32"),
        ([4, 4], "2 ranks were given for 3 applied"),
    ):
        with pytest.raises(caprese.CapreseError, match=said):
            attach_adapter(tiny, rank)


def test_apply_twice_and_remove_twice_are_refused(tiny):
    caprese.apply(tiny, caprese.Griffin())
    with pytest.raises(caprese.CapreseError, match="already applied"):
        caprese.apply(tiny, caprese.Cats())
    caprese.remove(tiny)
    with pytest.raises(caprese.CapreseError, match="nothing to remove"):
        caprese.remove(tiny)
