"""What stands in a base's FFNs and attentions: ordinary linear layers, packed ones, offloaded ones, hooked ones."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import dispatch_model
from conftest import recovered, tiny_llama
from families import tiny
from test_phases import prompts
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import caprese
from caprese.adapters import fingerprint
from caprese.efficient_methods import applied_ffns
from caprese.models.linear import why_not_by_row

MASKING = [caprese.Griffin(), caprese.Griffin(shared_choice=True), caprese.Cats(), caprese.Teal(), caprese.Nothing()]
READING = [caprese.Static(), caprese.Griffin(score="output"), caprese.Int8(), caprese.Nf4()]


class Packed(nn.Module):
    """As GPTQ's and AWQ's: integers and scales, and no `weight`."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        scales = linear.weight.abs().amax(1, keepdim=True) / 7
        self.register_buffer("scales", scales)
        self.register_buffer("qweight", (linear.weight / scales).round().to(torch.int8))

    def dequantised(self) -> torch.Tensor:
        return self.qweight * self.scales

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.dequantised(), self.bias)


class Scaled(nn.Linear):
    """A Linear by its class and the type of its weight, whose weight alone says nothing; as those of 8-bit floats."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, 0.5 * self.weight, self.bias)


def linears(model) -> list[tuple[nn.Module, str]]:
    return [
        (part, name)
        for layer in model.model.layers
        for part in (layer.self_attn, layer.mlp)
        for name, child in part.named_children()
        if isinstance(child, nn.Linear | Packed)
    ]


def packed(kind: str) -> tuple[nn.Module, nn.Module]:
    """A model whose linear layers are packed, and the same with ordinary ones."""
    model, plain = tiny_llama(mlp_bias=True), tiny_llama(mlp_bias=True)
    for (part, name), (other, _) in zip(linears(model), linears(plain), strict=True):
        linear = getattr(part, name)
        if kind == "integers":
            setattr(part, name, Packed(linear))
            getattr(other, name).weight.data = getattr(part, name).dequantised()
        else:
            linear.__class__ = Scaled
            getattr(other, name).weight.data *= 0.5
    return model, plain


def calibrated(model, method):
    rows = [caprese.Tokens(torch.arange(4, 40).view(2, 18), [5, 5])]
    return caprese.calibrate(model, method, rows) if "samples" in method.learns else None


def generated(model, ids, **more):
    return model.generate(input_ids=ids, max_new_tokens=6, do_sample=False, **more)


@pytest.mark.parametrize("kind", ["integers", "scaled"])
@pytest.mark.parametrize("method", MASKING, ids=str)
def test_packed_layers_are_called_and_masked(kind, method):
    ids = prompts(9)[0]
    models = packed(kind)
    choices = [calibrated(model, method) for model in models]
    for (name, one), other in zip((choices[0] or {}).items(), (choices[1] or {}).values(), strict=True):
        assert torch.allclose(one, other, rtol=1e-3), name
    ours, plain = (
        recovered(caprese.apply(model, method, calibration=choices[1]), scale=0.5, seed=4) for model in models
    )
    with torch.no_grad(), caprese.phases(ours, [4]), caprese.phases(plain, [4]):
        assert torch.allclose(ours(input_ids=ids).logits, plain(input_ids=ids).logits, atol=1e-4)
    tokens = generated(plain, ids)
    assert torch.equal(generated(ours, ids), tokens)
    caprese.fuse(ours)
    assert torch.equal(generated(ours, ids), tokens)


@pytest.mark.parametrize("method", READING, ids=str)
def test_what_reads_rows_refuses_packed_layers_by_name(method):
    model, plain = packed("scaled" if method.name == "griffin" else "integers")
    before = dict(vars(model.model.layers[0].mlp))
    with pytest.raises(caprese.CapreseError, match=r"layer 0: mlp\.gate_proj is packed \((Packed|Scaled)\)") as caught:
        caprese.apply(model, method, calibration=calibrated(plain, method))
    assert "\n" not in str(caught.value) and method.name in str(caught.value)
    assert not applied_ffns(model) and vars(model.model.layers[0].mlp) == before


def test_a_mixer_is_not_made_from_packed_attention():
    model, _ = packed("integers")
    with pytest.raises(caprese.CapreseError, match="is packed"):
        caprese.apply(model, caprese.Mamba())
    assert not applied_ffns(model)


def test_a_layer_that_does_not_say_its_size_is_refused():
    model = tiny_llama()
    model.model.layers[1].mlp.down_proj = nn.Sequential(model.model.layers[1].mlp.down_proj)
    with pytest.raises(caprese.CapreseError, match=r"layer 1: mlp\.down_proj: Sequential is no linear layer"):
        caprese.apply(model, caprese.Cats())
    caprese.apply(model, caprese.Cats(layers=[0, 2]))  # the others are as they should be


def test_tensors_that_pack_are_no_rows():
    """As torchao's: an ordinary Linear around a tensor that is not one."""
    model = tiny_llama()
    linear = model.model.layers[0].mlp.down_proj
    weight = linear.weight.detach()
    linear.weight = nn.Parameter(TwoTensor(weight, weight.clone()), requires_grad=False)
    assert "is packed" in why_not_by_row(linear)
    assert fingerprint(model).keys() == {"ffn", "attention", "rest"}
    with pytest.raises(caprese.CapreseError, match=r"layer 0: mlp\.down_proj is packed"):
        caprese.apply(model, caprese.Griffin(score="output"))


def spread_out(offloaded: str, tmp_path) -> nn.Module:
    """A model of three layers whose module `offloaded` is on disk."""
    model = tiny_llama()
    names = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
    for i in range(3):
        names += [f"model.layers.{i}.{n}" for n in ("mlp", "self_attn", "input_layernorm", "post_attention_layernorm")]
    where = {name: "disk" if name == offloaded else "cpu" for name in names}
    return dispatch_model(model, where, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)


@pytest.mark.parametrize("method", [caprese.Griffin(), caprese.Teal(), caprese.Static()], ids=str)
def test_an_offloaded_ffn_is_refused_by_name(method, tmp_path):
    known = calibrated(tiny_llama(), method)
    model = spread_out("model.layers.2.mlp", tmp_path)
    ids = prompts(9)[0]
    before = generated(model, ids)
    for use in (caprese.apply, lambda *a, **k: caprese.calibrate(model, method, [caprese.Tokens(ids, [2])])):
        with pytest.raises(caprese.CapreseError, match=r"layer 2: mlp\.gate_proj is offloaded .*device_map") as caught:
            use(model, method, calibration=known)
        assert "\n" not in str(caught.value)
    assert torch.equal(generated(model, ids), before)


def test_only_what_is_acted_on_must_be_there(tmp_path):
    ids = prompts(9)[0]
    for where, method in (("mlp", caprese.Griffin(layers=[0, 1])), ("self_attn", caprese.Griffin())):
        model = spread_out(f"model.layers.2.{where}", tmp_path / where)
        whole = generated(caprese.apply(tiny_llama(), method), ids)
        assert torch.equal(generated(caprese.apply(model, method), ids), whole)
        with pytest.raises(caprese.CapreseError, match=rf"weight model\.layers\.2\.{where}.* is not in memory"):
            fingerprint(model)
    teal = caprese.Teal(where="attention")
    with pytest.raises(caprese.CapreseError, match=r"layer 2: self_attn\.q_proj is offloaded"):
        caprese.apply(caprese.remove(model), teal, calibration=calibrated(tiny_llama(), teal))


def test_modules_with_hooks_of_accelerate_are_not_run_dense():
    """Spread over several devices, each module's `forward` is accelerate's."""
    ids = prompts(9)[0]
    model = spread_out("", None)
    forwards = [m.forward for m in model.modules()]
    dense = generated(model, ids)
    caprese.apply(model, caprese.Griffin())
    tokens = generated(model, ids)
    assert torch.equal(tokens, generated(caprese.apply(tiny_llama(), caprese.Griffin()), ids))
    assert not torch.equal(tokens, dense)
    caprese.remove(model)
    assert [m.forward for m in model.modules()] == forwards and torch.equal(generated(model, ids), dense)


@pytest.mark.parametrize("kind", ["llama", "phi3", "gpt2", "opt"])
def test_the_module_is_again_what_it_was(kind):
    """Names stay while a method is applied, and nothing is left behind; a copy goes its own way."""
    model = tiny(kind)
    modules = {name: (m, type(m), set(vars(m)), list(m._modules)) for name, m in model.named_modules()}
    names = [name for name, _ in model.named_parameters()]
    caprese.apply(model, caprese.Griffin())
    if kind != "opt":
        assert [name for name, _ in model.named_parameters()] == names
    twin = copy.deepcopy(model)
    caprese.remove(model)
    assert {name: (m, type(m), set(vars(m)), list(m._modules)) for name, m in model.named_modules()} == modules
    assert applied_ffns(twin) and not any(a is b for a, b in zip(twin.modules(), model.modules(), strict=False))
    ids = prompts(9)[0]
    assert torch.equal(generated(twin, ids), generated(caprese.apply(model, caprese.Griffin()), ids))
