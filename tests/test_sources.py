"""Mixtures of prompts, and those that a model writes itself."""

from __future__ import annotations

import json
import os
from itertools import islice

import pyarrow.parquet as pq
import pytest
import torch
from conftest import byte_tokenizer, tiny_llama
from hypothesis import given
from hypothesis import strategies as st

import caprese
from caprese.data_gen import (
    OWN,
    Here,
    OwnPrompts,
    Sample,
    Samples,
    Shards,
    describe,
    interleave,
    make_samples,
    read_shard,
    trained_prompts,
    write_shard,
)
from caprese.data_gen.generate import ELSEWHERE, public_names, split_prompts
from caprese.data_gen.own import Sieve, head_of
from caprese.data_gen.sources import name_of, read_sources, share_out
from caprese.errors import CapreseError
from caprese.models import encode_prompt
from caprese.recovery.report import portable
from caprese.recovery.run import identity_of

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}<assistant>"


def write(path, texts, column="prompt"):
    path.write_text("".join(json.dumps({column: text}) + "\n" for text in texts))
    return str(path)


@given(st.integers(0, 60), st.lists(st.floats(0.05, 1), min_size=1, max_size=4))
def test_shares_add_up_and_never_fall(count, shares):
    now, before = share_out(count, shares), share_out(max(0, count - 1), shares)
    assert sum(now) == count and all(a >= b for a, b in zip(now, before, strict=True))
    for taken, share in zip(now, shares, strict=True):
        assert abs(taken - count * share / sum(shares)) < len(shares)


def test_shares_of_a_hundred_million():
    assert share_out(10**8, [0.45, 0.45, 0.1]) == [45_000_000, 45_000_000, 10_000_000]


def test_any_beginning_is_a_mixture():
    mixed = interleave([["a"] * 30, ["b"] * 10], [0.75, 0.25])
    for n in range(4, 41, 4):
        assert mixed[:n].count("b") == n // 4
    assert interleave([], []) == interleave([[]], [1]) == []
    for few in (7, 10):  # also where one of them ends before its share
        assert interleave([["a"] * 15, ["b"] * few], [0.75, 0.25])[:20] == mixed[:20]


def test_a_mixture_is_spelled_in_several_ways(tmp_path):
    line = Samples(prompts="gym:gsm_symbolic=3,self=1")
    listed = Samples(prompts=[{"source": "gym:gsm_symbolic", "share": 0.75}, {"source": "self", "share": 0.25}])
    assert line.facts == listed.facts and name_of(line.sources) == "gym:gsm_symbolic=0.75,self=0.25"
    assert [one.instruction for one in line.sources] == [line.instruction, ""]
    said = Samples(prompts=[{"source": "self", "instruction": "Be brief.", "column": "q"}]).sources[0]
    assert (said.instruction, said.column) == ("Be brief.", "q")
    odd = tmp_path / "a=1,b.jsonl"
    write(odd, ["x"])
    assert [one.source for one in read_sources(str(odd))] == [str(odd)]
    one, other = (
        caprese.Recipe(samples={"prompts": p}) for p in ("self=2,gym:leg_counting=2", "self,gym:leg_counting")
    )
    assert identity_of(one, [{}], {}) == identity_of(other, [{}], {})
    assert caprese.Recipe.model_validate(one.model_dump(mode="json")) == one


@pytest.mark.parametrize(
    ("prompts", "match"),
    [
        ("", "without a name"),
        ([], "give a source"),
        ("self=0.5,self=0.5", "self is there twice"),
        ("self=0", "greater than 0"),
        ("self=nan", "finite"),
        ("gym:gsm_symbolic=1e-300,self=1", "too far from the others"),
        ("gym:gsm_symbolic=1e308,self=1e308", "too far from the others"),
        ([{"source": "self", "weight": 2}], "weight"),
        ([7], "source"),
    ],
)
def test_what_is_no_mixture_is_refused(prompts, match):
    with pytest.raises((CapreseError, ValueError), match=match):
        Samples(prompts=prompts)


def test_splits_are_disjoint_across_sources(tmp_path, monkeypatch):
    one = write(tmp_path / "one.jsonl", [f"question {i}" for i in range(30)])
    two = write(tmp_path / "two.jsonl", [f"question {i} " for i in range(20, 60)], column="q")
    prompts = [{"source": one, "instruction": "Think."}, {"source": two, "column": "q", "share": 2}]
    config = Samples(prompts=prompts, train=24, validation=6, test=9, instruction="")
    for seed in range(8):
        splits = split_prompts(config, seed, byte_tokenizer())
        texts = [p.text.strip() for group in splits.values() for p in group]
        assert len(texts) == len(set(texts)) == 39
        assert [sum(p.source == "one.jsonl" for p in splits[s]) for s in ("test", "validation", "train")] == [3, 2, 8]
        larger = split_prompts(config.model_copy(update={"train": 44}), seed, byte_tokenizer())
        assert larger["test"] == splits["test"] and larger["validation"] == splits["validation"]
        texts = [p.text.strip() for group in larger.values() for p in group]
        assert len(texts) == len(set(texts))
    with pytest.raises(CapreseError, match=r"one\.jsonl has 30 distinct prompts"):
        split_prompts(config.model_copy(update={"test": 90}), 0)
    said = []
    monkeypatch.setattr("caprese.data_gen.generate.say", said.append)
    split_prompts(config.model_copy(update={"train": 200}), 0)
    assert len(said) == 2 and f"{one} has " in said[0]


def test_kinds_of_one_name_are_told_apart(tmp_path):
    paths = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        paths.append(write(tmp_path / name / "questions.jsonl", [f"{name} {i}" for i in range(20)]))
    splits = split_prompts(Samples(prompts=[*paths], train=8, validation=2, test=2), 0)
    assert {p.source for p in splits["train"]} == {"questions.jsonl (1)", "questions.jsonl (2)"}
    published = portable(caprese.Recipe(samples=Samples(prompts=[*paths])), None)
    assert [one.source for one in published.samples.prompts] == ["questions.jsonl (1)", "questions.jsonl (2)"]
    assert public_names([str(tmp_path / "elsewhere"), "gym:x"]) == [str(tmp_path / "elsewhere"), "gym:x"]
    (tmp_path / "elsewhere").mkdir()
    assert public_names([str(tmp_path / "elsewhere")]) == ["./elsewhere"]


def test_self_needs_a_model():
    with pytest.raises(CapreseError, match="written by the model"):
        split_prompts(Samples(prompts="self"), 0)


def chat_tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_the_head_is_what_comes_before_a_users_text():
    tokenizer = chat_tokenizer()
    head = head_of(tokenizer, True)
    assert tokenizer.decode(head.ids) == "<user>" and head.tail == "<end>" and head.ends == {1}
    assert head_of(tokenizer, False).ids == [1]  # its only start token
    assert head_of(byte_tokenizer(), True).tail == ""


def test_what_cannot_be_asked_is_dropped_and_counted():
    tokenizer = chat_tokenizer()
    sieve = Sieve(tokenizer, head_of(tokenizer, True), frozenset({1}))

    def draw(text, end=True):
        return tokenizer(text, add_special_tokens=False).input_ids + [1] * end

    long = "What is the best way to cook rice for a party of twenty people?"
    assert sieve.take(draw(long)) == long
    assert sieve.take(draw(long.replace("?", "!").upper())) is None
    assert sieve.take(draw(" \n")) is None and sieve.take([]) is None
    assert sieve.take(draw("How do", end=False)) is None
    assert sieve.take(draw("no no no no no no no no no no no no no no no")) is None
    assert sieve.take(draw("What is the capital of Peru?")) and sieve.take(draw("What is the capital of Chad?"))
    assert sieve.counts == {"usable": 3, "like another": 1, "empty": 1, "cut off": 2, "repeats itself": 1}
    assert str(sieve).startswith("3 of 8 prompts that the model wrote can be used (2 cut off, ")


def test_own_prompts_follow_from_the_seed_and_go_on(tmp_path, monkeypatch):
    model, tokenizer = tiny_llama(), byte_tokenizer()
    config = Samples(prompts="self", self_tokens=24, batch_size=4)

    def first(n, directory, seed=0):
        writer = OwnPrompts(model, Here(model, tokenizer), config, Shards(directory, OWN, {"seed": seed}, 4))
        return [p.text for p in islice(writer(n), n)]

    ten = first(10, tmp_path / "a")
    assert first(4, tmp_path / "b") == ten[:4] and first(10, tmp_path / "c", seed=1) != ten
    assert first(10, tmp_path / "b") == ten
    monkeypatch.setattr(Here, "complete", None)  # all is there
    assert first(10, tmp_path / "a") == ten


def test_a_model_that_writes_too_little_is_named(tmp_path):
    model, tokenizer = tiny_llama(), chat_tokenizer()
    model.lm_head.weight.data.zero_()  # uniform: draws hardly ever end in time
    config = Samples(prompts="self", self_tokens=2)
    writer = OwnPrompts(model, Here(model, tokenizer), config, Shards(tmp_path, OWN, {"seed": 0}, 64))
    with pytest.raises(CapreseError, match=r"prompts `self`: \d+ of 1\d\d prompts that the model wrote can be used"):
        list(writer(5000))  # which is known long before as many are drawn


def test_own_prompts_leave_room_for_their_answers(tmp_path):
    model, tokenizer = tiny_llama(), byte_tokenizer()
    model.config.max_position_embeddings = 24
    config = Samples(prompts="self", self_tokens=20, max_new_tokens=21, batch_size=4)
    writer = OwnPrompts(model, Here(model, tokenizer), config, Shards(tmp_path / "a", OWN, {"seed": 0}, 16))
    encode = config.encode(tokenizer, config.sources[0])
    assert all(len(encode(p.text)) + 21 <= 24 for p in islice(writer(4), 4)) and writer.sieve.counts["too long"]
    longer = config.model_copy(update={"self_tokens": 100})
    with pytest.raises(CapreseError, match=r"leaves \d+ tokens for a prompt of `self`"):
        next(iter(OwnPrompts(model, Here(model, tokenizer), longer, Shards(tmp_path / "b", OWN, {"seed": 0}, 16))(1)))


def test_a_base_models_prompts_hold_no_marks():
    tokenizer = byte_tokenizer()
    sieve = Sieve(tokenizer, head_of(tokenizer, True), frozenset({0}))
    assert sieve.take(tokenizer("once upon a time in the west").input_ids)
    assert sieve.take([*tokenizer("here it").input_ids, 1, *tokenizer(" goes").input_ids]) == "here it"
    assert sieve.take([1, *tokenizer("goes").input_ids]) is None and sieve.counts["empty"] == 1


def test_samples_are_the_same_whatever_the_day():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "<{{ strftime_now('%d %b %Y') }}>" + TEMPLATE
    config = Samples(chat_template=True)
    assert "26 Jul 2024" in tokenizer.decode(config.encode(tokenizer)("hello"))
    assert "26 Jul 2024" in tokenizer.decode(head_of(tokenizer, True).ids)
    assert "26 Jul 2024" not in tokenizer.decode(encode_prompt(tokenizer, "hello", "", True))


def test_shards_that_are_gone_or_say_nothing_of_themselves_are_named(tmp_path):
    rows = [Sample([5, 6, 7, 8], 2, "say it", "so")]
    write_shard(tmp_path / "train-00000.parquet", rows, {"seed": 0})
    both = ["train-00000.parquet", "train-00001.parquet", "test-00000.parquet"]
    assert trained_prompts(tmp_path, both[:1]) == {"say it"} and trained_prompts(tmp_path / "none", both) == set()
    with pytest.raises(CapreseError, match=r"train-00001\.parquet is gone, which says what was trained on"):
        trained_prompts(tmp_path, both)
    table = pq.read_table(tmp_path / "train-00000.parquet")
    facts = json.loads(table.schema.metadata[b"caprese"])
    facts["sattings"] = facts.pop("settings")
    pq.write_table(table.replace_schema_metadata({"caprese": json.dumps(facts)}), tmp_path / "train-00000.parquet")
    for settings in (None, {"seed": 0}):
        with pytest.raises(CapreseError, match="is damaged"):
            read_shard(tmp_path / "train-00000.parquet", settings)


def test_a_file_whose_name_is_no_text(tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9.jsonl")
    path.write_text('{"prompt": "one"}\n')
    assert public_names([str(path)]) == ["caf\\udce9.jsonl"]


def test_samples_say_what_source_they_are_of(tmp_path):
    file = write(tmp_path / "p.jsonl", [f"say {i}" for i in range(40)])
    config = Samples(
        prompts=f"{file}=0.5,self=0.5", train=8, validation=2, test=4, elsewhere=3, max_new_tokens=6, self_tokens=16,
        shard_size=8,
    )  # fmt: skip
    made = make_samples(tiny_llama(), byte_tokenizer(), config, tmp_path / "samples", 0, {"a": "b"})
    assert describe(made["train"])["sources"] == {"p.jsonl": 4, "self": 4}
    assert {s.source for s in made[ELSEWHERE]} == {ELSEWHERE} and len(made[ELSEWHERE]) == 3
    again = make_samples(tiny_llama(), byte_tokenizer(), config, tmp_path / "samples", 0, {"a": "b"})
    assert {name: list(rows) for name, rows in made.items()} == {name: list(rows) for name, rows in again.items()}
    assert {p.name for p in (tmp_path / "samples").iterdir()} >= {"self-00000.parquet", "elsewhere-00000.parquet"}
    # others in their place, only where that is wanted
    other = config.model_copy(update={"self_tokens": 12})
    with pytest.raises(CapreseError, match="made with another self_tokens"):
        make_samples(tiny_llama(), byte_tokenizer(), other, tmp_path / "samples", 0, {"a": "b"})
    replaced = []
    make_samples(tiny_llama(), byte_tokenizer(), other, tmp_path / "samples", 0, {"a": "b"}, lambda: replaced.append(1))
    assert replaced


def test_shards_without_sources_are_read(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    from caprese.data_gen.shards import _digest

    row = {"input_ids": [1, 2, 3], "prompt_length": 1, "prompt": "a", "completion": "b", "answer": None}
    facts = {"caprese": json.dumps({"settings": {}, "sha256": _digest([row])})}
    table = pa.Table.from_pylist([row])
    pq.write_table(table.replace_schema_metadata(facts), tmp_path / "x.parquet")
    assert read_shard(tmp_path / "x.parquet")[0].source == ""


def test_prompts_of_elsewhere_are_never_trained_on(tmp_path):
    from pathlib import Path

    import caprese.data_gen as room

    path = Path(room.__file__).with_name("elsewhere.jsonl")
    texts = [json.loads(line)["prompt"] for line in path.read_text().splitlines()]
    assert len(texts) == len(set(texts)) == 60
    file = write(tmp_path / "p.jsonl", [*texts[:5], *(f"say {i}" for i in range(20))])
    config = Samples(prompts=file, train=12, validation=2, test=2, elsewhere=60, max_new_tokens=2, shard_size=64)
    torch.manual_seed(0)
    made = make_samples(tiny_llama(), byte_tokenizer(), config, tmp_path / "samples", 0, {"a": "b"})
    trained = {s.prompt for split in ("train", "validation", "test") for s in made[split]}
    assert not trained & set(texts) and len(made[ELSEWHERE]) == 60


def test_a_source_whose_share_is_too_small_for_a_prompt(tmp_path):
    from caprese.data_gen import draw_prompts

    (drawn,) = draw_prompts(Samples(prompts="chains:distil=0.35,gym:leg_counting=0.65"), [1], 0)
    assert [len(each) for each in drawn] == [0, 1]
    assert len(read_sources(",".join(f"gym:{'x' * 20}{i}=0.05" for i in range(20)))) == 20  # longer than a file's name


def test_samples_of_other_prompts_are_not_taken_for_these(tmp_path):
    """Sizes of the splits are no setting, but they change which prompts a shard has."""
    file = write(tmp_path / "p.jsonl", [f"say {i}" for i in range(60)])
    config = Samples(prompts=file, train=16, validation=2, test=4, elsewhere=0, max_new_tokens=4, shard_size=8)
    made = make_samples(tiny_llama(), byte_tokenizer(), config, tmp_path / "samples", 0, {"a": "b"})
    shifted = config.model_copy(update={"test": 6})
    with pytest.raises(CapreseError, match="made with another"):
        make_samples(tiny_llama(), byte_tokenizer(), shifted, tmp_path / "samples", 0, {"a": "b"})
    anew = make_samples(tiny_llama(), byte_tokenizer(), shifted, tmp_path / "samples", 0, {"a": "b"}, lambda: None)
    asked = {split: {s.prompt for s in rows} for split, rows in anew.items()}
    assert not asked["test"] & asked["train"] and len(asked["train"]) == 16
    assert made["train"][0].prompt in asked["validation"]


def test_a_mark_that_is_not_said_to_be_special_ends_a_prompt():
    from tokenizers import AddedToken

    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("<assistant>", special=False)])
    tokenizer.chat_template = "<user>{{ messages[0].content }}<assistant><think>"
    head = head_of(tokenizer, True)
    (mark,) = tokenizer("<assistant>", add_special_tokens=False).input_ids
    assert head.ends == {mark} and head.tail == "<assistant>"
    sieve = Sieve(tokenizer, head, frozenset({1}))
    ids = tokenizer("How old is the moon?", add_special_tokens=False).input_ids
    assert sieve.take([*ids, mark]) == "How old is the moon?"
