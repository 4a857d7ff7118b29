"""Adapters are PEFT's, and know their base."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import recovered, tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model
from test_phases import prompts

import caprese
from caprese.adapters import Adapter, attach_adapter, branch_parameters, fingerprint, get_branches
from caprese.efficient_methods import RecoverySlot, applied_ffns, phases_of

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


def edit(path: Path, **facts: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


@pytest.fixture(params=["of the version before", "of now"])
def directory(request, tmp_path):
    """A good adapter in two layers or more, of which each test spoils a copy."""
    if request.param == "of now":
        caprese.save(attach_adapter(caprese.apply(tiny_llama(), caprese.Griffin()), 2), tmp_path / "it")
        return tmp_path / "it"
    return Path(shutil.copytree(OLD, tmp_path / "it"))


@pytest.mark.parametrize(
    "facts",
    [
        {"lora_alpha": 4},
        {"r": 4},
        {"use_rslora": True},
        {"use_dora": True},
        {"lora_bias": True},
        {"bias": "lora_only"},
        {"fan_in_fan_out": True},
        {"alpha_pattern": {"layers.1.mlp.recovery": 7}},
        {"rank_pattern": {"recovery": 3}},
        {"layers_to_transform": [1]},
        {"layers_to_transform": 0},
        {"layer_replication": [[0, 2]]},
        {"exclude_modules": ["0.mlp.recovery"]},
        {"target_modules": None},
        {"target_modules": []},
        {"target_modules": ["recovery", "up_proj"]},
        {"modules_to_save": ["lm_head"]},
        {"init_lora_weights": "olora"},
        {"peft_type": "IA3"},
    ],
    ids=str,
)
def test_a_configuration_of_pefts_that_was_altered_is_refused(directory, facts):
    edit(directory / "adapter_config.json", **facts)
    with pytest.raises(
        caprese.CapreseError, match=r"adapter_config\.json of .* was altered.*; fetch or make the adapter"
    ):
        Adapter.open(directory)
    with pytest.raises(caprese.CapreseError, match=r"adapter_config\.json"):
        caprese.info(directory)


def test_what_decides_nothing_may_change(directory):
    digest = Adapter.open(directory).digest
    facts = {"inference_mode": False, "peft_version": "9.9", "revision": "main", "auto_mapping": {"a": "b"}}
    edit(directory / "adapter_config.json", base_model_name_or_path="/x", unheard_of=3, loftq_config=None, **facts)
    assert Adapter.open(directory).digest == digest


@pytest.mark.parametrize("layers", [[0], [0, 1, 7], "first-half"], ids=str)
def test_layers_are_those_with_branches(directory, layers):
    path = directory / "caprese_config.json"
    methods = json.loads(path.read_text())["methods"]
    edit(path, methods=[methods[0] | {"layers": layers}])
    for look in (Adapter.open, caprese.info, lambda path: caprese.push(path, "alice/x", dry_run=True)):
        if layers == "first-half" and json.loads(path.read_text()).get("digest") is None:
            look(directory)  # it may be half of a larger base
        else:
            with pytest.raises(caprese.CapreseError, match=r"caprese_config\.json of .* was altered"):
                look(directory)


def test_branches_are_those_that_the_base_has_slots_for(tmp_path):
    """Without a digest, "all" layers of a base may be more than have branches, or fewer."""
    caprese.save(recovered(caprese.apply(tiny_llama(), caprese.Griffin(layers=[0, 1]))), tmp_path)
    path = tmp_path / "caprese_config.json"
    facts = json.loads(path.read_text())
    for layers in ("all", "first-half"):
        methods = [facts["methods"][0] | {"layers": layers}]
        edit(path, caprese_version="0.1.0", digest=None, config_sha256=None, methods=methods)
        tiny = tiny_llama()
        if layers == "first-half":  # of three: the same two
            assert isinstance(caprese.load(tiny, tmp_path), PeftModel)
        else:
            with pytest.raises(caprese.CapreseError, match=r"no branch for model\.layers\.2\.mlp\.recovery"):
                caprese.load(tiny, tmp_path)
            assert not applied_ffns(tiny)


@pytest.mark.parametrize(
    "facts", [{"reselect_every": 8}, {"calibration_sha256": None}, {"weights_sha256": "0" * 64}, {"digest": "0" * 32}]
)
def test_a_sidecar_that_was_altered_is_refused(tmp_path, facts):
    method = caprese.Static(sparsity=0.5)
    known = caprese.calibrate(tiny_llama(), method, [caprese.Tokens(torch.arange(2, 34)[None], [3])])
    caprese.save(recovered(caprese.apply(tiny_llama(), method, calibration=known)), tmp_path)
    edit(tmp_path / "caprese_config.json", **facts)
    with pytest.raises(caprese.CapreseError, match=r"caprese_config\.json of .* was altered"):
        Adapter.open(tmp_path)


@pytest.mark.parametrize("fingerprint", [{}, {"ffn": "0" * 32, "rest": "0" * 32}, {"attention": "", "ffn": ""}])
def test_a_fingerprint_is_whole(directory, fingerprint):
    base = json.loads((directory / "caprese_config.json").read_text())["base"]
    edit(directory / "caprese_config.json", base=base | {"fingerprint": fingerprint})
    with pytest.raises(caprese.CapreseError, match=r"is damaged \(base\.fingerprint: no digest of .*attention"):
        Adapter.open(directory)


def test_pefts_own_saving_over_an_adapter_leaves_it_as_it_was(saved):
    model, path = saved
    digest = Adapter.open(path).digest
    caprese.load(tiny_llama(), path).save_pretrained(path)
    assert Adapter.open(path).digest == digest
    assert torch.equal(greedy(caprese.load(tiny_llama(), path), prompts(6)[0]), greedy(model, prompts(6)[0]))


def test_ranks_by_layer_with_and_without_a_digest(tmp_path):
    model = attach_adapter(caprese.apply(tiny_llama(), caprese.Griffin()), [2, 5, 3], bias=True)
    caprese.save(model, tmp_path)
    assert Adapter.open(tmp_path).ranks == {0: 2, 1: 5, 2: 3}
    edit(tmp_path / "caprese_config.json", caprese_version="0.1.0", digest=None, config_sha256=None)
    assert caprese.info(tmp_path)["rank"] == "2 to 5"
    pattern = json.loads((tmp_path / "adapter_config.json").read_text())["alpha_pattern"]
    edit(tmp_path / "adapter_config.json", alpha_pattern=dict.fromkeys(pattern, 2))
    with pytest.raises(caprese.CapreseError, match=r"adapter_config\.json of .* was altered.*alpha_pattern"):
        Adapter.open(tmp_path)


def test_a_configuration_of_ones_own_is_kept(tmp_path):
    """What PEFT offers beside plain LoRA: it was saved so, and loads so."""
    model = caprese.apply(tiny_llama(), caprese.Griffin())
    config = LoraConfig(target_modules=["recovery"], r=4, lora_alpha=9, use_rslora=True, layers_to_transform=[1])
    model = get_peft_model(model, config).eval()
    for parameter in branch_parameters(model):
        parameter.data.normal_(0, 0.3)
    caprese.save(model, tmp_path)
    loaded, ids = caprese.load(tiny_llama(), tmp_path), prompts(9)[0]
    with torch.no_grad(), caprese.phases(model, [2]), caprese.phases(loaded, [2]):
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    assert Adapter.open(tmp_path).ranks == {1: 4}


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


def test_a_load_that_fails_leaves_a_base_with_methods_as_it_was(tmp_path, monkeypatch):
    """Half of the adapter is on it when something goes wrong."""
    caprese.save(recovered(caprese.apply(tiny_llama(), caprese.Griffin()), scale=0.3), tmp_path)
    model = caprese.apply(tiny_llama(), caprese.Griffin())
    ids = torch.arange(2, 12)[None]
    before = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
    names, attach = list(dict(model.named_modules())), PeftModel.from_pretrained

    def failing(*arguments, **more):
        attach(*arguments, **more)
        raise AttributeError("'NoneType' object has no attribute 'keys'")

    with monkeypatch.context() as broken:
        broken.setattr(PeftModel, "from_pretrained", failing)
        with pytest.raises(caprese.CapreseError, match=r"adapter_config.json .* is damaged .*'keys'"):
            caprese.load(model, tmp_path, reselect_every=4)
    assert list(dict(model.named_modules())) == names and phases_of(model).reselect_every is None
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=6, do_sample=False), before)
    assert phases_of(caprese.load(model, tmp_path, reselect_every=4)).reselect_every == 4
