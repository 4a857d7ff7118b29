"""Whole decoder layers on a CPU: the tokens of the layers themselves, and only where that is what is asked for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_fused import applied

import caprese
from caprese.efficient_methods import applied_ffns
from caprese.inference.fused.layer import WholeLayer
from caprese.inference.generate import completions, generate
from caprese.kernels.quantized import native, products, quantize
from caprese.models import unwrap
from caprese.models.cache import roomy_cache

PROMPTS = [[5, 9, 11, 30, 31], [7, 8, 9, 200, 40, 41, 42, 43]]


@pytest.fixture(autouse=True)
def _whole_ffns(monkeypatch: pytest.MonkeyPatch) -> None:
    """However fast these small ones are otherwise."""
    monkeypatch.setattr("caprese.inference.fused.forms.whole_is_faster", lambda *shape: True)


pytestmark = pytest.mark.skipif(native.library() is None, reason="there is no C compiler")


def whole(model: Any) -> list[WholeLayer]:
    return [m for m in model.modules() if isinstance(m, WholeLayer)]


def scores(model: Any, prompts: list[list[int]] = PROMPTS, tokens: int = 8) -> torch.Tensor:
    """Of every token of caprese's own loop, [n, B, V]."""
    seen = []

    def sampler(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        seen.append(logits.clone())
        return logits.argmax(-1)

    for _ in generate(model, prompts, tokens, sampler):
        pass
    return torch.stack(seen)


def same(a: torch.Tensor, b: torch.Tensor, within: float = 2e-5) -> None:
    assert (a - b).abs().max() <= within * b.abs().max()


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "smollm3"])
@pytest.mark.parametrize("spec", ["griffin:0.5", "static:0.3+q4", "griffin:0.5+q8:head=true", "cats:0.5+q8:where=ffn"])
def test_layers_of_the_llama_kind_are_the_same_whole(kind: str, spec: str) -> None:
    model = applied(kind, spec)
    wanted = [scores(model), scores(model, PROMPTS[:1])]
    caprese.fuse(model)
    if kind != "smollm3":  # some of its layers know no positions
        assert len(whole(model)) == len(applied_ffns(model))
    same(scores(model), wanted[0])
    same(scores(model, PROMPTS[:1]), wanted[1])
    caprese.unfuse(model)
    assert not whole(model)
    assert torch.equal(scores(model), wanted[0])


@pytest.mark.parametrize("kind", ["gemma", "gemma2", "phi3", "gpt_neox", "gpt2", "opt", "olmo2", "qwen3"])
def test_layers_of_another_kind_stay(kind: str) -> None:
    model = applied(kind, "griffin:0.5")
    caprese.fuse(model)
    assert not whole(model)


def test_all_layers_run_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model = applied("llama", "griffin:0.5+q8")
    caprese.fuse(model)
    calls: list[str] = []
    plain = native.call
    monkeypatch.setattr(native, "call", lambda name, *rest: (calls.append(name), plain(name, *rest))[1])
    scores(model, tokens=4)
    assert calls == ["caprese_layers"] * 3


def test_bfloat16() -> None:
    model = applied("llama", "griffin:0.5+q4").bfloat16()
    wanted = scores(model, tokens=2).float()
    caprese.fuse(model)
    assert len(whole(model)) == len(applied_ffns(model))
    same(scores(model, tokens=2).float(), wanted, 0.05)


def test_what_looks_on_sees_each_layer() -> None:
    """Hooks, and hidden states that are asked for."""
    seen: dict[bool, list[torch.Tensor]] = {}
    for fused in (False, True):
        model = applied("llama", "griffin:0.5+q8")
        base = unwrap(model)
        if fused:
            caprese.fuse(model)
        cache = roomy_cache(model)
        with torch.no_grad():
            base(torch.tensor(PROMPTS[:1]), past_key_values=cache)
            hooked: list[torch.Tensor] = []
            for module in (base.model.layers[1], base.model.layers[1].self_attn.q_proj):
                hook = module.register_forward_hook(lambda m, a, y, to=hooked: to.append(y))
                base(torch.tensor([[8]]), past_key_values=cache)
                hook.remove()
            assert len(hooked) == 2
            out = base(torch.tensor([[7]]), past_key_values=cache, output_hidden_states=True)
            assert len(out.hidden_states) == 1 + len(base.model.layers)
            seen[fused] = [*out.hidden_states, *hooked]
    for a, b in zip(seen[True], seen[False], strict=True):
        same(a, b)


def test_an_adapter_on_the_attention_is_seen() -> None:
    """It comes after the layers were found to be of that kind."""
    from peft.tuners.lora import Linear

    model = applied("llama", "griffin:0.5")
    caprese.fuse(model)
    attention = unwrap(model).model.layers[0].self_attn
    plain = scores(model)
    attention.q_proj = Linear(
        attention.q_proj, "default", r=2, lora_alpha=2, config=model.peft_config["default"], init_lora_weights=False
    )
    attention.q_proj.lora_B["default"].weight.data.fill_(1.0)
    changed = scores(model)
    assert (changed - plain).abs().max() > 1e-3
    caprese.unfuse(model)
    same(changed, scores(model))


def test_a_copy_runs_by_itself() -> None:
    model = applied("llama", "griffin:0.5+q8")
    caprese.fuse(model)
    wanted = scores(model)
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        parameter.data.zero_()
    same(scores(model), wanted)
    del model
    scores(twin)


def test_sequences_that_end_leave() -> None:
    model = applied("llama", "griffin:0.5+q8")
    one = completions(generate(model, PROMPTS, 8), 2)
    caprese.fuse(model)
    assert completions(generate(model, PROMPTS, 8), 2) == one
    end = one[0][3]
    ended = completions(generate(model, PROMPTS, 8, ends=[end]), 2)
    for row, tokens in enumerate(one):
        assert ended[row] == (tokens[: tokens.index(end) + 1] if end in tokens else tokens)


def test_a_copy_is_unfused_by_itself() -> None:
    model = applied("llama", "griffin:0.5+q8")
    caprese.fuse(model)
    twin = copy.deepcopy(model)
    caprese.unfuse(twin)
    assert not whole(twin) and len(whole(model)) == len(applied_ffns(model))
    caprese.fuse(twin)
    same(scores(twin), scores(model))
    caprese.unfuse(model)
    assert not whole(model)


def test_other_weights_of_the_base_are_fused_again() -> None:
    model = applied("llama", "griffin:0.5+q8:where=ffn")
    caprese.fuse(model)
    wanted = scores(model)
    base = unwrap(model)
    with torch.no_grad():
        base.model.layers[0].input_layernorm.weight.mul_(1.5)
        base.model.layers[1].self_attn.k_proj.weight.data = base.model.layers[1].self_attn.k_proj.weight * 0.5
    caprese.fuse(model)
    changed = scores(model)
    assert (changed - wanted).abs().max() > 1e-3
    caprese.unfuse(model)
    same(changed, scores(model))


@pytest.mark.parametrize("spec", ["griffin:0.5", "griffin:0.5+q8", "cats:0.5"])
def test_a_model_that_is_moved_within_a_generation(spec: str) -> None:
    """What lies elsewhere now is not read where it was."""
    model = applied("llama", spec)
    wanted = scores(model)
    caprese.fuse(model)
    seen: list[torch.Tensor] = []

    def sampler(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        seen.append(logits.clone())
        if len(seen) == 4:
            model.double().float()
        if len(seen) == 6:
            for parameter in model.parameters():
                parameter.data = parameter.data.clone()
        return logits.argmax(-1)

    for _ in generate(model, PROMPTS, 8, sampler):
        pass
    same(torch.stack(seen), wanted)


def test_another_cache_is_not_written_into() -> None:
    """Of another type, or of other sequences: what torch says is heard."""
    model = applied("llama", "static:0.3+q8")
    caprese.fuse(model)
    base, ids = unwrap(model), torch.tensor(PROMPTS[:1])
    with torch.no_grad():
        for known in (False, True):  # to C, from the token before
            cache = roomy_cache(model)
            base(ids, past_key_values=cache)
            if known:
                base(torch.tensor([[7]]), past_key_values=cache)
            with pytest.raises(RuntimeError):
                base(torch.tensor([[7], [8]]), past_key_values=cache)
        cache = roomy_cache(model)
        with torch.autocast("cpu", torch.bfloat16):
            base(ids, past_key_values=cache)
        assert torch.isfinite(base(torch.tensor([[7]]), past_key_values=cache).logits).all()


def test_what_is_no_number_stays_none() -> None:
    """Inputs that are rounded to whole numbers."""
    for bits in (8, 4):
        weight = quantize(torch.randn(40, 96), bits)
        for value in (float("nan"), float("inf")):
            x = torch.ones(3, 96).bfloat16()
            x[1, 3] = value
            y = products(x, weight)
            assert not torch.isfinite(y[1]).any() and torch.isfinite(y[[0, 2]]).all()
