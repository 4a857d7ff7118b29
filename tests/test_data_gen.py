"""Prompts, sampling and shards."""

from __future__ import annotations

import json

import datasets
import pytest
import torch
from conftest import byte_tokenizer, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from caprese.data_gen import (
    Sample,
    Samples,
    complete,
    load_prompts,
    read_shard,
    split_prompts,
    write_shard,
)
from caprese.data_gen.generate import NucleusSampler
from caprese.errors import CapreseError
from caprese.models import encode_prompt


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 999),
    top_p=st.floats(0.05, 0.99) | st.just(1.0),
    temperature=st.floats(0.3, 3.0),
    scale=st.sampled_from([0.01, 1.0, 8.0]),
    vocab=st.sampled_from([5, 300, 1000]),
)
def test_the_nucleus_is_that_of_the_full_sort(seed, top_p, temperature, scale, vocab):
    scores = scale * torch.randn(3, vocab, generator=torch.Generator().manual_seed(seed))
    probabilities, index = NucleusSampler(temperature, top_p, 0, torch.device("cpu")).nucleus(scores)
    mine = torch.zeros_like(scores).scatter_(-1, index, probabilities)
    warped = TemperatureLogitsWarper(temperature)(None, scores)
    theirs = (TopPLogitsWarper(top_p)(None, warped) if top_p < 1 else warped).softmax(-1)
    mine = mine / mine.sum(-1, keepdim=True)
    same = (mine > 0) == (theirs > 0)
    if top_p < 1:
        assert (~same).sum() <= 3  # a token exactly on the border, in float32
        if same.all():
            assert torch.allclose(mine, theirs, atol=1e-4)
    else:
        assert torch.allclose(mine, theirs, atol=1e-4)


def test_the_sampler_draws_what_it_should():
    scores = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).repeat(4000, 1)
    sampler = NucleusSampler(1.0, 0.9, 0, torch.device("cpu"))
    left = sampler(None, scores)
    assert (torch.isfinite(left).sum(-1) == 1).all()
    drawn = torch.bincount(left.argmax(-1), minlength=4) / 4000
    expected = scores[0, :3].softmax(-1)  # 0.64 + 0.24 < 0.9: the third crosses the border and stays
    assert torch.allclose(drawn[:3], expected, atol=0.03) and drawn[3] == 0


def test_gym_prompts_do_not_depend_on_how_many_are_asked():
    few, many = load_prompts("gym:gsm_symbolic", 20, seed=3), load_prompts("gym:gsm_symbolic", 60, seed=3)
    assert many[:20] == few and len({p.text for p in many}) == 60
    assert load_prompts("gym:gsm_symbolic", 20, seed=4) != few
    assert all(p.answer for p in few)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_prompts_from_files(tmp_path, kind):
    rows = [{"prompt": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(5)]
    path = tmp_path / f"p.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps(r) for r in rows) + "\n\n")
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    prompts = load_prompts(str(path), 4, seed=0)
    assert len(set(prompts)) == 4 and {(p.text, p.answer) for p in prompts} <= {
        (r["prompt"], r["answer"]) for r in rows
    }
    assert load_prompts(str(path), 2, seed=0) == prompts[:2]
    assert len({tuple(load_prompts(str(path), 4, seed)) for seed in range(8)}) > 1  # the seed draws


def test_neighbouring_seeds_share_no_gym_prompts():
    # items of this task follow from seed + index
    ours, theirs = ({p.text for p in load_prompts("gym:simple_equations", 40, seed)} for seed in (0, 1))
    assert len(ours & theirs) <= 1


def test_a_streamed_dataset_is_drawn_by_the_seed(monkeypatch):
    rows = datasets.Dataset.from_list([{"prompt": f"What is {i} + 1?"} for i in range(30)])
    monkeypatch.setattr(datasets, "load_dataset", lambda path, split, streaming: rows.to_iterable_dataset())
    texts = [[p.text for p in load_prompts("owner/name", 10, seed)] for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0] != rows["prompt"][:10]


def test_prompts_can_be_left_out(tmp_path):
    known = {p.text for p in load_prompts("gym:simple_equations", 10, seed=3)}
    others = load_prompts("gym:simple_equations", 10, 3, exclude=known)
    assert len(others) == 10 and not known & {p.text for p in others}
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    assert [p.text for p in load_prompts(str(path), 2, 0, exclude={"a"})] == ["b"]
    with pytest.raises(CapreseError, match="no prompts but those the adapter was trained on"):
        load_prompts(str(path), 2, 0, exclude={"a", "b"})


def test_splits_are_disjoint_and_the_test_split_is_stable(tmp_path):
    config = Samples(train=30, validation=5, test=7)
    small, large = split_prompts(config, 0), split_prompts(config.model_copy(update={"train": 60}), 0)
    assert small["test"] == large["test"] and small["validation"] == large["validation"]
    texts = [p.text for group in large.values() for p in group]
    assert len(set(texts)) == len(texts) == 72


def test_the_chat_template_is_used_if_there_is_one():
    tokenizer = byte_tokenizer()
    assert tokenizer.decode(encode_prompt(tokenizer, "Hi", "Think.", True)) == "Think. Hi\n"
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[go]"
    assert tokenizer.decode(encode_prompt(tokenizer, "Hi", "Think.", True)) == "[user]Think. Hi[go]"
    assert tokenizer.decode(encode_prompt(tokenizer, "Hi", "Think.", False)) == "Think. Hi\n"


def test_completions_end_at_end_of_text_and_are_the_models_own():
    model, tokenizer = tiny_llama(), byte_tokenizer()
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
    config = Samples(max_new_tokens=40, temperature=1.5, top_p=1.0, batch_size=2)
    rows = complete(model, tokenizer, prompts, config, seed=0)
    assert (
        rows
        == complete(model, tokenizer, prompts, config, seed=0)
        != complete(model, tokenizer, prompts, config, seed=1)
    )
    for row in rows:
        assert 1 <= len(row) <= 40 and 1 not in row[:-1]
    # nearly no temperature is greedy decoding
    cold = Samples(max_new_tokens=10, temperature=1e-4, batch_size=3)
    for prompt, row in zip(prompts, complete(model, tokenizer, prompts, cold, seed=0), strict=True):
        ids = torch.tensor([prompt])
        best = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False)
        assert best[0, len(prompt) :].tolist()[: len(row)] == row
    assert model.generation_config.max_new_tokens is None  # the model's own settings are back


def test_a_shard_comes_back_as_it_went(tmp_path):
    rows = [Sample([1, 2, 3, 4], 2, "prompt €", "completion", None), Sample([5, 6], 1, "b", "c", "42")]
    write_shard(tmp_path / "s.parquet", rows, {"seed": 3})
    assert read_shard(tmp_path / "s.parquet", {"seed": 3}) == rows
    assert rows[0].prompt_ids == [1, 2] and rows[0].completion_ids == [3, 4]
