"""The dense model's layers in C, over one token and several: what torch computes, and what changed is seen."""

from __future__ import annotations

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
        assert whole == 6  # all but the first pass, and one of them twice


class _Doubled(torch.nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def _double(module: torch.nn.Module) -> None:
    module.register_forward_hook(lambda _, given, out: out * 2)


def _swapped(linear: torch.nn.Linear) -> torch.nn.Linear:
    linear.__class__ = _Doubled
    return linear


def _swap_attribute(module: torch.nn.Module) -> None:
    del module.mark
    module.forward = lambda x: 2 * torch.nn.functional.linear(x, module.weight, module.bias)


CHANGES = {
    "weight in place": lambda m: m.model.layers[1].mlp.down_proj.weight.data.mul_(2.0),
    "bias in place": lambda m: m.model.layers[1].mlp.up_proj.bias.data.add_(1.0),
    "new weight": lambda m: setattr(
        m.model.layers[1].self_attn.v_proj,
        "weight",
        torch.nn.Parameter(m.model.layers[1].self_attn.v_proj.weight * 3),
    ),
    "another order": lambda m: setattr(
        m.model.layers[1].self_attn.k_proj.weight,
        "data",
        m.model.layers[1].self_attn.k_proj.weight.data.t().contiguous().t(),
    ),
    "a kind of its own": lambda m: _swapped(m.model.layers[1].self_attn.o_proj),
    "hook on a linear layer": lambda m: _double(m.model.layers[1].mlp.up_proj),
    "hook on a layer": lambda m: m.model.layers[1].register_forward_hook(lambda _, given, out: out * 2),
    "hook on the norm": lambda m: _double(m.model.norm),
    "hook on the activation": lambda m: _double(m.model.layers[1].mlp.act_fn),
    "another activation": lambda m: setattr(m.model.layers[1].mlp, "act_fn", torch.nn.ReLU()),
    "another norm": lambda m: setattr(m.model, "norm", torch.nn.RMSNorm(32)),
    "scaling": lambda m: setattr(m.model.layers[1].self_attn, "scaling", 0.1),
    "a forward of its own": lambda m: setattr(m.model.layers[1].mlp, "forward", lambda x: x),
    "a forward for another attribute": lambda m: _swap_attribute(m.model.layers[1].mlp.up_proj),
    "a hook put in by hand": lambda m: m.model.layers[1].mlp.up_proj._forward_hooks.update(
        {99: lambda _, x, out: out * 2}
    ),
    "training": lambda m: m.model.layers[1].train(),
    "scale of rotation": lambda m: setattr(m.model.rotary_emb, "attention_scaling", 0.5),
    "turned by a view": lambda m: setattr(
        m.model.layers[1].self_attn.q_proj.weight, "data", m.model.layers[1].self_attn.q_proj.weight.data.t()
    ),
    "rotation": lambda m: m.model.rotary_emb.inv_freq.mul_(0.5),
}


@torch.no_grad()
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_is_seen(change, first):
    """Before the first pass in C too."""
    model = fused(mlp_bias=True)
    model.model.layers[1].mlp.up_proj.mark = True
    text = ids(1, 12)
    cache, other = roomy_cache(model), roomy_cache(model)
    with caprese.dense(model):
        model(text[:, :6], past_key_values=cache, use_cache=True)
        if not first:
            model(text[:, 6:9], past_key_values=cache, use_cache=True)
        else:
            model(text[:, 6:9].repeat(1, 6)[:, :17], past_key_values=cache, use_cache=True)  # too many for C
            cache.crop(-14)
    for mine, theirs in zip(cache.layers, other.layers, strict=True):
        theirs.update(mine.keys.clone(), mine.values.clone())
    CHANGES[change](model)
    with caprese.dense(model):
        found = model(text[:, 9:], past_key_values=cache, use_cache=True).logits
        caprese.unfuse(model)
        right = model(text[:, 9:], past_key_values=other, use_cache=True).logits
    assert (found - right).abs().max() < 1e-5 * right.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("form", ["packed", "indexed"])
def test_weights_that_steps_lie_otherwise(form):
    """Steps that read chosen rows in place have down stored by neuron."""
    model = caprese.apply(tiny_llama(eos_token_id=None), [caprese.Griffin(sparsity=0.3)])
    caprese.fuse(model, form)
    plain, text = tiny_llama(eos_token_id=None), ids(1, 12)
    logits = []
    for made in (model, plain):
        cache = roomy_cache(made)
        with caprese.dense(made) if made is model else torch.no_grad():
            made(text[:, :6], past_key_values=cache, use_cache=True)
            logits.append(made(text[:, 6:], past_key_values=cache, use_cache=True).logits)
    assert (logits[0] - logits[1]).abs().max() < 1e-5 * logits[1].abs().max()


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
