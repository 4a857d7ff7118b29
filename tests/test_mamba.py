"""Mamba in place of attention: the mixer is the paper's, its cache is exact, and every family has one."""

from __future__ import annotations

import copy
import importlib.util
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import recovered, tiny_llama
from families import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from test_phases import padded, prompts
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridMambaLayer
from typer.testing import CliRunner

import caprese
from caprese.adapters import Adapter, attach_adapter, branch_parameters, fingerprint, get_branches
from caprese.cli import app
from caprese.data_gen import Sample
from caprese.distill import Alignment, EndToEnd, HeldOut, Teacher, make_batches
from caprese.distill.batches import completion_hidden, lm_logits, prefill
from caprese.distill.fit import fit_end_to_end, joined
from caprese.distill.sensitivity import select_layers
from caprese.efficient_methods import only, stand_in_parameters, untrained
from caprese.efficient_methods.compose import facts_of, make_method
from caprese.efficient_methods.cost import cost, cost_of
from caprese.efficient_methods.mamba import Mixer, MixerState, Replacement, replacements
from caprese.efficient_methods.mamba.alignment import (
    alignment,
    hidden_alignment,
    match_decay,
    match_scale,
    teacher_mixing,
)
from caprese.efficient_methods.mamba.attend import Attend
from caprese.efficient_methods.mamba.replacement import near
from caprese.efficient_methods.mamba.seen import Seen
from caprese.efficient_methods.mamba.thaw import Thawed
from caprese.evaluation.fidelity import fidelity
from caprese.evaluation.latency import parameter_counts
from caprese.exports import plan_export
from caprese.kernels import scan
from caprese.kernels.scan import chunk_scan, recurrence
from caprese.models import FAMILIES, find_ffns
from caprese.models.attention import read_attention
from caprese.plan import config_of, plan
from caprese.recovery.run import Run
from caprese.studies import bench
from caprese.studies.bench import _held, rows_of


def drawn(length: int, heads: int = 3, size: int = 4, width: int = 5, seed: int = 0):
    """x, dt, A, B, C in float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(2, length, *shape, generator=generator, dtype=torch.float64)

    a = -3 * torch.rand(heads, generator=generator, dtype=torch.float64)
    return normal(heads, size), normal(heads).abs(), a, normal(heads, width), normal(heads, width)


def written_out(x, dt, a, b, c):
    """The paper's recurrence (arXiv 2405.21060, equation 1, discretised), one number at a time."""
    batch, length, heads, size = x.shape
    out = torch.zeros_like(x)
    for n in range(batch):
        for h in range(heads):
            state = torch.zeros(b.shape[-1], size, dtype=x.dtype)
            for t in range(length):
                step = float(dt[n, t, h])
                state = torch.exp(step * a[h]) * state + step * torch.outer(b[n, t, h], x[n, t, h])
                out[n, t, h] = state.T @ c[n, t, h]
    return out


def test_the_recurrence_is_the_papers():
    args = drawn(11)
    assert torch.allclose(recurrence(*args)[0], written_out(*args), atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(length=st.integers(1, 40), chunk=st.integers(1, 16), cut=st.integers(0, 40), seed=st.integers(0, 99))
def test_chunks_are_steps_are_one_pass(length, chunk, cut, seed):
    x, dt, a, b, c = drawn(length, seed=seed)
    y, state = recurrence(x, dt, a, b, c)
    for begin in {0, min(cut, length - 1)}:
        parts, known = [], None
        for span in (slice(0, begin), slice(begin, length)):
            if span.stop > span.start:
                part, known = chunk_scan(x[:, span], dt[:, span], a, b[:, span], c[:, span], known, chunk)
                parts.append(part)
        assert torch.allclose(torch.cat(parts, 1), y, atol=1e-9) and torch.allclose(known, state, atol=1e-9)


def one_token(shape: tuple[int, ...], weights: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """What `decode` and `convolve` take, float32 but for the weights."""
    batch, heads, size, width = shape
    torch.manual_seed(0)
    b, c = torch.randn(2, batch, heads, 2 * width)[..., ::2]
    x, dt, rates = torch.randn(batch, heads, size), torch.rand(batch, heads), -torch.rand(heads).to(weights)
    weight, bias = torch.randn(heads * size, 1, 4).to(weights), torch.randn(heads * size).to(weights)
    return (x, dt, rates, b, c, torch.randn(shape)), (torch.randn(batch, 4, heads * size), weight, bias)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 2, 5, 7), (64, 4, 32, 32), (2, 3, 16, 64)])
@pytest.mark.parametrize("compiler", [True, False])
def test_one_token_is_as_written(compiler, shape, weights, monkeypatch):
    """Of many sequences, which several threads take, and of few; in C only what C can read."""
    (*given, state), (seen, weight, bias) = one_token(shape, weights)
    real, called = scan.native.call, []
    monkeypatch.setattr(scan.native, "call", lambda name, *more: (called.append(name), real(name, *more))[1])
    if not compiler:
        monkeypatch.setattr(scan.native, "library", lambda: None)
    y, after = scan.step(*(t.double() for t in (*given, state)))
    with torch.no_grad():
        found, same = scan.decode(*given, state)
        assert same is state and torch.allclose(state.double(), after, atol=1e-5)
        assert torch.allclose(found.double(), y, atol=1e-4)
        for extra, silu in ((None, True), (bias, True), (bias, False)):
            right = F.conv1d(
                seen.double().mT, weight.double(), None if extra is None else extra.double(), groups=len(weight)
            )
            right = (F.silu(right) if silu else right).mT
            assert torch.allclose(
                scan.convolve(seen, weight, extra, silu).double(),
                right,
                atol=2e-2 if weights == torch.bfloat16 else 1e-5,
            )
    in_c = compiler and weights == torch.float32 and scan.native.library() is not None
    assert called == (["caprese_step", *3 * ["caprese_convolve"]] if in_c else [])


def mixer(kind: str = "llama", layer: int = 0, **settings: Any) -> tuple[Mixer, torch.Tensor]:
    """A mixer of a tiny model, and an input for it."""
    model = tiny(kind)
    place = model.get_submodule(FAMILIES[kind].layers)[layer]
    attention = read_attention(getattr(place, FAMILIES[kind].attention[0].split(".")[0]), model.config)
    made = Mixer(attention, 1e-6, caprese.Mamba(**settings))
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return made, torch.randn(2, 21, attention.q.shape[1], generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_it_is_the_layer_that_transformers_has():
    made, x = mixer(start="attention")
    names = {
        "mamba_proj_bias": True,
        "mamba_conv_bias": True,
        "mamba_n_heads": made.heads,
        "mamba_n_groups": made.heads,
        "mamba_d_state": made.size,
        "mamba_d_head": made.size,
        "mamba_d_conv": 4,
        "mamba_expand": 1,
        "mamba_chunk_size": 8,
        "hidden_size": x.shape[-1],
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "time_step_limit": (0.0, float("inf")),
        "layer_types": ["linear_attention"],
    }
    stock = GraniteMoeHybridMambaLayer(SimpleNamespace(**names), 0).eval()
    stock.load_state_dict(made.unshared())
    assert torch.allclose(made(x), stock(x), atol=1e-5)


@torch.no_grad()
@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(1, 20), max_size=4, unique=True), pads=st.integers(0, 9))
def test_a_text_in_pieces_or_behind_pads(cuts, pads):
    made, x = mixer()
    whole = made(x)
    state, parts = MixerState(), []
    for begin, end in zip([0, *sorted(cuts)], [*sorted(cuts), 21], strict=True):
        parts.append(made(x[:, begin:end], cache=state))
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-5) and state.get_seq_length() == 21
    valid = (torch.arange(21 + pads) >= pads).expand(2, -1)
    behind = made(torch.cat([9 * torch.ones(2, pads, x.shape[-1]), x], 1), valid)
    assert torch.allclose(behind[:, pads:], whole, atol=1e-5)


@torch.no_grad()
def test_it_starts_as_linear_attention():
    """x, B and C are the attention's v, k and q."""
    model = tiny_llama()
    attention = read_attention(model.model.layers[0].self_attn, model.config)
    made = Mixer(attention, 1e-6, caprese.Mamba(start="attention"))
    x = torch.randn(1, 7, 32)
    _, v, k, q, _ = made.in_proj(x).split([made.inner, *made.convolved, made.heads], -1)
    expected = model.model.layers[0].self_attn
    assert torch.allclose(q * attention.head_dim**0.5, expected.q_proj(x), atol=1e-6)
    for ours, theirs in ((k, expected.k_proj(x)), (v, expected.v_proj(x))):
        assert torch.allclose(ours, theirs, atol=1e-6)
    assert torch.equal(made.out_proj.weight, expected.o_proj.weight)


@pytest.mark.parametrize("kind", sorted(FAMILIES))
@torch.no_grad()
def test_a_calibrated_mixer_mixes_as_attention_does_before_softmax(kind):
    """Rope and norms included: where nothing of the input moves the decay, its matrix is q k times dt and the decay."""
    model = tiny(kind)
    for name, parameter in model.named_parameters():
        if "attn" in name or "attention" in name:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    batch = texts(3)[0].whole()
    made = caprese.apply(model, caprese.Mamba(keep_attention=0))
    match_decay(made, batch)
    seen = teacher_mixing(made, batch, matrices=True)
    for at in replacements(made):
        m, mask = at.mixer, batch.valid()
        m.in_proj.weight[m.inner + m.channels :] = 0
        m.D.zero_()
        x, _, probabilities, rotation = seen[at.layer]
        alone = mask[0].nonzero().flatten()  # a text without pads
        x, probabilities = x[:1, alone], probabilities[:1, :, alone][..., alone]
        rotation = rotation and tuple(t[:1, alone] if len(t) > 1 else t[:, alone] for t in rotation)
        tokens = x.shape[1]
        gap = (torch.arange(tokens)[:, None] - torch.arange(tokens)).clamp(min=0)
        dt = torch.nn.functional.softplus(m.dt_bias)[:, None, None]
        logits = (m.matrix(x, rotation=rotation) / (dt * (-dt * gap).exp()))[0]
        causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
        cap = getattr(model.config, "attn_logit_softcapping", None)
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        everywhere = model.config.sliding_window if kind == "mistral" else None
        near = causal & (gap < (getattr(at.attention, "sliding_window", everywhere) or tokens))
        mixed = logits.masked_fill(~near, -torch.inf).softmax(-1)
        assert torch.allclose(mixed, probabilities[0], atol=1e-4)
        distance = (teacher_mixing(made, batch, matrices=True)[at.layer].probabilities * gap_of(batch)).sum(-1)
        mean = distance.transpose(1, 2)[mask].mean(0).clamp(min=1)
        assert torch.allclose((-dt.flatten() * mean).exp(), torch.full_like(mean, 0.5), atol=1e-3)


def gap_of(batch):
    places = torch.arange(batch.ids.shape[1])
    return (places[:, None] - places).clamp(min=0)


@pytest.mark.parametrize("start", ["attention", "calibrated"])
@torch.no_grad()
def test_biases_of_the_attention_are_the_convolutions(start):
    model = tiny("qwen2")
    attention = model.model.layers[0].self_attn
    for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
        linear.bias.normal_()
    made = Mixer(read_attention(attention, model.config), 1e-6, caprese.Mamba(start=start))
    x = torch.randn(1, 9, made.in_proj.in_features)
    rows = made.in_proj(x)[..., made.inner : made.inner + made.channels].transpose(1, 2)
    biases = [attention.v_proj.bias, attention.k_proj.bias, attention.q_proj.bias * attention.scaling]
    wanted = torch.nn.functional.conv1d(rows + torch.cat(biases)[:, None], made.conv1d.weight, groups=made.channels)
    assert torch.allclose(
        wanted, torch.nn.functional.conv1d(rows, made.conv1d.weight, made.conv1d.bias, groups=made.channels), atol=1e-5
    )


@pytest.mark.parametrize("kind", sorted(FAMILIES))
@pytest.mark.parametrize(
    ("keep", "more"),
    [
        (0.5, {}),
        (0, {}),
        (0, {"start": "attention"}),
        (0, {"window": 3, "sinks": 1}),
        (0, {"state": 3, "per_head": True}),
        (0, {"keep_heads": ["0/1", "1/0"]}),
    ],
    ids=["half", "pure", "paper", "window", "wide", "heads"],
)
@torch.no_grad()
def test_every_family(kind, keep, more):
    base = tiny(kind)
    ids = prompts(9)[0]
    before, prints = base(ids).logits, fingerprint(base)
    heads = kind == "olmo2" and more.keys() & {"keep_heads", "per_head"}
    if heads or (kind == "gemma2" and more.keys() & {"keep_heads", "window"}):
        with pytest.raises(caprese.CapreseError, match="normed over all heads" if heads else "have a soft cap"):
            caprese.apply(base, caprese.Mamba(keep_attention=keep, **more))
        assert torch.equal(base(ids).logits, before)
        return
    model = caprese.apply(base, caprese.Mamba(keep_attention=keep, **more))
    assert fingerprint(model) == prints
    assert sum(isinstance(m, Replacement) for m in model.modules()) == (1 if keep else 2)
    whole = model(ids).logits
    assert not torch.allclose(whole, before)
    with caprese.dense(model):
        assert torch.equal(model(ids).logits, before)
    out = model(ids[:, :4], use_cache=True)
    parts = [out.logits]
    for t in (slice(4, 5), slice(5, 6), slice(6, 9)):  # decoding, then a second turn
        out = model(ids[:, t], past_key_values=out.past_key_values, use_cache=True)
        parts.append(out.logits)
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-4)
    how = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    rows = prompts(9) + prompts(4)
    batch, mask = padded(rows)
    together = model.generate(input_ids=batch, attention_mask=mask, **how)
    for row, alone in zip(together, rows, strict=True):
        assert torch.equal(row[-6:], model.generate(input_ids=alone, **how)[0, -6:])
    beams = [model.generate(input_ids=ids, num_beams=3, use_cache=cached, **how) for cached in (True, False)]
    assert torch.equal(*beams)
    caprese.remove(model)
    assert torch.equal(base(ids).logits, before)


@torch.no_grad()
def test_a_window_without_training():
    """Beside silent mixers, windows are attention as far as they reach, and bounded memory however long a text is."""
    base = tiny_llama()
    ids = torch.randint(2, 258, (2, 24), generator=torch.Generator().manual_seed(0))
    right = base(ids).logits
    far = base(torch.cat([ids[:, :1], (ids[:, 1:10] + 1) % 250 + 2, ids[:, 10:]], 1)).logits
    model = caprese.apply(base, caprese.Mamba(keep_attention=0, window=24, sinks=0))
    with untrained(model):
        assert torch.allclose(model(ids).logits, right, atol=1e-5)
    assert not torch.allclose(model(ids).logits, right, atol=1e-3)
    caprese.remove(model)
    model = caprese.apply(base, caprese.Mamba(keep_attention=0, window=4, sinks=1))
    with untrained(model):
        near = model(ids).logits
        other = model(torch.cat([ids[:, :1], (ids[:, 1:10] + 1) % 250 + 2, ids[:, 10:]], 1)).logits
        reach = 9 + 3 * base.config.num_hidden_layers + 1  # each layer sees 3 tokens back, and the first
        assert reach < 24
        assert torch.allclose(near[:, reach:], other[:, reach:], atol=1e-5) and not torch.allclose(
            right, far, atol=1e-3
        )
        cache = DynamicCache(config=model.config)
        steps = [model(ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits for t in range(24)]
    assert torch.allclose(torch.cat(steps, 1), near, atol=1e-5)
    held = [layer.seen.places.shape[1] for layer in cache.layers]
    assert max(held) <= 2 * 4 + 1 + 1


@pytest.mark.parametrize("kind", sorted(FAMILIES))
@torch.no_grad()
def test_heads_that_stay_are_the_attentions(kind):
    """What a layer gives is what these heads gave, and the mixer of the rest; sliding windows included."""
    base = tiny(kind)
    refused = {"gemma2": "have a soft cap", "olmo2": "normed over all heads"}
    if kind in refused:
        with pytest.raises(caprese.CapreseError, match=refused[kind]):
            caprese.apply(base, caprese.Mamba(keep_attention=[1], keep_heads=["0/1"]))
        return
    heads = read_attention(find_ffns(base)[0].attention(), base.config).heads
    stay = list(range(1, heads))
    model = caprese.apply(base, caprese.Mamba(keep_attention=[1], keep_heads=[f"0/{head}" for head in stay]))
    (at,) = replacements(model)
    assert at.mixer.heads == 1
    batch = texts(3, 40)[0].whole()
    seen = teacher_mixing(model, batch)[0]
    read = read_attention(at.attention, base.config)
    mask = batch.valid()
    alone = at.attend(seen.x, mask, rotation=seen.rotation)
    first = Attend(at.attention, base.config, [0], None, 0)
    rest = first(seen.x, mask, rotation=seen.rotation)
    bias = 0 if read.out_bias is None else read.out_bias
    assert torch.allclose((alone + rest + bias)[mask], seen.out[mask], atol=1e-5)
    mixed = at.mixer(seen.x, mask, rotation=seen.rotation)
    assert torch.allclose(at.mix(seen.x, mask, rotation=seen.rotation), alone + mixed, atol=1e-6)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"keep_heads": ["0.1"]}, "layer/head"),
        ({"keep_heads": ["0/1"], "window": 8}, "do not go together"),
        ({"window": 0}, "greater than or equal to 1"),
        ({"keep_heads": ["0/1"], "keep_attention": 0.5, "selected": "restored"}, "leave out keep_heads"),
        ({"keep_heads": ["1/0"], "keep_attention": [1]}, "1/0: these layers are not replaced"),
        ({"keep_heads": ["0/9"], "keep_attention": [1]}, "a layer has heads 0-"),
        ({"keep_heads": "0/0 0/1 0/2 0/3", "keep_attention": [1]}, "has all heads of layer 0"),
    ],
)
def test_what_cannot_stay_is_said_clearly(how, says):
    with pytest.raises((ValueError, caprese.CapreseError), match=says):
        caprese.apply(tiny_llama(), caprese.Mamba(**{"keep_attention": 0, **how}))
    assert caprese.Mamba(keep_attention=0, keep_heads=["0/01", "0/1"]).heads_of(0) == [1]


@torch.no_grad()
def test_a_deep_copy_of_a_student_has_an_undoing_of_its_own():
    model = caprese.apply(tiny_llama(), caprese.Mamba(keep_attention=0, window=8, train="all"))
    ids = prompts(9)[0]
    before = model(ids).logits
    twin = caprese.remove(copy.deepcopy(model))
    assert torch.equal(model(ids).logits, before) and torch.equal(twin(ids).logits, tiny_llama()(ids).logits)
    assert not any(isinstance(module, Replacement | Thawed) for module in twin.modules())


@pytest.mark.parametrize("how", [{}, {"window": 8}, {"keep_heads": ["0/1"]}, {"train": "all"}, {"per_head": True}])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_plans_count_what_is_read(kind, how):
    """On the meta device, and of the applied model; what is read is not twice of an FFN that learned."""
    method = caprese.Mamba(keep_attention=0, **how)
    with torch.device("meta"):
        planned = cost(tiny(kind), [method])
    applied = caprese.apply(tiny(kind), method)
    found = cost_of(applied)
    assert (planned.spared, planned.stand_ins) == (found.spared, found.stand_ins)
    assert found.stand_ins == sum(p.numel() for p in stand_in_parameters(applied).values())
    plain = cost_of(caprese.apply(tiny(kind), caprese.Mamba(keep_attention=0, per_head=bool(how.get("per_head")))))
    if "train" in how:
        assert found.spared == plain.spared and found.stand_ins > plain.stand_ins
    if "window" in how:
        stays = sum(linear.weight.numel() for site in find_ffns(applied) for linear in linears_of(site))
        assert plain.spared - found.spared >= stays


def linears_of(site):
    return [m for m in site.attention().attention.modules() if isinstance(m, torch.nn.Linear)]


@torch.no_grad()
@pytest.mark.parametrize(
    "more", [{}, {"keep_heads": ["0/1", "1/0", "1/3"]}, {"per_head": True, "state": 2}], ids=["plain", "heads", "wide"]
)
def test_every_student_is_compared_with_a_window_that_needs_no_training(more):
    """It and its sinks take the memory of a state; heads that stay see all."""
    base = tiny_llama()
    ids = prompts(40)[0]
    right = base(ids).logits
    model = caprese.apply(base, caprese.Mamba(keep_attention=0, **more))
    with untrained(model):
        near = model(ids).logits
        cache = DynamicCache(config=model.config)
        steps = [model(ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits for t in range(ids.shape[1])]
        batch, mask = padded([ids, ids[:, :25]])
        assert torch.allclose(model(batch, attention_mask=mask).logits[0], near[0], atol=1e-4)
    assert torch.allclose(torch.cat(steps, 1), near, atol=1e-4)
    window = min(at._free().window for at in replacements(model)) + 4
    assert torch.allclose(near[:, :window], right[:, :window], atol=1e-5)
    assert not torch.allclose(near, right, atol=1e-3)
    for layer, at in zip(cache.layers, replacements(model), strict=True):
        room, config = at._free(), base.config
        kept = 2 * (room.window + room.sinks) * config.num_key_value_heads * config.head_dim
        assert room.window == 1 or 0 <= layer.state[0].numel() - kept < 2 * config.num_key_value_heads * config.head_dim
    caprese.remove(model)
    caprese.apply(base, caprese.Mamba(keep_attention=0, window=window - 4))
    with untrained(base):
        assert torch.allclose(near, base(ids).logits, atol=1e-4) == ("keep_heads" not in more)


@torch.no_grad()
def test_what_a_window_holds_counts_as_memory():
    model = caprese.apply(tiny_llama(), caprese.Mamba(keep_attention=0, window=8))
    cache = DynamicCache(config=model.config)
    model(prompts(24)[0], past_key_values=cache)
    held = _held(SimpleNamespace(model=model, cache=cache))
    seen = [layer.seen.layer for layer in cache.layers]
    keys = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for s in seen for t in (s.keys, s.values)}
    for layer in cache.layers:
        layer.seen = None
    assert held - _held(SimpleNamespace(model=model, cache=cache)) == sum(keys.values()) > 0


def test_windows_are_hidden_of_some_texts_while_mixers_learn():
    """Wholly or not at all, the same ones again for the same texts, and never when nothing learns."""
    x = torch.randn(40, 5, 32, generator=torch.Generator().manual_seed(0))
    caprese.apply(model := tiny_llama(), caprese.Mamba(keep_attention=0, window=4, window_dropout=0.3))
    (at, *_) = replacements(model)
    with torch.no_grad():
        mixed, both = at.mixer(x), at.mix(x)
        assert torch.equal(both, at.mix(x))
    assert torch.equal(at.mix(x), both)
    at.mixer.requires_grad_(True)
    given = at.mix(x)
    hidden = torch.tensor([torch.allclose(a, b) for a, b in zip(given, mixed, strict=True)])
    assert 3 <= hidden.sum() <= 20 and torch.allclose(given[~hidden], both[~hidden])
    assert torch.equal(at.mix(x), given)
    with torch.no_grad():
        assert torch.equal(at.mix(x), both)
    with pytest.raises(ValueError, match="window_dropout is of a window"):
        caprese.Mamba(window_dropout=0.3)


@torch.no_grad()
def test_a_window_alone_has_nothing_that_was_trained():
    model = caprese.apply(tiny("gpt2"), caprese.Mamba(keep_attention=0, window=8, train="all"))
    ids = prompts(9)[0]
    with untrained(model):
        before = model(ids).logits
    for p in stand_in_parameters(model).values():
        p += 0.1
    with untrained(model):
        assert torch.equal(model(ids).logits, before)


@torch.no_grad()
def test_mixers_beside_a_window_start_small_where_all_is_near():
    model = caprese.apply(tiny_llama(), caprese.Mamba(keep_attention=0, window=64))
    batch = texts(3)[0].whole()
    match_scale(model, batch)
    seen, mask = teacher_mixing(model, batch), batch.valid()
    for at in replacements(model):
        given = at.mixer(seen[at.layer].x, mask, rotation=seen[at.layer].rotation)[mask]
        assert torch.allclose(given.norm(), 0.01 * seen[at.layer].out[mask].norm(), rtol=1e-2)


@torch.no_grad()
def test_what_stays_follows_the_base_and_is_not_held_twice():
    """Into another type, too; and a LoRA on a thawed layer is refused."""
    model = caprese.apply(tiny_llama(), caprese.Mamba(keep_attention=0, window=8)).double().float()
    for at in replacements(model):
        assert at.attend.facts.q.data_ptr() == at.attention.q_proj.weight.data_ptr()
    caprese.apply(thawed := tiny_llama(), caprese.Mamba(train="all"))
    with pytest.raises(caprese.CapreseError, match="mlp"):
        get_peft_model(thawed, LoraConfig(target_modules=["up_proj"]))


def test_rejected_drafts_do_not_stay():
    seen = Seen(2, torch.device("cpu"))
    seen.add(torch.zeros(2, 1, 6, 4), torch.zeros(2, 1, 6, 4), None)
    for _ in range(200):
        seen.add(torch.ones(2, 1, 5, 4), torch.ones(2, 1, 5, 4), None)
        seen.take_back(5, torch.tensor([1, 3]))
    assert seen.count.tolist() == [206, 606] and seen.places.shape[1] <= 2 * 606 + 5
    for row, count in zip(seen.places, seen.count, strict=True):
        assert row[row >= 0].tolist() == list(range(count))


def test_which_layers_keep_their_attention():
    def replaced(count, **how):
        return caprese.Mamba(**how).layer_indices(count)

    assert replaced(4) == [0, 2] and replaced(8, keep_attention=0.25) == [0, 1, 3, 4, 5, 7]
    assert replaced(3, keep_attention=0) == [0, 1, 2] and replaced(4, keep_attention=[0, 3]) == [1, 2]
    assert replaced(6, keep_attention=[1], layers=[0, 1, 2]) == [0, 2]
    for wrong in (1, -0.1, 1.5, "half", [0.5]):
        with pytest.raises(ValueError, match="fraction from 0"):
            caprese.Mamba(keep_attention=wrong)
    with pytest.raises(caprese.CapreseError, match="a model of 4 layers has 0-3"):
        replaced(4, keep_attention=[4])
    with pytest.raises(caprese.CapreseError, match="leaves no layer"):
        replaced(2, keep_attention=[0, 1])


def test_what_a_mixer_has_no_place_for_is_named():
    model = caprese.apply(tiny("qwen3"), caprese.Mamba(keep_attention=0, start="attention"))
    lost = next(m for m in model.modules() if isinstance(m, Replacement)).lost
    assert any("q_norm" in each for each in lost) and "rope" in lost
    for kind, more, lost in (
        ("gpt2", {"start": "attention"}, ()),
        ("mistral", {"start": "attention"}, ("rope", "sliding window")),
        ("mistral", {}, ("sliding window",)),
        ("qwen3", {}, ()),
    ):
        model = caprese.apply(tiny(kind), caprese.Mamba(keep_attention=0, **more))
        assert next(m for m in model.modules() if isinstance(m, Replacement)).lost == lost


def test_with_ffn_sparsity_and_a_branch_in_one_model():
    model = caprese.apply(tiny_llama(), [caprese.Mamba(keep_attention=[1]), caprese.Griffin(sparsity=0.5)])
    adapted = recovered(model, scale=0.0)
    ids = prompts(8)[0]
    with torch.no_grad(), caprese.phases(adapted, [3]):
        both = adapted(input_ids=ids).logits
    trained = branch_parameters(adapted)
    mixers = [p for m in adapted.modules() if isinstance(m, Mixer) for p in m.parameters()]
    assert len(trained) == len(mixers) + 6
    alone = caprese.apply(tiny_llama(), caprese.Griffin(sparsity=0.5))
    with torch.no_grad(), caprese.phases(alone, [3]):
        assert not torch.allclose(alone(input_ids=ids).logits, both)
    with pytest.raises(caprese.CapreseError, match="one replaces the attention that the other would make cheaper"):
        caprese.apply(tiny_llama(), [caprese.Mamba(), caprese.Teal(where="attention")])


def test_a_cache_that_the_dense_model_filled_is_refused():
    model = caprese.apply(tiny_llama(), caprese.Mamba())
    ids = prompts(6)[0]
    with caprese.dense(model):
        cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(caprese.CapreseError, match="filled by the dense model"):
        model(ids, past_key_values=cache)


@pytest.fixture
def distilled(tiny_dir, tmp_path):
    """A hybrid with FFN sparsity and branches, recovered in seconds."""
    model, tokenizer = caprese.load_base(str(tiny_dir))
    recipe = caprese.Recipe(
        model=str(tiny_dir),
        method="mamba:keep_attention=0.34:start=attention+griffin:0.5",
        rank=4,
        output=str(tmp_path / "out"),
        samples={"prompts": "gym:simple_equations", "train": 24, "validation": 6, "test": 6, "max_new_tokens": 16},
        alignment={"epochs": 2, "batch_size": 4, "micro_batch": 4, "learning_rate": 1e-2},
        layerwise={"how": "none"},
        end_to_end={"epochs": 2, "batch_size": 4, "micro_batch": 4, "learning_rate": 1e-2},
        evaluation={"latency_tokens": 8, "batch_size": 4},
    )
    return model, recipe, caprese.recover(model, tokenizer, recipe)


def test_recovered_saved_and_loaded(distilled, tiny_dir, tmp_path):
    model, recipe, report = distilled
    quality = report["quality"]
    assert quality["recovered"]["kl"] < quality["efficient"]["kl"]
    assert {s["name"] for s in report["stages"]} >= {"alignment", "end_to_end"}
    curve = report["curves"]["alignment"]
    assert curve[-1]["loss"] < curve[0]["loss"]
    assert not any(isinstance(m, Replacement) for m in model.modules())  # the base comes back as it was
    ids = prompts(9)[0]
    adapted = caprese.load(tiny_llama(), recipe.output)
    assert report["parameters"]["mixers"] == sum(
        p.numel() for m in adapted.modules() if isinstance(m, Mixer) for p in m.parameters()
    )
    tokens = adapted.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
    caprese.save(adapted, tmp_path / "again")
    again = caprese.load(tiny_llama(), tmp_path / "again", fused=True)
    assert torch.equal(again.generate(input_ids=ids, max_new_tokens=8, do_sample=False), tokens)
    weights = tmp_path / "again" / "caprese_mixers.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(caprese.CapreseError, match=r"caprese_mixers\.safetensors of .* was altered"):
        caprese.load(tiny_llama(), tmp_path / "again")
    weights.unlink()
    with pytest.raises(caprese.CapreseError, match=r"holds no caprese_mixers\.safetensors"):
        caprese.load(tiny_llama(), tmp_path / "again")


def test_all_of_a_student_is_recovered_saved_and_loaded(tiny_dir, tmp_path):
    """Calibrated, rope kept, a window beside the mixers, FFNs and norms thawed; the base comes back as it was."""
    model, tokenizer = caprese.load_base(str(tiny_dir))
    ids = prompts(9)[0]
    before = model(ids).logits
    steps = {"epochs": 2, "batch_size": 4, "micro_batch": 4, "learning_rate": 1e-2}
    recipe = caprese.Recipe(
        model=str(tiny_dir),
        method="mamba:keep_attention=0:start=calibrated:rope=true:silu=false:window=8:train=all",
        rank=1,
        output=str(tmp_path / "out"),
        samples={"prompts": "gym:simple_equations", "train": 24, "validation": 6, "test": 6, "max_new_tokens": 16},
        alignment=steps,
        layerwise={"how": "none"},
        end_to_end=steps,
        evaluation={"latency_tokens": 8, "batch_size": 4},
    )
    report = caprese.recover(model, tokenizer, recipe)
    assert report["quality"]["recovered"]["kl"] < report["quality"]["efficient"]["kl"]
    assert torch.equal(model(ids).logits, before)
    adapted = caprese.load(model, recipe.output)
    own = stand_in_parameters(adapted)
    layer = model.model.layers[0]
    moved = own["0.thawed.mlp/up_proj/weight"] - layer.mlp.up_proj.weight
    mixed = own["0.out_proj.weight"] - layer.self_attn.attention.o_proj.weight
    assert 0 < moved.abs().max() < 0.5 * mixed.abs().max()  # at a tenth of the rate
    with caprese.dense(adapted):
        assert torch.equal(adapted(ids).logits, before)
    how = {"max_new_tokens": 12, "do_sample": False}
    tokens = adapted.generate(input_ids=ids, **how)
    assert torch.equal(caprese.load(tiny_llama(), recipe.output, fused=True).generate(input_ids=ids, **how), tokens)
    with pytest.raises(caprese.CapreseError, match="one trains the FFNs that the other takes from"):
        caprese.apply(tiny_llama(), [caprese.Mamba(train="all"), caprese.Griffin()])


@pytest.mark.parametrize("kind", sorted(FAMILIES))
@torch.no_grad()
def test_thawed_ffns_and_norms_are_the_students_alone(kind):
    base, ids = tiny(kind), prompts(9)[0]
    before, prints = base(ids).logits, fingerprint(base)
    kinds = [type(module) for module in base.modules()]
    frozen = caprese.apply(base, caprese.Mamba())(ids).logits
    caprese.remove(base)
    model = caprese.apply(base, caprese.Mamba(train="all"))
    assert torch.equal(model(ids).logits, frozen)
    thawed = {name: p for name, p in stand_in_parameters(model).items() if ".thawed." in name}
    assert sum("norm" in name or "ln_" in name for name in thawed) >= 2
    for p in thawed.values():
        old = p.clone()
        p += 0.1
        assert not torch.equal(model(ids).logits, frozen)
        p.copy_(old)
        assert torch.equal(model(ids).logits, frozen)
    for p in thawed.values():
        p += 0.1
    with caprese.dense(model):
        assert torch.equal(model(ids).logits, before)
    assert fingerprint(model) == prints
    caprese.remove(model)
    assert torch.equal(base(ids).logits, before) and [type(module) for module in base.modules()] == kinds


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {"start": "attention"}),
        ("qwen2", {"start": "calibrated", "rope": False, "silu": True}),
        ("mistral", {"start": "attention", "state": 2, "per_head": True}),
        ("llama", {"start": "random", "train": "all"}),
    ],
)
@torch.no_grad()
def test_a_hybrid_is_a_granite_checkpoint(kind, settings, tmp_path):
    plain = {"mlp_bias": False} if kind == "llama" else {"sliding_window": None} if kind == "mistral" else {}
    model = attach_adapter(caprese.apply(tiny(kind, **plain), caprese.Mamba(**settings)), 1).eval()
    for p in branch_parameters(model):
        p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    facts = caprese.export(model, None, tmp_path / "out")
    assert facts["architecture"] == "GraniteMoeHybridForCausalLM" and facts["largest_logit_difference"] < 1e-4
    planned = plan_export(tiny(kind, **plain).config, [caprese.Mamba(**settings)], lambda layer: 0)
    assert planned.items() <= {**facts, "bytes": planned["bytes"]}.items()
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = prompts(9)[0]
    how = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    assert torch.equal(stock.generate(ids, **how), model.generate(input_ids=ids, **how))
    batch, mask = padded(prompts(9) + prompts(4))
    ours, theirs = (m(input_ids=batch, attention_mask=mask).logits[mask.bool()] for m in (model, stock))
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_hybrids_that_no_checkpoint_holds_are_refused(tmp_path):
    def refused(model, why: str) -> None:
        with pytest.raises(caprese.CapreseError, match=why):
            caprese.export(model, None, tmp_path / "out")

    pure = caprese.apply(tiny_llama(), caprese.Mamba(keep_attention=0))
    refused(attach_adapter(pure, 1), "without an attention layer")
    branched = attach_adapter(caprese.apply(tiny_llama(), caprese.Mamba()), 1)
    for name, p in branched.named_parameters():
        p.data += 0.1 if ".lora_B." in name else 0
    refused(branched, "no place for a recovery branch")
    refused(attach_adapter(caprese.apply(tiny("gemma2"), caprese.Mamba()), 1), "no place for what 'gemma2' has")
    refused(attach_adapter(caprese.apply(tiny("mistral"), caprese.Mamba()), 1), "sliding window")
    unlike = {"silu": True}, {"rope": False}
    for how, why in ((unlike[0], "no rope"), (unlike[1], "SiLU behind"), ({"window": 8}, "some of both")):
        plain = caprese.apply(tiny("llama", mlp_bias=False), caprese.Mamba(**how))
        refused(attach_adapter(plain, 1), why)


def test_alignment_goes_from_layer_to_attention_only():
    """The error of a mixer that gives what attention gave is 0, and no layer's error depends on another's mixer."""
    model = caprese.apply(tiny_llama(), caprese.Mamba(keep_attention=0))
    batch = texts(3)[0].whole()
    before = alignment(model, batch)
    first, *others = replacements(model)
    with torch.no_grad():
        first.mixer.out_proj.weight.mul_(2)
    after = alignment(model, batch)
    assert torch.equal(before[1:], after[1:]) and before[0] != after[0]
    for at in others:
        at.mixer.forward = lambda x, *_: 0 * x  # type: ignore[method-assign]
    assert torch.allclose(alignment(model, batch)[1:], torch.ones(len(others)))


def texts(count: int, size: int = 20):
    """Batches of random tokens; the first 4 to 9 of each text are its prompt."""
    rows = torch.randint(2, 258, (count, size), generator=torch.Generator().manual_seed(0)).tolist()
    return make_batches([Sample(row, 4 + i % 6, "", "") for i, row in enumerate(rows)], 3)


@torch.no_grad()
def test_a_mixing_matrix_is_the_mixer():
    made, x = mixer()
    z, v, *_ = made._project(x, None, None, None)
    y = (made.matrix(x) @ v.transpose(1, 2)).transpose(1, 2)
    y = y * torch.nn.functional.silu(z).unflatten(-1, (made.heads, made.size))
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + made.eps)
    assert torch.allclose(made.out_proj(made.norm.weight * y.flatten(-2)), made(x), atol=1e-5)


def test_mixing_matrices_are_measured_beside_what_is_given():
    model = caprese.apply(tiny_llama(), caprese.Mamba(keep_attention=0))
    batch = texts(3)[0].whole()
    assert torch.allclose(alignment(model, batch, matrices=0.0), alignment(model, batch))
    with_matrices = alignment(model, batch, matrices=1.0)
    assert (with_matrices > alignment(model, batch)).all() and model.config._attn_implementation == "sdpa"
    seen, mask = teacher_mixing(model, batch, matrices=True), batch.valid()
    for observed in seen.values():  # of each real token, one, on real tokens before it
        assert torch.allclose(
            observed.probabilities.sum(-1)[mask[:, None].expand(-1, 4, -1)], torch.ones(()), atol=1e-5
        )
    for at in replacements(model):
        wanted = seen[at.layer].probabilities
        at.mixer.matrix = lambda *_, wanted=wanted: wanted  # type: ignore[method-assign]
    assert torch.allclose(alignment(model, batch, matrices=1.0), alignment(model, batch))


def test_hidden_states_of_a_dense_model_are_right():
    model = caprese.apply(tiny_llama(), caprese.Mamba(keep_attention=[0]))
    batch = texts(3)[0].whole()
    errors = hidden_alignment(model, batch)
    assert errors[0] == 0 and (errors[1:] > 0.01).all()  # layer 0 is attention still; what follows is not
    sparse = caprese.apply(tiny_llama(), [caprese.Mamba(keep_attention=[0]), caprese.Griffin(sparsity=0.5)])
    assert torch.equal(hidden_alignment(sparse, batch), errors)  # FFNs are for branches to mend
    with caprese.dense(model):
        assert (hidden_alignment(model, batch) == 0).all()


@pytest.mark.parametrize(("start", "kind"), [("attention", "llama"), ("random", "llama"), ("attention", "gpt2")])
@torch.no_grad()
def test_mixers_start_as_large_as_their_attention(start, kind):
    base = tiny(kind)
    for name, parameter in base.named_parameters():
        if name.endswith("attn.c_proj.bias"):
            parameter.normal_()
    model = caprese.apply(base, caprese.Mamba(keep_attention=0, start=start))
    batch = texts(3)[0].whole()
    before = [at.mixer.norm.weight.clone() for at in replacements(model)]
    match_scale(model, batch)
    seen, mask = teacher_mixing(model, batch), batch.valid()
    for at, old in zip(replacements(model), before, strict=True):
        x, out, *_ = seen[at.layer]
        bias = at.mixer.out_proj.bias  # which no norm scales
        assert torch.allclose((at.mixer(x, mask)[mask] - bias).norm(), (out[mask] - bias).norm(), rtol=1e-4)
        assert (at.mixer.norm.weight / old).std() < 1e-6 and not torch.equal(at.mixer.norm.weight, old)


@pytest.mark.parametrize("start", ["attention", "random"])
def test_an_attention_that_gives_nothing_can_be_replaced(start):
    base = tiny_llama()
    base.model.layers[0].self_attn.o_proj.weight.data.zero_()  # as in models made deeper by copied layers
    model = caprese.apply(base, caprese.Mamba(keep_attention=0, start=start))
    batch = texts(3)[0].whole()
    with torch.no_grad():
        match_scale(model, batch)
    for at in replacements(model):
        at.mixer.requires_grad_(True)
    errors = alignment(model, batch)
    errors.sum().backward()
    assert errors.isfinite().all()
    for at in replacements(model):
        assert all(p.isfinite().all() and p.grad.isfinite().all() for p in at.mixer.parameters())


def test_the_first_token_counts_where_prompts_run_through_mixers():
    rows = torch.randint(2, 258, (3, 20), generator=torch.Generator().manual_seed(0)).tolist()
    samples = [Sample(row, 4 + i, "", "") for i, row in enumerate(rows)]
    (batch,), (dense_prompts,) = make_batches(samples, 3, first=True), make_batches(samples, 3)
    assert batch.tokens == dense_prompts.tokens + 3 == sum(len(s.completion_ids) for s in samples)
    model = caprese.apply(tiny_llama(), caprese.Mamba(keep_attention=0.5))
    ordered = sorted(samples, key=lambda s: s.input_ids)
    wanted = []
    for sample in ordered:
        with caprese.phases(model, [sample.prompt_length]), torch.no_grad():
            logits = model(torch.tensor([sample.input_ids])).logits[0]
        wanted.append(logits[sample.prompt_length - 1 : -1])
    assert batch.predicted.tolist() == [token for s in ordered for token in s.completion_ids]
    with torch.no_grad():
        hidden = completion_hidden(model, batch, prefill(model, batch))
    assert torch.allclose(lm_logits(model, hidden), torch.cat(wanted), atol=1e-4)
    loss = torch.nn.functional.cross_entropy(torch.cat(wanted), batch.predicted)
    assert math.isclose(fidelity(model, [batch], ("recovered",))["recovered"]["perplexity"], loss.exp(), rel_tol=1e-3)


@torch.no_grad()
def test_pads_leave_no_trace_however_a_prompt_is_cut():
    model = caprese.apply(tiny_llama(), caprese.Mamba(keep_attention=0.5))
    ids = torch.randint(2, 258, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    wanted = model(ids[:1, 4:]).logits[0, -1]
    for size in (1, 2, 9):
        cache = None
        for begin in range(0, 9, size):
            end = min(9, begin + size)
            with caprese.phases(model, mask.sum(-1)):
                out = model(
                    ids[:, begin:end],
                    attention_mask=mask[:, :end],
                    position_ids=(mask.cumsum(-1) - 1).clamp_min(0)[:, begin:end],
                    past_key_values=cache,
                    use_cache=True,
                )
            cache = out.past_key_values
        assert torch.allclose(out.logits[0, -1], wanted, atol=1e-4), size


def test_what_a_bench_of_hybrids_shows():
    config = {"prompt_tokens": 8, "new_tokens": 3, "rank": 4}
    base = tiny_llama().to(torch.bfloat16)
    for keep in (0.5, 0):
        methods = [caprese.Mamba(keep_attention=keep), caprese.Griffin(sparsity=0.5)]
        rows = {row["name"]: row for row in bench(base, methods, rows=rows_of(methods, False), **config)["rows"]}
        assert rows.keys() == {"dense", "efficient", "efficient_lora", "recovered", "fused"}
        model = caprese.apply(tiny_llama(), methods)
        read = {f"active_{row}": rows[row]["bytes_per_token"] / 2 for row in ("dense", "efficient")}
        assert read == {name: parameter_counts(model)[name] for name in read}
    alone = bench(base, [caprese.Mamba()], rows=rows_of([caprese.Mamba()], False), **config)["rows"]
    assert [row["name"] for row in alone] == ["dense", "efficient", "recovered", "fused"]
    assert alone[3]["bytes_per_token"] - alone[1]["bytes_per_token"] == 2 * 32 * 2  # one layer, rank 1
    with pytest.raises(caprese.CapreseError, match="has no row fused_compiled"):
        bench(base, [caprese.Mamba()], rows=["dense", "fused_compiled"], **config)


def test_adapters_that_differ_in_their_mixers_are_not_one(tmp_path):
    digests = set()
    for seed in (0, 1):
        model = attach_adapter(caprese.apply(tiny_llama(), caprese.Mamba()), 1)
        replacements(model)[0].mixer.D.data.fill_(seed)
        caprese.save(model, tmp_path / str(seed))
        digests.add(Adapter.open(tmp_path / str(seed)).digest)
        caprese.remove(model)
    assert len(digests) == 2 and not Adapter.open(tmp_path / "0").has_branches()


@pytest.mark.parametrize(
    ("text", "remedy"),
    [("5-3", "numbers like 0,5,11"), ("half", "numbers like"), ("0.x", "fraction from 0"), ("all", "--keep-attention")],
)
def test_which_layers_keep_attention_is_said_clearly(text, remedy):
    done = CliRunner().invoke(app, ["recover", "--model", "reasoner-tiny", "--keep-attention", text, "--dry-run"])
    assert done.exit_code == 1 and remedy in done.output and "--layers" not in done.output


def test_no_fraction_above_0_is_pure_mamba():
    assert len(caprese.Mamba(keep_attention=0.01).layer_indices(4)) == 3
    assert len(caprese.Mamba(keep_attention=0).layer_indices(4)) == 4
    assert caprese.Mamba(layers=[1]).layer_indices(4) == [1]
    with pytest.raises(ValueError, match="from 0"):
        caprese.Mamba(keep_attention=[])


def test_time_by_context_is_measured(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    module = importlib.import_module("measures.context")
    model = caprese.apply(tiny_llama(), caprese.Mamba(keep_attention=[0]))
    measured = module.measure(model, 64, {1, 2}, 2, 2)
    assert measured["mixed"]["cache_bytes"] < measured["dense"]["cache_bytes"]


def test_layers_join_in_rounds():
    assert joined([0, 1, 2, 3, 4, 5, 6, 7], 0.5) == {0, 2, 4, 6} and joined([3], 0.1) == {3}
    before: set[int] = set()
    for part in (0.2, 0.4, 0.6, 0.8, 1):
        after = joined(list(range(30)), part)
        assert before < after and len(after) == round(30 * part)
        before = after
    model = caprese.apply(tiny_llama(), caprese.Mamba(keep_attention=0))
    batch = texts(3)[0].whole()
    with only(model, {1}):
        errors = hidden_alignment(model, batch)
    assert errors[0] == 0 and errors[1] > 0


def test_sequential_targets_are_the_dense_models(monkeypatch):
    """With mixers beside sparse FFNs, too: what a branch is to give back is measured from the attention's output."""
    from caprese.distill import sequential

    batches = texts(6)
    model = caprese.apply(tiny_llama(), [caprese.Mamba(keep_attention=[0]), caprese.Griffin(sparsity=0.5)])
    adapted = attach_adapter(model, 4)
    seen: list[torch.Tensor] = []
    add = sequential.Moments.add
    monkeypatch.setattr(sequential.Moments, "add", lambda m, x, e, y: (seen.append(y), add(m, x, e, y))[1])
    sequential.fit_sequential(adapted, batches[:1], batches[1:], [4, 4, 4])
    batch = batches[0]
    ids, mask = torch.cat([batch.prompt, batch.inputs], 1), torch.cat([batch.prompt_mask, batch.mask], 1)
    plain = tiny_llama()
    states = plain.model(
        input_ids=ids,
        attention_mask=mask.long(),
        position_ids=(mask.cumsum(-1) - 1).clamp_min(0),
        output_hidden_states=True,
    ).hidden_states
    at = torch.cat([torch.zeros_like(batch.prompt_mask), batch.mask], 1)
    for layer, found in enumerate(seen[0::2][:2]):  # of the last, hidden states are normed
        assert torch.allclose(found, (states[layer + 1] - states[layer])[at], atol=1e-5)


def test_states_written_over_are_ones_own():
    import copy

    made, x = mixer()
    with torch.inference_mode():
        state = MixerState()
        made(x[:, :9], cache=state)
    twin = copy.copy(state)
    with torch.no_grad():
        first = made(x[:, 9:10], cache=state)  # made in inference mode, and gone on with outside it
        made(x[:, 10:11], cache=state)
        assert torch.allclose(made(x[:, 9:10], cache=twin), first, atol=1e-6)
        whole = made(x[:, :11])
    assert torch.allclose(first[:, 0], whole[:, 9], atol=1e-5)


def test_rounds_bring_mixers_in_and_leave_sparse_ffns_in_place(tmp_path):
    """What each round trains, by what it changed: one more mixer each, and the branches of all layers that act."""
    methods = [caprese.Mamba(keep_attention=0.5), caprese.Griffin()]  # mixers in 0, 2 and 4
    adapted = attach_adapter(caprese.apply(tiny_llama(num_hidden_layers=6), methods), 2).requires_grad_(False)
    config = EndToEnd(rounds=3, epochs=1, batch_size=2, micro_batch=2, learning_rate=1e-2)
    run, rows, before = Run(tmp_path, "id"), texts(4), get_branches(adapted)
    held_out = HeldOut(adapted, rows, 1.0)
    start = held_out.kl()
    course = fit_end_to_end(adapted, Teacher(adapted, rows, 1.0), held_out, config, start, run)
    assert course.best < start and course.best == pytest.approx(held_out.kl())
    found = []
    for name in ("round-1", "round-2", "end_to_end"):
        tensors, _ = run.load(name)
        changed = {n for n, value in before.items() if not torch.equal(tensors[f"now.{n}"], value)}
        layers = {n: int(n.split("layers.")[1].split(".")[0]) for n in changed}
        found.append([{layers[n] for n in changed if part in n} for part in (".mixer.", ".lora_B.")])
        before = {n: tensors[f"best.{n}"] for n in before}
    assert found == [[{0}, {0, 1, 3, 5}], [{0, 4}, {0, 1, 3, 4, 5}], [{0, 2, 4}, {0, 1, 2, 3, 4, 5}]]


@pytest.mark.parametrize("selected", ["sensitivity", "restored", "far"])
def test_attention_stays_where_a_mixer_costs_most(selected):
    torch.manual_seed(0)
    model = tiny_llama(num_hidden_layers=3).requires_grad_(False)
    with torch.no_grad():
        for layer in (0, 2):
            model.model.layers[layer].self_attn.o_proj.weight.mul_(0.002)  # what these say hardly matters
    near = {"window": 6} if selected == "far" else {}
    method = caprese.Mamba(keep_attention=0.34, selected=selected, **near)
    rows = texts(12)
    config = Alignment(batch_size=3, micro_batch=3)
    chosen, cost = select_layers(model, method, rows, rows, config, 1.0)
    best = min if selected == "restored" else max
    assert len(cost) == 3 and best(cost, key=cost.get) == 1 and chosen == caprese.Mamba(keep_attention=[1], **near)
    assert not any(isinstance(m, Replacement) for m in model.modules())
    with pytest.raises(caprese.CapreseError, match="measured by caprese recover"):
        caprese.apply(model, method)
    for wrong in (0.0, [1]):
        with pytest.raises(ValueError, match="goes with keep_attention a fraction"):
            caprese.Mamba(keep_attention=wrong, selected=selected)


@pytest.mark.parametrize("asked", [True, False])
def test_layers_are_measured_on_retrieval_where_there_is_some(asked, tiny_dir, tmp_path, monkeypatch):
    model, tokenizer = caprese.load_base(str(tiny_dir))
    monkeypatch.setattr("caprese.distill.sensitivity.ALIGNED", 2)
    recipe = caprese.Recipe(
        model=str(tiny_dir),
        method="mamba:keep_attention=0.34:selected=restored:probe=retrieval",
        rank=1,
        output=str(tmp_path / "out"),
        samples={
            "prompts": "gym:simple_equations=0.5,retrieval:distil=0.5" if asked else "gym:simple_equations",
            **{"train": 8, "validation": 4, "test": 2, "max_new_tokens": 8},
        },
        alignment={"epochs": 0, "batch_size": 4, "micro_batch": 4},
        layerwise={"how": "none"},
        end_to_end={"epochs": 1, "batch_size": 4, "micro_batch": 4},
        evaluation={"latency_tokens": 4, "batch_size": 4},
    )
    seen = []
    measure = select_layers

    def follow(model, method, rows, held_out, *rest):
        seen.extend(batch.prompt_lengths for batch in held_out)
        return measure(model, method, rows, held_out, *rest)

    monkeypatch.setattr("caprese.recovery.stages.select_layers", follow)
    if not asked:
        with pytest.raises(caprese.CapreseError, match=r"none of `prompts`; .*retrieval:distil"):
            caprese.recover(model, tokenizer, recipe)
        assert not (tmp_path / "out" / "samples").exists()
        with pytest.raises(ValueError, match="give selected"):
            caprese.Mamba(probe="retrieval")
        return
    report = caprese.recover(model, tokenizer, recipe)
    assert torch.cat(seen).shape == (2,) and torch.cat(seen).min() > 100  # equations are short
    assert report["methods"][0]["selected"] == "evenly"


def test_heads_that_see_what_is_far_stay():
    """One head's output is all that its layer gives; what the near alone costs it is measured without training."""
    model = tiny_llama().requires_grad_(False)
    before = model(prompts(9)[0]).logits
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.002)
        model.model.layers[1].self_attn.o_proj.weight[:, 8:16] *= 500
    method = caprese.Mamba(keep_attention=0, keep_heads=0.25, selected="far")
    with pytest.raises(caprese.CapreseError, match="keep_heads the heads"):
        caprese.apply(model, method)
    assert select_layers(model, method, texts(12), texts(12), Alignment(), 1.0)[1].keys() == {
        f"{layer}/{head}" for layer in range(3) for head in range(4)
    }
    # texts of 20 tokens are near; and so that one head sees less, it is looked at by itself
    tight = caprese.apply(model, caprese.Mamba(keep_attention=0, window=6))
    cost = {}
    held_out = HeldOut(tight, texts(12), 1.0)
    with near(tight, {}):
        assert held_out.kl() < 1e-6
    for at in replacements(tight):
        for head in range(4):
            with near(tight, {at.layer: {head}}):
                cost[f"{at.layer}/{head}"] = held_out.kl()
    caprese.remove(model)
    assert max(cost, key=cost.get) == "1/1" and cost["1/1"] > 10 * sorted(cost.values())[-2]
    assert "1/1" in method.decided(cost, 3).keep_heads and len(method.decided(cost, 3).keep_heads) == 3
    assert not torch.equal(model(prompts(9)[0]).logits, before)


def test_the_report_and_the_plan_say_what_is_trained(distilled):
    _, recipe, report = distilled
    planned = plan(tiny_llama().config, recipe)
    assert planned["stand_in_parameters"] == report["parameters"]["mixers"]
    many = recipe.model_copy(update={"samples": recipe.samples.model_copy(update={"train": 10**6})})
    assert plan(tiny_llama().config, many)["estimated_seconds"]["alignment"] > 0
    active = report["parameters"]["active_recovered"]
    assert abs(planned["active_parameters_recovered"] - active) < 0.02 * active
    card = (Path(recipe.output) / "README.md").read_text()
    assert f"distilling {report['parameters']['mixers']:,} parameters of Mamba mixers" in card
    assert "mamba (34% attention)" in card and "started without their attention's rope" in card


def test_mixers_are_what_they_were_when_they_were_saved():
    """Adapters of caprese 0.1 name a start, and neither rope nor SiLU."""
    facts = {"name": "mamba", "layers": "all", "keep_attention": 0.5, "selected": "evenly", "seed": 0}
    for start in ("attention", "random"):
        old = make_method({**facts, "start": start})
        assert (old.rope, old.silu) == (False, True) and make_method(facts_of(old)) == old
    assert (caprese.Mamba().rope, caprese.Mamba().silu, caprese.Mamba().start) == (True, False, "calibrated")
    assert caprese.Mamba(start="attention", rope=True).silu and not caprese.Mamba(rope=False).silu


def test_what_a_cache_is_not_for_is_refused():
    model = caprese.apply(tiny_llama(), caprese.Mamba())
    ids = prompts(40)[0]
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    state = next(layer for layer in cache.layers if isinstance(layer, MixerState))
    assert state.window.untyped_storage().nbytes() == state.window.nbytes  # not a view on all 40 tokens
    with pytest.raises(caprese.CapreseError, match="filled by a hybrid"), caprese.dense(model):
        model(ids[:, :1], past_key_values=cache)
    with pytest.raises(caprese.CapreseError, match="static cache"):
        model.generate(input_ids=ids, max_new_tokens=3, cache_implementation="static")


def test_mixers_of_a_bfloat16_base_train(tmp_path):
    model = caprese.apply(tiny_llama().to(torch.bfloat16), caprese.Mamba(keep_attention=0))
    adapted = attach_adapter(model, 1)
    parameters = branch_parameters(adapted)
    before = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    for p in parameters:
        p.requires_grad_(True)
    ids = prompts(12)[0]
    for _ in range(3):
        with caprese.phases(adapted, [3]):
            adapted(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = [float((p != old).float().mean()) for p, old in zip(parameters, before, strict=True)]
    assert min(moved) > 0.9
    with torch.no_grad():
        before = adapted(input_ids=ids).logits
    assert before.dtype == torch.bfloat16
    caprese.save(adapted, tmp_path)
    run = caprese.load(tiny_llama().to(torch.bfloat16), tmp_path)  # in 16 bit, as what is beside them
    for mixer in (m for m in run.modules() if isinstance(m, Mixer)):
        assert mixer.in_proj.weight.dtype == mixer.out_proj.weight.dtype == torch.bfloat16
        assert mixer.A_log.dtype == mixer.conv1d.weight.dtype == torch.float32
    with torch.no_grad():
        after = run(input_ids=ids).logits
        assert torch.equal(after, before)
        first = run(input_ids=ids[:, :6], use_cache=True)
        parts = [first.logits]
        for t in range(6, 12):
            parts.append(run(input_ids=ids[:, t : t + 1], past_key_values=first.past_key_values, use_cache=True).logits)
    assert (torch.cat(parts, 1) - after).abs().float().mean() < 0.05


def test_a_task_adapter_on_a_replaced_attention_is_refused(tmp_path):
    """It would do nothing there, and says so; on the attentions that stay it acts."""
    for layers, said in ((None, "layer 1's attention is replaced"), ([0, 2], None)):
        task = LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=layers, init_lora_weights=False)
        get_peft_model(tiny_llama(), task).save_pretrained(tmp_path / str(layers))
        model = caprese.apply(tiny_llama(), caprese.Mamba(keep_attention=[0, 2]))
        ids = prompts(7)[0]
        before = model(ids).logits
        adapted = PeftModel.from_pretrained(model, tmp_path / str(layers))
        if said is None:
            assert not torch.equal(adapted(ids).logits, before)
        else:
            with pytest.raises(caprese.CapreseError, match=said):
                adapted(ids)


def test_mixers_are_not_mixed_up_or_saved_broken(tmp_path):
    def hybrid(seed: int):
        model = attach_adapter(caprese.apply(tiny_llama(), caprese.Mamba()), 1)
        for p in branch_parameters(model):
            p.data += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
        return model

    one = hybrid(1)
    caprese.save(one, tmp_path / "one")
    caprese.save(hybrid(2), tmp_path / "two")
    loaded = caprese.load(tiny_llama(), tmp_path / "one")
    for model, how in ((loaded, {}), (one, {}), (loaded, {"subfolder": "two"})):
        with pytest.raises(caprese.CapreseError, match="has mixers of its own"):
            model.load_adapter(tmp_path if how else tmp_path / "two", "two", **how)
    loaded.load_adapter(tmp_path / "one", "again")  # the mixers that are there
    loaded.delete_adapter("again")
    branches = tmp_path / "branches"  # PEFT's own, which has none
    loaded.save_pretrained(branches)
    loaded.load_adapter(branches, "branches")
    loaded.delete_adapter("branches")
    assert type(loaded).__name__ == "PeftModelForCausalLM"
    base = loaded.unload()
    ids = prompts(7)[0]
    before = base(ids).logits
    with pytest.raises(caprese.CapreseError, match="what another adapter trained"):
        caprese.load(base, tmp_path / "two")
    assert torch.equal(base(ids).logits, before)
    branch_parameters(one)[0].data.fill_(torch.nan)
    with pytest.raises(caprese.CapreseError, match="holds NaN"):
        caprese.save(one, tmp_path / "one")
    caprese.load(tiny_llama(), tmp_path / "one")


@pytest.mark.skipif(importlib.util.find_spec("mamba_ssm") is None, reason="mamba-ssm is not here: make mamba-ssm")
def test_mamba_ssms_kernels_give_the_same():
    script = Path(__file__).with_name("mamba_ssm_kernels.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=500)
    assert done.stdout.strip() == "equal", done.stderr


def test_kernels_that_do_not_load_are_left_alone(tmp_path, monkeypatch):
    """What is compiled for another torch or CUDA raises whatever it likes, and nothing is said on a CPU."""
    for name in ("mamba_ssm", "causal_conv1d"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('undefined symbol')")
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    for known in (scan._mamba_ssm, scan._causal_conv1d):
        known.cache_clear()
    try:
        assert set(scan.in_use("cuda").values()) == set(scan.in_use("cpu").values()) == {"torch"}
    finally:
        for known in (scan._mamba_ssm, scan._causal_conv1d):
            known.cache_clear()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@torch.no_grad()
def test_on_a_gpu_a_mixer_gives_what_it_gives_on_a_cpu():
    made, x = mixer()
    wanted, state = made(x), MixerState()
    made, x = made.cuda(), x.cuda()
    parts = [made(x[:, t : t + 1] if t else x[:, :1], cache=state) for t in range(x.shape[1])]
    for result in (made(x), torch.cat(parts, 1)):
        assert torch.allclose(result.cpu(), wanted, atol=5e-3), scan.in_use("cuda")


def test_conv_kernels_are_called_as_they_want(monkeypatch):
    """causal-conv1d's function as it is documented: x [B, D, T], weight [D, k], zeros before the beginning."""

    def causal_conv1d_fn(x, weight, bias=None, seq_idx=None, initial_states=None, activation=None):
        assert weight.shape == (x.shape[1], 4) and activation in (None, "silu", "swish")
        padded = torch.nn.functional.pad(x, (3, 0))
        return torch.nn.functional.silu(torch.nn.functional.conv1d(padded, weight[:, None], bias, groups=len(weight)))

    made, x = mixer(start="attention")
    wanted = made(x)
    monkeypatch.setattr(scan, "_causal_conv1d", lambda device: causal_conv1d_fn)
    assert torch.allclose(made(x), wanted, atol=1e-6)


@pytest.mark.parametrize("name", ["llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b"])
def test_recipes_for_llama_are_planned_without_the_hub(name, monkeypatch):
    def no_hub(*_):
        raise caprese.CapreseError("cannot reach the model hub")

    monkeypatch.setattr("caprese.plan.job.load_config", no_hub)
    recipe = caprese.resolve_recipe(f"{name}-mamba")
    (method,) = recipe.methods
    config = config_of(recipe)
    count = config.num_hidden_layers
    assert method.layer_indices(count) == list(range(0, count, 2))  # as MambaInLlama's
    planned = plan(config, recipe)
    rows = (3 * config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    each = config.hidden_size * (rows + config.num_attention_heads)  # z, x, B, C, out and dt; and vectors
    each += 3 * config.hidden_size * config.intermediate_size  # and the FFN, which learns too
    assert planned["stand_in_parameters"] == pytest.approx(count / 2 * each, rel=0.01)
    tokens = planned["tokens_at_most"]
    assert tokens["alignment"] == tokens["end_to_end"] == 100_000 * (2048 + 128)
    assert planned["estimated_gpu_hours"] > 1 and planned["layerwise_bytes"] == 0
    with pytest.raises(caprese.CapreseError, match="cannot reach"):
        config_of(recipe.model_copy(update={"model": "owner/unknown"}))


def test_a_layer_all_of_whose_heads_stay_keeps_its_attention():
    """Told after hours of measuring that they are all of a layer, a run could not go on."""
    asked = caprese.Mamba(keep_attention=0.0, keep_heads=0.5, selected="far")
    cost = {"0/0": 3.0, "0/1": 4.0, "1/0": 1.0, "1/1": 2.0, "2/0": 5.0, "2/1": 0.5}
    decided = asked.decided(cost, 3)
    assert decided.keep_attention == [0] and decided.keep_heads == ["2/0"]
    assert decided.layer_indices(3) == [1, 2]
    assert asked.decided({**cost, "1/1": 9.0, "0/0": 0.1}, 3).keep_attention == []
