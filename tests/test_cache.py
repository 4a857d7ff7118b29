"""The cache that is written in place, against the one of transformers."""

from __future__ import annotations

import copy

import torch
from conftest import tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from caprese.models.cache import RoomyCache, RoomyLayer, roomy_cache

STEPS = st.one_of(
    st.tuples(st.just("append"), st.integers(1, 90)),
    st.tuples(st.just("crop"), st.integers(0, 40)),
    st.tuples(st.just("select"), st.integers(1, 3)),
    st.tuples(st.just("repeat"), st.integers(1, 2)),
    st.tuples(st.just("copy"), st.integers(0, 1)),
    st.tuples(st.just("reset"), st.just(0)),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(STEPS, max_size=12))
def test_written_in_place_is_what_copying_gives(steps: list[tuple[str, int]]) -> None:
    ours, theirs = RoomyLayer(), DynamicLayer()
    batch, draw = 3, torch.Generator().manual_seed(0)
    for kind, number in [("append", 5), ("append", 1), *steps, ("append", 1)]:
        there = theirs.get_seq_length()
        if kind == "append":
            keys, values = torch.randn(2, batch, 2, number, 4, generator=draw)
            got, expected = ours.update(keys, values), theirs.update(keys, values)
            assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
        elif kind == "crop":
            for layer in (ours, theirs):
                layer.crop(-min(number, max(0, there - 1)))
        elif kind == "select" and there:
            batch = min(number, batch)
            for layer in (ours, theirs):
                layer.batch_select_indices(torch.arange(batch).flip(0))
        elif kind == "repeat" and there and batch * number <= 12:
            batch *= number
            for layer in (ours, theirs):
                layer.batch_repeat_interleave(number)
        elif kind == "copy":
            before, ours = ours, [copy.copy, copy.deepcopy][number](ours)
            if there:
                before.update(*torch.full((2, batch, 2, 1, 4), 7.0))
        elif kind == "reset":
            batch = 3
            ours.reset()
            theirs = DynamicLayer()
        assert ours.get_seq_length() == theirs.get_seq_length()
        if theirs.get_seq_length():
            assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)


def test_one_token_more_is_not_a_copy_of_all() -> None:
    layer = RoomyLayer()
    layer.update(*torch.zeros(2, 1, 2, 9, 4))
    layer.update(*torch.zeros(2, 1, 2, 1, 4))
    place = layer.keys.data_ptr()
    for _ in range(40):
        layer.update(*torch.zeros(2, 1, 2, 1, 4))
    assert layer.keys.data_ptr() == place and layer.get_seq_length() == 50
    layer.batch_select_indices(torch.tensor([0]))
    assert layer.rooms["keys"].untyped_storage().nbytes() == layer.keys.nbytes  # what was left behind is not held on to


def test_under_autocast_it_keeps_what_attention_reads() -> None:
    model = tiny_llama()
    ids = torch.arange(4, 16).view(2, 6)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        seen = []
        for cache in (roomy_cache(model), DynamicCache(config=model.config)):
            first = model(ids, past_key_values=cache).logits
            rest = [model(ids[:, at : at + 1], past_key_values=cache).logits for at in range(6)]
            seen.append(torch.cat([first, *rest], 1))
            kept = cache.layers[0].keys.dtype
            assert kept == (torch.bfloat16 if isinstance(cache, RoomyCache) else torch.float32)
    assert torch.equal(*seen)


def test_generate_is_the_same_with_it() -> None:
    from caprese.models.shapes import shape_config

    for model in (tiny_llama(), GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=258)).eval()):
        ids = torch.randint(2, 250, (3, 7), generator=torch.Generator().manual_seed(0))
        facts = {"max_new_tokens": 90, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        cache = roomy_cache(model)
        assert isinstance(cache, RoomyCache)
        ours = model.generate(ids, past_key_values=cache, **facts)
        assert torch.equal(ours, model.generate(ids, past_key_values=DynamicCache(config=model.config), **facts))
    kinds = {type(layer) for layer in RoomyCache(shape_config("gemma-2-2b")).layers}
    assert kinds == {RoomyLayer, DynamicSlidingWindowLayer}


def test_a_model_with_a_cache_of_its_own() -> None:
    model = tiny_llama()
    model._supports_default_dynamic_cache = lambda: False  # type: ignore[method-assign]
    assert roomy_cache(model) is None
