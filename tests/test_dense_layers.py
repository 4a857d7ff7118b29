"""The dense model's layers in C, over one token and several: what torch computes, and what changed is seen."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import tiny_llama
from families import tiny
from transformers import DynamicCache

import caprese
from caprese.kernels.quantized import native
from caprese.models.cache import roomy_cache

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C compiler")


@pytest.fixture
def calls(monkeypatch):
    found: list[str] = []
    real = native.call
    monkeypatch.setattr(native, "call", lambda name, *given: (found.append(name), real(name, *given))[1])
    return found


def fused(kind: str = "llama", **more: object) -> torch.nn.Module:
    model = tiny_llama(eos_token_id=None, **more) if kind == "llama" else tiny(kind, **more)
    return caprese.fuse(caprese.apply(model, caprese.Q8(head=True)))


def ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, 200, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "qwen2", "smollm3"])
@pytest.mark.parametrize("batch", [1, 3])
def test_it_is_the_dense_model(kind, batch, calls):
    """In parts of several tokens and of one, with pads before a sequence and holes between tokens, and cropped."""
    model, plain = fused(kind), tiny_llama(eos_token_id=None) if kind == "llama" else tiny(kind)
    text = ids(batch, 24)
    mask = torch.ones(batch, 24, dtype=torch.long)
    if batch > 1:
        mask[1, :3], mask[2, 9:11] = 0, 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    ours, theirs = roomy_cache(model), DynamicCache(config=plain.config)
    for made, cache in ((model, ours), (plain, theirs)):
        if made is plain:
            whole = calls.count("caprese_layers")
        logits, at = [], 0
        for length in (8, 5, 1, 4, 1, 5):
            part, end = slice(at, at + length), at + length
            how = {"attention_mask": mask[:, :end], "position_ids": positions[:, part]} if batch > 1 else {}
            with caprese.dense(made) if made is model else torch.no_grad():
                out = made(text[:, part], past_key_values=cache, use_cache=True, **how)
                logits.append(out.logits)
                if length == 4:  # and once more
                    cache.crop(-4)
                    again = made(text[:, part], past_key_values=cache, use_cache=True, **how).logits
                    assert (again - out.logits).abs().max() < 1e-5 * out.logits.abs().max()
            at = end
        found = torch.cat(logits, 1)
        if made is model:
            mine = found
    real = mask.bool()
    assert (mine - found)[real].abs().max() < 1e-5 * found[real].abs().max()
    if kind != "smollm3":  # not all of whose layers turn
        assert whole == 6 - (batch == 3) * 0 - 0 if batch == 1 else whole >= 4


@torch.no_grad()
@pytest.mark.parametrize("change", ["weight in place", "new weight", "hook", "adapter", "training", "bfloat16"])
def test_what_changes_is_seen(change):
    model = fused()
    text = ids(1, 12)
    cache = roomy_cache(model)
    with caprese.dense(model):
        model(text[:, :6], past_key_values=cache, use_cache=True)
        model(text[:, 6:9], past_key_values=cache, use_cache=True)
    layer = model.model.layers[1]
    if change == "weight in place":
        layer.mlp.down_proj.weight.data.mul_(2.0)
    elif change == "new weight":
        layer.self_attn.v_proj.weight = torch.nn.Parameter(layer.self_attn.v_proj.weight * 3)
    elif change == "hook":
        layer.mlp.up_proj.register_forward_hook(lambda module, given, out: out * 2)
    elif change == "adapter":
        linear = layer.self_attn.o_proj
        linear.register_forward_pre_hook(lambda module, given: (given[0] * 0.5,))
    elif change == "training":
        layer.train()
    elif change == "bfloat16":
        model.to(torch.bfloat16)
        cache = roomy_cache(model)
        with caprese.dense(model):
            model(text[:, :9], past_key_values=cache, use_cache=True)
    twin = copy.deepcopy(model)
    other = roomy_cache(model)
    with caprese.dense(twin):
        twin(text[:, :9], past_key_values=other, use_cache=True)
    for layer_, known in zip(other.layers, cache.layers, strict=True):
        layer_.keys, layer_.values = known.keys.clone(), known.values.clone()
    caprese.unfuse(twin)
    with caprese.dense(twin), caprese.dense(model):
        right = twin(text[:, 9:], past_key_values=other, use_cache=True).logits.float()
        mine = model(text[:, 9:], past_key_values=cache, use_cache=True).logits.float()
    assert (mine - right).abs().max() < 1e-5 * right.abs().max()


@torch.no_grad()
def test_many_tokens_and_gradients_run_in_torch(calls):
    model = fused()
    cache = roomy_cache(model)
    with caprese.dense(model):
        model(ids(1, 30), past_key_values=cache, use_cache=True)
        model(ids(1, 17), past_key_values=cache, use_cache=True)
        assert "caprese_layers" not in calls
        with torch.enable_grad():
            model(ids(1, 2), past_key_values=cache, use_cache=True)
        assert "caprese_layers" not in calls
        model(ids(1, 16), past_key_values=cache, use_cache=True)
        assert calls.count("caprese_layers") == 1
