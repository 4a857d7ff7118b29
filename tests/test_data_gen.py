"""Prompts, sampling and shards."""

from __future__ import annotations

import codecs
import gzip
import json

import datasets
import pytest
import torch
from conftest import byte_tokenizer, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, normalizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, TemperatureLogitsWarper, TopPLogitsWarper

from caprese.data_gen import (
    Sample,
    Samples,
    complete,
    load_prompts,
    read_shard,
    read_shards,
    split_prompts,
    write_shard,
)
from caprese.errors import CapreseError
from caprese.inference.sampling import in_nucleus, nucleus
from caprese.models import encode_prompt, encode_text


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 999),
    top_p=st.floats(0.05, 0.99) | st.just(1.0),
    temperature=st.floats(0.3, 3.0),
    scale=st.sampled_from([0.01, 1.0, 8.0]),
    vocab=st.sampled_from([5, 300, 1000, 5000]),
)
def test_the_nucleus_is_that_of_the_full_sort(seed, top_p, temperature, scale, vocab):
    scores = scale * torch.randn(3, vocab, generator=torch.Generator().manual_seed(seed))
    scores *= torch.tensor([[0.1], [1.0], [3.0]])  # the flatter, the more tokens are looked at
    probabilities, index = in_nucleus(scores, temperature, top_p)
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


@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_the_sampler_draws_what_it_should(top_p):
    scores = torch.tensor([[-1.0, 2.0, 0.0, 1.0, -torch.inf]]).repeat(4000, 1)
    sampler = nucleus(4000, 1.0, top_p, 0, torch.device("cpu"))
    drawn = torch.bincount(sampler(scores, torch.arange(4000)), minlength=5) / 4000
    expected = scores[0].softmax(-1)
    if top_p < 1:  # 0.64 + 0.24 < 0.9: the third crosses the border and stays
        expected[0] = 0
        expected /= expected.sum()
    assert torch.allclose(drawn, expected, atol=0.03) and not drawn[expected == 0].any()


def test_wide_and_narrow_nuclei_are_drawn_from_alike():
    """A row among others that are flatter: its tokens come as often as their probabilities say."""
    scores = torch.zeros(3000, 3000)
    scores[::2, [7, 2000]] = torch.tensor([12.0, 11.0])
    drawn = nucleus(3000, 1.0, 0.9, 1, torch.device("cpu"))(scores, torch.arange(3000))
    narrow, wide = drawn[::2], drawn[1::2]
    assert set(narrow.tolist()) == {7, 2000} and abs(float((narrow == 7).float().mean()) - 0.731) < 0.04
    assert len(wide.unique()) > 1000


def test_logits_that_are_no_numbers_are_named_and_the_coldest_draw_is_the_likeliest():
    scores = torch.randn(3, 600, generator=torch.Generator().manual_seed(0)) * 50
    cold = nucleus(3, 1e-300, 0.9, 0, torch.device("cpu"))
    assert torch.equal(cold(scores, torch.arange(3)), scores.argmax(-1))
    for value in (torch.nan, torch.inf):
        scores[1, 5] = value
        with pytest.raises(CapreseError, match="logits are not finite"):
            nucleus(3, 1.0, 0.9, 0, torch.device("cpu"))(scores, torch.arange(3))


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


def prompts_in(tmp_path, content: bytes | str, column: str = "prompt"):
    path = tmp_path / "p.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [(p.text, p.answer) for p in load_prompts(str(path), 50, 0, column)]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (codecs.BOM_UTF8 + b'{"prompt": "a", "answer": 4}\r\n\r\n', [("a", "4")]),
        (b'{"prompt": "a"}\n' + codecs.BOM_UTF8 + b'{"prompt": "a"}', [("a", None)]),  # two files in one
        (r'{"prompt": "\ud83d\ude00 \u0000", "answer": NaN}', [("\U0001f600 \0", None)]),
        ('{"prompt": [{"role": "user", "content": "a"}], "answer": "b"}', [("a", "b")]),
        ('{"prompt": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}', [("a", None)]),
    ],
    ids=["mark", "marks", "emoji", "message", "parts"],
)
def test_rows_as_others_write_them(tmp_path, content, expected):
    assert prompts_in(tmp_path, content) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            r'{"prompt": "ok"}' + "\n" + r'{"prompt": "x \ude00"}',
            r"p.jsonl, row 2: half of a character .*ude00.*'prompt'",
        ),
        (r'{"prompt": "a", "answer": "\ud83d."}', "row 1: half of a character .* in column 'answer'"),
        ('{"prompt": "a"}'.encode("utf-16"), "line 1: not UTF-8 text but UTF-16"),
        ('{"prompt": "a"}'.encode("utf-16-be"), "line 1: not UTF-8 text but UTF-16"),
        ('{"prompt": "caf\xe9"}'.encode("latin-1"), "line 1: not UTF-8 text; save"),
        (gzip.compress(b'{"prompt": "a"}', mtime=0), "is compressed; unpack it first"),
        ('[\n{"prompt": "a"}\n]', "line 1: not JSON .* no list over several lines"),
        ('[{"prompt": "a"}]', "line 1: not an object but list"),
        ('{"prompt": "a", "prompt": "b"}', "line 1: not JSON .'prompt' is there twice"),
        ("[" * 100_000, "line 1: not JSON"),
        ('{"prompt": ' + "9" * 5000 + "}", "line 1: not JSON"),
        ('{"prompt": 12}', r"no text in column 'prompt' but int \(columns: prompt\); see .column."),
        ('{"\\u001b[31m": 12}', r"columns: '\\x1b\[31m'"),
        (
            '{"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
            "2 messages .'user, a",
        ),
        ('{"prompt": [{"role": "user", "content": null}]}', "row 1: no text in column 'prompt'"),
        ('{"prompt": []}', "no text in column 'prompt' but list"),
        ('{"prompt": "\\n\\t"}', "row 1: the prompt is empty"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_rows_that_are_none(tmp_path, content, message):
    with pytest.raises(CapreseError, match=message) as caught:
        prompts_in(tmp_path, content)
    assert str(caught.value).isprintable()  # one line, no escapes


def test_columns_of_parquet(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = str(tmp_path / "p.parquet")

    def read(column: pa.Array) -> list[str]:
        pq.write_table(pa.table({"prompt": column}), path)
        return sorted(p.text for p in load_prompts(path, 9, 0))

    for kind in (pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        assert read(pa.array(["a", "b"], kind)) == ["a", "b"]
    assert read(pa.array([[{"role": "user", "content": "a"}]])) == ["a"]
    for column, name in ((pa.array([b"a"]), "bytes"), (pa.array([["a"]]), "list"), (pa.array([1.5]), "float")):
        with pytest.raises(CapreseError, match=f"row 1: no text in column 'prompt' but {name}"):
            read(column)
    with pytest.raises(CapreseError, match="not a readable Parquet file .*utf-8"):
        read(pa.array([b"\xff"]).view(pa.string()))
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["prompt", "prompt"]), path)
    with pytest.raises(CapreseError, match="not a readable Parquet file .Multiple matches"):
        load_prompts(path, 9, 0)
    (tmp_path / "p.csv").write_text("prompt\na\n")
    with pytest.raises(CapreseError, match="not from .csv; convert it"):
        load_prompts(str(tmp_path / "p.csv"), 9, 0)
    with pytest.raises(CapreseError, match="is a directory; give a .jsonl"):
        load_prompts(str(tmp_path), 9, 0)


def normalising_tokenizer():
    """One to which full-width digits are digits, and any white space is a blank."""
    tokenizer = byte_tokenizer()
    tokenizer._tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    )
    return tokenizer


def test_prompts_that_are_the_same_tokens_are_one(tmp_path, monkeypatch):
    tokenizer, path = normalising_tokenizer(), tmp_path / "p.jsonl"
    spellings = ("{}+1 =", "{}+1 =\n", "\t{}+1 =", "{}+1  =", "{}+\uff11 =")
    rows = [spelling.format(i) for i in range(20) for spelling in spellings]
    path.write_text("".join(json.dumps({"prompt": row}) + "\n" for row in rows))
    config = Samples(prompts=str(path), instruction="Go.", train=10, validation=4, test=6)
    encode = config.encode(tokenizer)
    splits = split_prompts(config, 0, tokenizer)
    assert [len(splits[name]) for name in ("test", "validation", "train")] == [6, 4, 10]
    every = [p for group in splits.values() for p in group]
    assert len({tuple(encode_prompt(tokenizer, p.text, "Go.", True)) for p in every}) == 20
    assert all(list(p.ids) == encode_prompt(tokenizer, p.text, "Go.", True) for p in every)
    # what an adapter was trained on is known in any spelling
    left = load_prompts(str(path), 50, 0, exclude={f" {i}+1 =" for i in range(15)}, encode=encode)
    assert sorted(int(p.text.strip().split("+")[0]) for p in left) == [15, 16, 17, 18, 19]
    # without a tokenizer, white space around them makes no difference
    assert len(load_prompts(str(path), 200, 0)) == 60
    # one to which all is the same ends too
    with pytest.raises(CapreseError, match="has 1 distinct prompts"):
        monkeypatch.setattr(Samples, "encode", lambda *_: lambda text: [7])
        split_prompts(Samples(prompts="chains:train", train=10, validation=4, test=6), 0, tokenizer)


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


TEMPLATES = {
    "raises": ("{{ raise_exception('System message\n is required') }}", "'System message is required'"),
    "names": (
        {"tool_use": "{{ messages[0].content }}", "rag": "x"},
        "there are 'rag', 'tool_use', and none is 'default'",
    ),
    "says nothing": ("{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}", "leaves out what the"),
    "blank": ("  \n", "leaves out what the user says"),
    "undefined": ("{{ tools.first.name }}{{ messages[0].content }}", "'tools' is undefined|has no attribute|None"),
    "no template": ("{% for m in messages %}", "it says"),
    "no text": (17, "it says"),
    "escapes": ("{{ raise_exception('\x1b[31mred') }}", r"\\x1b\[31mred"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_that_take_no_user_message(name):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template, message = TEMPLATES[name]
    tokenizer.name_or_path = "some/model"
    with pytest.raises(
        CapreseError, match="the chat template of 'some/model' does not take one user message.*" + message
    ) as e:
        encode_prompt(tokenizer, "Hi", "", True)
    assert str(e.value).isprintable()
    assert encode_prompt(tokenizer, "Hi", "", False) == byte_tokenizer()("Hi\n").input_ids


def test_templates_of_other_kinds(tmp_path):
    tokenizer = byte_tokenizer()

    def asked(template: object, text: str = "Hi  you") -> str:
        tokenizer.chat_template = template
        return tokenizer.decode(encode_prompt(tokenizer, text, "", True))

    assert asked("{% for m in messages %}<{{ m.content[0]['text'] }}>{% endfor %}") == "<Hi  you>"
    assert asked("{% for m in messages %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endfor %}") == "Hi  you"
    assert asked("[{{ messages[-1].content | trim }}]", "a\n b ") == "[a\n b]"
    assert asked("{{ messages[-1].content | tojson }}", 'say "x"\n') == '"say \\"x\\""'
    assert asked({"default": "d:{{ messages[0].content }}", "rag": "r"}) == "d:Hi  you"
    # as they lie on disk
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.decode(encode_prompt(loaded, "Hi", "", True)) == "d:Hi"
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(CapreseError, match="there are 'rag', and none is 'default'"):
        encode_prompt(AutoTokenizer.from_pretrained(tmp_path), "Hi", "", True)


@pytest.mark.parametrize("single", ["$A <end>", "<pad> $A <end>", "<pad> $A <pad> <end>", "<pad> $A"])
def test_no_prompt_ends_with_end_of_text(single):
    tokenizer, plain = byte_tokenizer(), byte_tokenizer()
    tokenizer._tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=[("<pad>", 0), ("<end>", 1)])
    before = [0] if single.startswith("<pad>") else []
    for text in ("Hi", "a<end>", "<end>"):
        assert encode_prompt(tokenizer, text, "Go.", True) == before + plain(f"Go. {text}\n").input_ids
        assert encode_text(tokenizer, text) == before + plain(text).input_ids
    tokenizer.chat_template = "<pad>{{ messages[0].content }}:"  # which begins the text itself
    assert encode_prompt(tokenizer, "Hi", "", True) == plain("<pad>Hi:").input_ids


def test_text_that_is_none():
    with pytest.raises(CapreseError, match=r"the prompt 'x\\udcff' holds half of a character"):
        encode_prompt(byte_tokenizer(), "x\udcff", "", True)
    tokenizer = normalising_tokenizer()
    tokenizer._tokenizer.normalizer = normalizers.Replace(Regex(r"[^a-z]"), "")
    with pytest.raises(CapreseError, match="has no token for anything in '12'"):
        encode_prompt(tokenizer, "12", "", True)


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


def test_a_shard_comes_back_as_it_went(tmp_path):
    rows = [Sample([1, 2, 3, 4], 2, "prompt €", "completion", None), Sample([5, 6], 1, "b", "c", "42")]
    write_shard(tmp_path / "s.parquet", rows, {"seed": 3})
    assert read_shard(tmp_path / "s.parquet", {"seed": 3}) == rows
    assert rows[0].prompt_ids == [1, 2] and rows[0].completion_ids == [3, 4]


def test_rows_of_several_shards_are_one_sequence(tmp_path):
    rows = [Sample([number, 7, 8], 1, f"p{number}", "c", None, "s") for number in range(11)]
    paths = [tmp_path / f"{at}.parquet" for at in range(4)]
    for path, some in zip(paths, (rows[:4], [], rows[4:5], rows[5:]), strict=True):
        write_shard(path, some, {})
    found = read_shards(paths, [{}] * 4)
    assert len(found) == 11 and list(found) == rows == [found[i] for i in range(11)]
    assert found[-1] == rows[-1] and found[3:9:2] == rows[3:9:2] and not read_shards([], [])
    with pytest.raises(IndexError):
        found[11]
