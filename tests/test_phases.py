"""Prefill dense, decode efficient; what was learned belongs to the cache.

Cases with a name. That the logits are right whatever happens is tests/test_reference.py's, and every family by every
method tests/test_matrix.py's.
"""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import recovered, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

import caprese
from caprese.adapters import branch_parameters
from caprese.efficient_methods import Cats, Griffin
from caprese.efficient_methods.memory import memory_of

METHODS = {"griffin": Griffin, "cats": Cats}


def prompts(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(2, 258, (1, n), generator=generator) for n in lengths]


def padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(r.shape[1] for r in rows)
    ids = torch.cat([torch.cat([torch.zeros(1, width - r.shape[1], dtype=torch.long), r], 1) for r in rows])
    mask = torch.cat([(torch.arange(width) >= width - r.shape[1]).long()[None] for r in rows])
    return ids, mask


@pytest.mark.parametrize("method", METHODS)
def test_dense_context_is_the_base_model(tiny, method):
    ids = prompts(12)[0]
    before = tiny(ids).logits
    adapted = recovered(caprese.apply(tiny, METHODS[method](sparsity=0.7)))
    with caprese.phases(adapted, [4]):
        assert not torch.allclose(adapted(input_ids=ids).logits, before)
        with caprese.dense(adapted):
            assert torch.equal(adapted(input_ids=ids).logits, before)


@settings(max_examples=12, deadline=None)
@given(lengths=st.lists(st.integers(1, 14), min_size=2, max_size=4), method=st.sampled_from(sorted(METHODS)))
def test_a_padded_batch_gives_each_sequence_what_it_gets_alone(lengths, method):
    model = recovered(caprese.apply(tiny_llama(eos_token_id=None), METHODS[method](sparsity=0.5)))
    rows = prompts(*lengths)
    ids, mask = padded(rows)
    batch = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False)[:, ids.shape[1] :]
    for row, tokens in zip(rows, batch, strict=True):
        alone = model.generate(input_ids=row, attention_mask=torch.ones_like(row), max_new_tokens=6, do_sample=False)
        assert torch.equal(alone[0, row.shape[1] :], tokens)


@pytest.mark.parametrize("method", METHODS)
def test_a_one_token_prompt_is_prefill(tiny, method):
    ids = prompts(1)[0]
    before = tiny(ids).logits
    caprese.apply(tiny, METHODS[method](sparsity=0.5))
    assert torch.equal(tiny(ids, use_cache=True).logits, before)
    assert tiny.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None).shape == (1, 5)


@pytest.mark.parametrize("method", METHODS)
def test_chunked_prefill_learns_what_whole_prefill_learns(tiny, method):
    caprese.apply(tiny, METHODS[method](sparsity=0.5))
    ids = prompts(13)[0]
    logits = []
    for chunks in ((13,), (4, 2, 7)):
        cache, start = DynamicCache(config=tiny.config), 0
        for n in chunks:
            tiny(ids[:, start : start + n], past_key_values=cache, use_cache=True)
            start += n
        logits.append(tiny(torch.tensor([[9]]), past_key_values=cache, use_cache=True).logits)
    assert torch.allclose(*logits, atol=1e-5)


def test_a_second_turn_adds_to_what_the_first_taught(tiny):
    caprese.apply(tiny, caprese.Griffin(sparsity=0.5))
    first, second = prompts(8, 6)
    cache = DynamicCache(config=tiny.config)
    tiny(first, past_key_values=cache, use_cache=True)
    memory = memory_of(cache).layer(0)
    one = memory.statistics["griffin"].clone()
    tiny(torch.tensor([[7]]), past_key_values=cache, use_cache=True)
    assert torch.equal(memory.statistics["griffin"], one)  # a generated token teaches nothing
    tiny(second, past_key_values=cache, use_cache=True)
    two = memory.statistics["griffin"]
    assert (two > one).any() and two.sum() == pytest.approx(14, rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_two_caches_do_not_disturb_each_other(tiny, method):
    caprese.apply(tiny, METHODS[method](sparsity=0.6))
    rows = prompts(9, 5)

    def run(interleaved: bool) -> list[torch.Tensor]:
        caches = [DynamicCache(config=tiny.config) for _ in rows]
        tokens, out = [], [[], []]
        steps = (
            [(i, s) for s in range(4) for i in range(2)]
            if interleaved
            else [(i, s) for i in range(2) for s in range(4)]
        )
        tokens = list(rows)
        for i, _ in steps:
            logits = tiny(tokens[i], past_key_values=caches[i], use_cache=True).logits[:, -1:]
            out[i].append(logits)
            tokens[i] = logits.argmax(-1)
        return [torch.cat(o) for o in out]

    for a, b in zip(run(True), run(False), strict=True):
        assert torch.equal(a, b)


def test_a_copied_cache_keeps_what_it_learned(tiny):
    caprese.apply(tiny, caprese.Griffin(sparsity=0.5))
    cache = DynamicCache(config=tiny.config)
    tiny(prompts(9)[0], past_key_values=cache, use_cache=True)
    twin = copy.deepcopy(cache)
    token = torch.tensor([[11]])
    a, b = (tiny(token, past_key_values=c, use_cache=True).logits for c in (cache, twin))
    assert torch.equal(a, b)


def test_gradient_checkpointing_sees_the_same_phases(tiny):
    ids = prompts(10)[0]
    model = recovered(caprese.apply(tiny, caprese.Griffin(sparsity=0.5)))
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            tiny.gradient_checkpointing_enable({"use_reentrant": False})
            tiny.train()
        for p in branch_parameters(model):
            p.requires_grad_(True).grad = None
        with caprese.phases(model, [4]):
            model(input_ids=ids, use_cache=False).logits.square().mean().backward()
        grads.append(torch.cat([p.grad.flatten() for p in branch_parameters(model)]))
    assert grads[0].abs().sum() > 0
    assert torch.allclose(*grads, atol=1e-6)


def test_sampled_sequences_of_one_prompt(tiny):
    caprese.apply(tiny, caprese.Griffin(sparsity=0.5))
    ids = prompts(6)[0]
    torch.manual_seed(0)
    out = tiny.generate(ids, max_new_tokens=5, do_sample=True, num_return_sequences=3)
    assert out.shape[0] == 3


def test_a_cache_filled_in_a_dense_pass_is_refused(tiny):
    caprese.apply(tiny, caprese.Griffin(sparsity=0.5))
    cache = DynamicCache(config=tiny.config)
    with caprese.dense(tiny):
        tiny(prompts(5)[0], past_key_values=cache, use_cache=True)
    with pytest.raises(caprese.CapreseError, match="has seen no prompt"):
        tiny(torch.tensor([[3]]), past_key_values=cache, use_cache=True)


def test_a_prompt_length_of_zero_is_refused_where_a_prompt_is_needed(tiny):
    caprese.apply(tiny, caprese.Griffin(sparsity=0.5))
    with pytest.raises(caprese.CapreseError, match="prompt"), caprese.phases(tiny, [0]):
        tiny(prompts(5)[0])


def test_phases_checks_its_lengths(tiny):
    caprese.apply(tiny, caprese.Griffin(sparsity=0.5))
    with pytest.raises(caprese.CapreseError, match="one length"), caprese.phases(tiny, [-1]):
        pass
    with pytest.raises(caprese.CapreseError, match="batch of 1"), caprese.phases(tiny, [1, 2]):
        tiny(prompts(5)[0])


def test_a_shared_statistic_is_not_taken_apart_once_its_sequences_moved(tiny):
    caprese.apply(tiny, caprese.Griffin(sparsity=0.5, shared_choice=True))
    ids, mask = padded(prompts(6, 4))
    cache = tiny(ids, attention_mask=mask, use_cache=True).past_key_values
    cache.batch_select_indices(torch.tensor([0]))
    with pytest.raises(caprese.CapreseError, match="inside a prompt pass"):
        cache.crop(-2)


def test_what_is_kept_does_not_grow_with_the_prompt() -> None:
    """The way back holds the last tokens' activations, not the whole pass they came from."""
    sizes = []
    for length in (40, 400):
        model = caprese.apply(tiny_llama(), caprese.Griffin(sparsity=0.5))
        cache = DynamicCache()
        with torch.no_grad():
            model(input_ids=torch.randint(2, 258, (1, length)), past_key_values=cache)
        seen = memory_of(cache).layer(0).tail
        sizes.append(sum(t.untyped_storage().nbytes() for t in (seen.x, seen.a, seen.z, seen.mask)))
    assert sizes[0] == sizes[1]


def test_a_crop_to_the_first_prompt_after_many_passes() -> None:
    """What is known there is kept however many passes follow; what is gone is said to be gone."""
    model = caprese.apply(tiny_llama(), caprese.Griffin(sparsity=0.5), reselect_every=1)
    ids = torch.randint(2, 258, (1, 120), generator=torch.Generator().manual_seed(0))

    def grown(to: int) -> DynamicCache:
        cache = DynamicCache()
        with torch.no_grad():
            model(input_ids=ids[:, :8], past_key_values=cache)
            for i in range(8, to):
                model(input_ids=ids[:, i : i + 1], past_key_values=cache)
        return cache

    expected = memory_of(grown(8)).layer(0).statistics["griffin"]
    cache = grown(120)
    cache.crop(-112)
    assert torch.equal(memory_of(cache).layer(0).statistics["griffin"], expected)
    with torch.no_grad():
        model(input_ids=ids[:, 8:9], past_key_values=cache)
    with pytest.raises(caprese.CapreseError, match=r"cropped to 20 tokens, and what was known .* is gone; crop to 8"):
        grown(120).crop(-100)


@pytest.mark.parametrize("name", ["_prefill", "_get_candidate_generator", "get_compiled_call"])
def test_a_transformers_without_a_hook_is_refused_where_it_attaches(tiny, monkeypatch, name):
    before = {module: dict(vars(module)) for module in tiny.modules()}
    owner = next(kind for kind in type(tiny).__mro__ if name in vars(kind))
    monkeypatch.delattr(owner, name)
    with pytest.raises(caprese.CapreseError, match=rf"transformers [\d.]+\S* has no LlamaForCausalLM\.{name}, which"):
        caprese.apply(tiny, caprese.Griffin(sparsity=0.5))
    assert {module: dict(vars(module)) for module in tiny.modules()} == before


def test_a_proposer_that_does_not_say_how_much_is_refused(tiny, monkeypatch):
    monkeypatch.setattr(type(tiny), "_get_candidate_generator", lambda *_, **__: object())
    caprese.apply(tiny, caprese.Griffin(sparsity=0.5))
    with pytest.raises(caprese.CapreseError, match="proposes tokens by object, which does not say how many"):
        tiny.generate(prompts(5)[0], prompt_lookup_num_tokens=3, max_new_tokens=4, do_sample=False)


def test_a_copy_of_an_applied_model_has_hooks_of_its_own(tiny):
    caprese.apply(tiny, caprese.Griffin(sparsity=0.5))
    twin, ids = copy.deepcopy(tiny), prompts(7)[0]
    caprese.remove(tiny)
    how = {"max_new_tokens": 6, "do_sample": False, "prefill_chunk_size": 3, "eos_token_id": None}
    dense = tiny.generate(ids, **how)
    with caprese.dense(twin):
        assert torch.equal(twin.generate(ids, **how), dense)
    chunked = twin.generate(ids, **how)  # its last chunk is one token
    whole = twin.generate(ids, **how | {"prefill_chunk_size": None})
    assert torch.equal(chunked, whole) and not torch.equal(whole, dense)


def test_many_candidates_may_be_rejected() -> None:
    """Prompt lookup proposes 50 tokens at a time, and most are taken back."""
    model = caprese.apply(tiny_llama(), caprese.Griffin(sparsity=0.5))
    ids = torch.randint(2, 258, (1, 45), generator=torch.Generator().manual_seed(0)).repeat(1, 2)
    how = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    out = model.generate(ids, prompt_lookup_num_tokens=50, **how)
    with caprese.dense(model):
        assert torch.equal(out, model.generate(ids, **how))
