"""Checkpoints in few bits: what is written is what our rounding says, and the branch outlives it."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import byte_tokenizer, recovered, tiny_llama
from families import tiny
from safetensors.torch import load_file
from test_export import pruned
from transformers import AutoConfig, AutoModelForCausalLM

import caprese
from caprese.exports import checkpoint, dense_checkpoints, plan_export
from caprese.exports.compressed import SCHEMES
from caprese.kernels import quantize

pytest.importorskip("compressed_tensors", reason="pip install 'caprese[compressed]'")


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """Reads back in this process; one test starts one of its own."""

    def read_back(path, batch, base):
        with torch.no_grad():
            return AutoModelForCausalLM.from_pretrained(path)(**batch).logits

    monkeypatch.setattr(checkpoint, "_read_back", read_back)


def unpacked(state: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """The weight that a checkpoint holds, float64: four or eight codes to an int32, the first in the lowest bits."""
    scales = state[f"{name}.weight_scale"].double()
    if f"{name}.weight" in state:
        codes = state[f"{name}.weight"].double()
    else:
        packed, (rows, columns) = state[f"{name}.weight_packed"], state[f"{name}.weight_shape"].tolist()
        bits = 32 * packed.shape[1] // columns
        at = torch.arange(0, 32, bits)
        codes = ((packed.long()[..., None] >> at) & (2**bits - 1)).reshape(rows, columns).double() - 2 ** (bits - 1)
    return (codes.unflatten(1, (scales.shape[1], -1)) * scales[..., None]).flatten(1)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_written_is_what_rounding_says(scheme, tmp_path):
    model, applied = tiny_llama(), caprese.apply(tiny_llama(), caprese.Nothing())
    facts = caprese.export(applied, byte_tokenizer(), tmp_path / "out", outtype=scheme)
    assert facts["outtype"] == scheme and facts["dtype"] == "float32"
    state = load_file(tmp_path / "out" / "model.safetensors")
    for name, module in model.model.layers.named_modules(prefix="model.layers"):
        if isinstance(module, torch.nn.Linear):
            weight, got = module.weight.detach(), unpacked(state, name)
            if scheme == "fp8":  # three bits behind the point, and 2^-10 of the largest at the bottom
                largest = weight.abs().amax(1, keepdim=True)
                assert ((got - weight).abs() <= (weight.abs() / 16).clamp_min(largest * 2**-9 / 448 * 8)).all()
            else:
                expected = quantize(weight, 4 if scheme == "w4a16" else 8)
                assert torch.equal(got.float(), expected.wide(torch.float32))
    kept = {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"}
    assert {name for name in state if ".layers." not in name} == kept
    for name in kept:
        assert torch.equal(state[name], model.get_parameter(name))


def test_the_config_is_compressed_tensors_own(tmp_path):
    model = caprese.apply(tiny_llama(), caprese.Nothing())
    found = {}
    for scheme in SCHEMES:
        caprese.export(model, None, tmp_path / scheme, outtype=scheme, dtype=torch.bfloat16)
        config = json.loads((tmp_path / scheme / "config.json").read_text())
        assert config["architectures"] == ["LlamaForCausalLM"] and config["dtype"] == "bfloat16"
        found[scheme] = config["quantization_config"]
        assert found[scheme]["quant_method"] == "compressed-tensors" and found[scheme]["ignore"] == ["lm_head"]
    assert {scheme: each["format"] for scheme, each in found.items()} == {
        "w4a16": "pack-quantized",
        "w8a16": "pack-quantized",
        "w8a8": "int-quantized",
        "fp8": "float-quantized",
    }
    groups = {scheme: each["config_groups"]["layers"] for scheme, each in found.items()}
    four = groups["w4a16"]["weights"]
    assert (four["num_bits"], four["group_size"], four["strategy"], four["symmetric"]) == (4, 32, "group", True)
    for scheme, kind in {"w8a8": "int", "fp8": "float"}.items():
        assert groups[scheme]["weights"]["strategy"] == "channel" and groups[scheme]["weights"]["type"] == kind
        assert groups[scheme]["input_activations"]["dynamic"] and groups[scheme]["input_activations"]["type"] == kind
        assert groups[scheme]["input_activations"]["strategy"] == "token"
    assert groups["w8a16"]["input_activations"] is None


@pytest.mark.parametrize("scheme", SCHEMES)
def test_transformers_computes_with_those_weights(scheme, tmp_path):
    model = recovered(pruned(tiny_llama()))
    facts = caprese.export(model, None, tmp_path / "out", outtype=scheme)
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    config = AutoConfig.from_pretrained(tmp_path / "out")
    del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config).eval()
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert plain.config.intermediate_size == facts["ffn_width"] == 128  # 67, 29 of zeros, the branch's 4, 28 of zeros

    linear = {name.removesuffix(".weight_scale") for name in state if name.endswith(".weight_scale")}
    weights = {f"{name}.weight": unpacked(state, name) for name in linear}
    plain.load_state_dict({name: weights.get(name, state.get(name)) for name in plain.state_dict()})
    ids = torch.randint(2, 258, (2, 17))
    with torch.no_grad():
        difference = (read(ids).logits - plain(ids).logits).abs().max()
    if scheme in ("w4a16", "w8a16"):
        assert difference < 1e-4
    else:  # and rounds inputs
        assert 1e-3 < difference < facts["largest_logit"] * (0.2 if scheme == "w8a8" else 1)


def branch_of(path, scheme, first: int, rank: int) -> torch.Tensor:
    """What the branch's neurons of the first layer add, as a matrix."""
    state = {name.removeprefix("model.layers.0.mlp."): t for name, t in load_file(path / "model.safetensors").items()}
    r = slice(first, first + rank)
    gate, up, down = (unpacked(state, f"{part}_proj") for part in ("gate", "up", "down"))
    assert not gate[r].any()
    act = torch.nn.functional.silu(state["gate_proj.bias"][r].double())
    return down[:, r] @ (act[:, None] * up[r])


@pytest.mark.parametrize("times", [1e-4, 1, 1e4])
@pytest.mark.parametrize("scheme, error", [("w4a16", 0.15), ("w8a16", 0.02), ("w8a8", 0.02), ("fp8", 0.05)])
def test_the_branch_outlives_rounding_whatever_its_sides_magnitudes(scheme, error, times, tmp_path):
    model = recovered(pruned(tiny_llama()), 5, 0.2)
    layer = next(iter(caprese.efficient_methods.applied_ffns(model).values()))
    layer.recovery.lora_A["default"].weight.data /= times
    layer.recovery.lora_B["default"].weight.data *= times
    caprese.export(model, None, tmp_path / "out", outtype=scheme)
    wanted = layer.recovery.get_delta_weight("default").double()
    assert (branch_of(tmp_path / "out", scheme, 96, 5) - wanted).norm() < error * wanted.norm()


def test_the_branch_shares_no_group_with_the_neurons_left(tmp_path):
    model = recovered(pruned(tiny_llama()), scale=0.3)
    caprese.export(model, None, tmp_path / "with", outtype="w4a16")
    bare = pruned(tiny_llama())
    caprese.export(bare, None, tmp_path / "without", outtype="w4a16")
    with_, without = (
        unpacked(load_file(tmp_path / name / "model.safetensors"), "model.layers.1.mlp.down_proj")
        for name in ("with", "without")
    )
    assert torch.equal(with_[:, :96], without) and not with_[:, 67:96].any() and with_[:, 96:100].any()


def test_it_is_read_back_where_caprese_is_not(monkeypatch, tmp_path):
    monkeypatch.undo()
    model = recovered(pruned(tiny_llama()))
    facts = caprese.export(model, None, tmp_path / "out", outtype="w8a16")
    assert 1e-3 < facts["largest_logit_difference"] < 0.1 * facts["largest_logit"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "in 8 bits by row" in card and "by transformers and compressed-tensors alone" in card


@pytest.mark.parametrize("scheme", SCHEMES)
def test_plans_are_what_is_written(scheme, tmp_path):
    model = recovered(pruned(tiny_llama()), 5)
    done = caprese.export(model, None, tmp_path / "out", outtype=scheme)
    planned = plan_export(tiny_llama().config, [caprese.Static(sparsity=0.3)], lambda layer: 5, scheme)
    for key in ("architecture", "ffn_width", "base_ffn_width", "parameters", "base_parameters"):
        assert planned[key] == done[key]
    size = sum(t.nbytes for n, t in load_file(tmp_path / "out" / "model.safetensors").items() if "_shape" not in n)
    assert planned["bytes"] == size


def test_the_dense_model_for_another_engine(tmp_path):
    model = tiny_llama(tie_word_embeddings=True)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    found = dense_checkpoints(model, ["bfloat16", "w4a16"], tmp_path)
    assert list(found) == ["bfloat16", "w4a16"]
    whole = load_file(found["bfloat16"] / "model.safetensors")
    assert {t.dtype for t in whole.values()} == {torch.bfloat16} and "lm_head.weight" not in whole
    assert json.loads((found["bfloat16"] / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(found["w4a16"]).get_output_embeddings().weight.dtype == torch.bfloat16
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_what_cannot_be_is_refused_in_one_line(monkeypatch, tmp_path):
    model = caprese.apply(tiny_llama(hidden_size=48), caprese.Nothing())
    with pytest.raises(caprese.CapreseError, match=r"w4a16 has groups of 32 inputs, and .*q_proj has 48; use w8a8"):
        caprese.export(model, None, tmp_path / "out", outtype="w4a16")
    with pytest.raises(caprese.CapreseError, match=r"w4a16 has groups of 32 inputs"):
        plan_export(tiny_llama(hidden_size=48).config, [], lambda layer: 0, "w4a16")
    caprese.export(model, None, tmp_path / "w8a8", outtype="w8a8")
    with pytest.raises(caprese.CapreseError, match=r"no checkpoint is of `outtype` 'q8_0': w4a16, w8a16, w8a8, fp8"):
        caprese.export(model, None, tmp_path / "out", outtype="q8_0")
    with pytest.raises(caprese.CapreseError, match=r"no GGUF is of type 'w4a16'"):
        caprese.export(model, None, tmp_path / "out", format="gguf", outtype="w4a16")
    with pytest.raises(caprese.CapreseError, match=r"'gpt2' has more than linear layers"):
        caprese.export(caprese.apply(tiny("gpt2"), caprese.Nothing()), None, tmp_path / "out", outtype="w8a8")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        caprese.CapreseError, match=r"w8a8 needs compressed-tensors: pip install 'caprese\[compressed\]'"
    ):
        caprese.export(model, None, tmp_path / "out", outtype="w8a8")
    assert [p.name for p in tmp_path.iterdir()] == ["w8a8"]
