"""Reselection in distillation and evaluation: what is measured is what generation does."""

from __future__ import annotations

import pytest
import torch
from conftest import byte_tokenizer, recovered, tiny_llama
from families import tiny as family
from transformers import DynamicCache

import caprese
from caprese.data_gen import Sample
from caprese.distill import make_batches
from caprese.distill.batches import completion_hidden, lm_logits, prefill
from caprese.efficient_methods import phases_of
from caprese.errors import CapreseError
from caprese.evaluation import parameter_counts, time_to_next_token


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "opt"])
@pytest.mark.parametrize("every", [None, 1, 3, 4, 50])
def test_blocks_of_a_known_completion_are_what_generation_computed(kind, every):
    model = caprese.apply(family(kind), caprese.Griffin(sparsity=0.5), reselect_every=every)
    adapted = recovered(model)
    generator = torch.Generator().manual_seed(1)
    samples, logits = [], {}
    for length, new in ((5, 12), (9, 8), (1, 12)):
        ids = torch.randint(2, 258, (1, length), generator=generator)
        out = adapted.generate(
            input_ids=ids, max_new_tokens=new, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        tokens = out.sequences[0].tolist()
        samples.append(Sample(tokens, length, "", ""))
        logits[tuple(tokens)] = torch.cat(out.logits)[1:]  # the first is the dense prompt's
    (batch,) = make_batches(samples, 4)
    hidden = completion_hidden(adapted, batch, prefill(adapted, batch)).split(batch.mask.sum(-1).tolist())
    ordered = sorted(samples, key=lambda s: (len(s.input_ids), s.input_ids))
    for row, sample in enumerate(ordered):
        expected = logits[tuple(sample.input_ids)]
        got = lm_logits(adapted, hidden[row])
        assert torch.allclose(got, expected, atol=2e-4), (row, float((got - expected).abs().max()))


def test_it_changes_what_is_generated_and_rewrites_the_cache():
    model = caprese.apply(tiny_llama(eos_token_id=None), caprese.Griffin(sparsity=0.7))
    ids = torch.randint(2, 258, (1, 6), generator=torch.Generator().manual_seed(3))
    caches = {}
    for every in (None, 4):
        with caprese.reselection(model, every):
            out = model.generate(ids, max_new_tokens=13, do_sample=False, return_dict_in_generate=True)
        caches[every] = out
    first = caches[4].past_key_values
    with caprese.dense(model):
        whole = model(caches[4].sequences, use_cache=True).past_key_values
    # after 12 decoded tokens, two blocks of 4 have been rewritten; the third is as the efficient model left it
    n = 6 + 8
    layers = list(zip(first.layers, whole.layers, strict=True))
    assert all(torch.allclose(a.keys[..., :n, :], b.keys[..., :n, :], atol=1e-5) for a, b in layers)
    assert not all(torch.allclose(a.keys[..., n : n + 4, :], b.keys[..., n : n + 4, :], atol=1e-5) for a, b in layers)
    plain = caches[None].past_key_values.layers[1].keys
    with caprese.dense(model):
        other = model(caches[None].sequences, use_cache=True).past_key_values.layers[1].keys
    assert not torch.allclose(plain[..., :n, :], other[..., :n, :], atol=1e-5)


@pytest.mark.slow
def test_a_recipe_with_reselection_saves_it_and_load_may_say_otherwise(small_recipe):
    model = tiny_llama()
    recipe = small_recipe.model_copy(update={"reselect_every": 4, "model": "tiny"})
    report = caprese.recover(model, byte_tokenizer(), recipe)
    assert report["reselect_every"] == 4
    assert phases_of(caprese.load(tiny_llama(), recipe.output)).reselect_every == 4
    assert phases_of(caprese.load(tiny_llama(), recipe.output, reselect_every=None)).reselect_every is None
    # the choice of the whole generation is not made from the prompt alone, so it costs less
    plain = small_recipe.model_copy(update={"model": "tiny", "output": recipe.output + "-plain"})
    without = caprese.recover(model, byte_tokenizer(), plain)
    assert report["quality"]["efficient"]["kl"] < without["quality"]["efficient"]["kl"]


def test_it_takes_a_positive_number(tiny):
    with pytest.raises(CapreseError, match="from 1"):
        caprese.apply(tiny, caprese.Griffin(), reselect_every=0)
    caprese.apply(tiny, caprese.Griffin())
    with pytest.raises(CapreseError, match="from 1"), caprese.reselection(tiny, -1):
        pass


@pytest.mark.parametrize("between", ["dense", "without", "phases"])
def test_passes_in_between_are_not_rewritten(between: str) -> None:
    """Tokens decoded another way are no part of a block: reselection rewrites only what it noted, where it lies."""
    model = caprese.apply(tiny_llama(), caprese.Griffin(sparsity=0.5), reselect_every=4)
    ids = torch.randint(2, 258, (1, 20), generator=torch.Generator().manual_seed(0))
    cache = DynamicCache()

    def decode(first: int, count: int) -> None:
        for i in range(first, first + count):
            model(input_ids=ids[:, i : i + 1], past_key_values=cache)

    with torch.no_grad():
        model(input_ids=ids[:, :8], past_key_values=cache)
        decode(8, 2)
        if between == "phases":
            with caprese.phases(model, [8]):
                model(input_ids=ids[:, 10:15], past_key_values=cache)
        else:
            with caprese.dense(model) if between == "dense" else caprese.reselection(model, None):
                decode(10, 5)
        lower = cache.layers[0].keys.clone()  # of the first layer: they depend on token and place alone
        decode(15, 5)
        assert cache.get_seq_length() == 20
        whole = DynamicCache()
        with caprese.dense(model):
            model(input_ids=ids, past_key_values=whole)
    assert torch.equal(cache.layers[0].keys[:, :, :15], lower)
    torch.testing.assert_close(cache.layers[0].keys, whole.layers[0].keys, atol=1e-5, rtol=1e-5)


def test_time_counts_the_dense_passes() -> None:
    model = caprese.apply(tiny_llama(), caprese.Griffin(sparsity=0.5))
    alone = parameter_counts(model)
    with caprese.reselection(model, 4):
        counts = parameter_counts(model)
        times = time_to_next_token(model, list(range(2, 10)), 4, ("dense", "efficient"))
    assert counts["active_efficient"] == alone["active_efficient"] + round(alone["active_dense"] / 4)
    assert set(times) == {"dense", "efficient"}
