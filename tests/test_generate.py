"""The one decode loop: what it yields, in whatever batch, and what it takes from a model's settings."""

from __future__ import annotations

import pytest
import torch
from conftest import byte_tokenizer, tiny_llama
from families import BUILDERS
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

import caprese
from caprese import progress
from caprese.data_gen import Samples, complete
from caprese.inference import generate as loop
from caprese.inference import stream
from caprese.inference.generate import completions, ends_of, generate
from caprese.inference.sampling import Sampler, nucleus

PROMPTS = [[7, 8, 9, 10, 11, 12, 13, 14, 15], [20], [30, 31, 32, 33], [40, 41], [9, 9, 50, 51, 52, 53]]


def padded(prompts: list[list[int]]) -> dict[str, torch.Tensor]:
    longest = max(map(len, prompts))
    rows = [[0] * (longest - len(p)) + p for p in prompts]
    mask = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)}


def theirs(model: PreTrainedModel, prompts: list[list[int]], tokens: int, ends: list[int]) -> list[list[int]]:
    """transformers' own greedy answers, each up to its end."""
    inputs = padded(prompts)
    out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, eos_token_id=ends or None, pad_token_id=0)
    rows = out[:, inputs["input_ids"].shape[1] :].tolist()
    return [row[: next((i + 1 for i, token in enumerate(row) if token in ends), len(row))] for row in rows]


def some_ends(rows: list[list[int]]) -> list[int]:
    """Tokens at which these answers end at different times."""
    return sorted({row[3 * i] for i, row in enumerate(rows[:-1])})


def check(model: PreTrainedModel) -> None:
    """Greedy, token for token what transformers decodes, as sequences end one after another."""
    free = theirs(model, PROMPTS, 14, [])
    assert completions(generate(model, PROMPTS, 14), len(PROMPTS)) == free
    ends = some_ends(free)
    expected = theirs(model, PROMPTS, 14, ends)
    assert len({len(row) for row in expected}) > 2
    sizes = []
    found: list[list[int]] = [[] for _ in PROMPTS]
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    try:
        for rows, ids, _ in generate(model, PROMPTS, 14, ends=ends):
            for row, token in zip(rows.tolist(), ids.tolist(), strict=True):
                found[row].append(token)
    finally:
        hook.remove()
    assert found == expected
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-1]  # those that ended left


@pytest.mark.parametrize("method", ["dense", "griffin"])
@pytest.mark.parametrize("kind", BUILDERS)
def test_a_padded_batch_is_as_in_transformers(kind: str, method: str) -> None:
    model = BUILDERS[kind]()
    if method == "griffin":
        caprese.apply(model, caprese.Griffin(sparsity=0.5))
    check(model)


@pytest.mark.parametrize(
    ("methods", "reselect_every"),
    [
        (caprese.Griffin(sparsity=0.5), 3),
        (caprese.Griffin(sparsity=0.5, shared_choice=True), None),
        (caprese.Cats(sparsity=0.5), None),
        (caprese.Mamba(layers=[1]), None),
        ([caprese.Mamba(layers=[0]), caprese.Griffin(sparsity=0.5)], None),
    ],
    ids=["reselect", "shared", "cats", "mamba", "mamba+griffin"],
)
@pytest.mark.parametrize("fused", [False, True])
def test_an_applied_batch_is_as_in_transformers(methods, reselect_every, fused: bool) -> None:
    model = tiny_llama()
    calibration = None
    if isinstance(methods, caprese.Cats):
        rows = [caprese.Tokens(torch.arange(2, 34).view(2, 16), torch.tensor([4, 4]))]
        calibration = caprese.calibrate(model, methods, rows)
    caprese.apply(model, methods, calibration=calibration, reselect_every=reselect_every)
    if fused:
        caprese.fuse(model)
    check(model)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
def test_copies_of_one_prompt_are_read_once(kind: str) -> None:
    model = BUILDERS[kind]()
    caprese.apply(model, caprese.Griffin(sparsity=0.5))
    shapes = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    found = completions(generate(model, PROMPTS[:2], 6, copies=3), 6)
    hook.remove()
    one = theirs(model, PROMPTS[:2], 6, [])
    assert found == [one[0]] * 3 + [one[1]] * 3 and shapes == [(2, 9)] + [(6, 1)] * 5


class Drawn(LogitsProcessor):
    """A sampler of the whole batch, as generation in transformers would draw with it."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        drawn = self.sampler(scores, torch.arange(len(scores)))[:, None]
        return torch.full_like(scores, -torch.inf).scatter_(-1, drawn, 0.0)


@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_the_draws_are_those_over_the_whole_batch(monkeypatch, top_p: float) -> None:
    model = tiny_llama()
    prompts = [*PROMPTS, [60, 61], [70], [80, 81, 82]]
    model.generation_config.eos_token_id = ends = list(range(0, 258, 17))
    inputs = padded(prompts)
    draw = LogitsProcessorList([Drawn(nucleus(8, 1.3, top_p, 5, torch.device("cpu")))])
    out = model.generate(
        **inputs, max_new_tokens=25, do_sample=False, logits_processor=draw, eos_token_id=ends, pad_token_id=0
    )[:, inputs["input_ids"].shape[1] :].tolist()
    expected = [row[: next((i + 1 for i, token in enumerate(row) if token in ends), len(row))] for row in out]

    def mine() -> list[list[int]]:
        sampler = nucleus(8, 1.3, top_p, 5, torch.device("cpu"))
        return completions(generate(model, prompts, 25, sampler, ends=ends), 8)

    leaving = mine()
    assert leaving == expected and len({len(row) for row in leaving}) > 3
    monkeypatch.setattr(loop, "_ENDED", 2)  # nobody leaves
    assert mine() == leaving


def test_a_flat_row_that_ended_changes_no_draw(monkeypatch) -> None:
    """Where one row's nucleus is wider than the head, all draw among more tokens; a row that ended is not asked."""
    model = tiny_llama(vocab_size=600, initializer_range=0.05)
    ends = list(range(0, 600, 11))

    def mine() -> list[list[int]]:
        sampler = nucleus(5, 1.0, 0.95, 3, torch.device("cpu"))
        return completions(generate(model, PROMPTS, 30, sampler, ends=ends), 5)

    leaving = mine()
    monkeypatch.setattr(loop, "_ENDED", 2)
    assert mine() == leaving and len({len(row) for row in leaving}) > 2


def test_ends_are_what_anything_knows() -> None:
    model, tokenizer = tiny_llama(eos_token_id=[1, 7]), byte_tokenizer()
    model.generation_config = GenerationConfig(eos_token_id=[9, 12])
    assert ends_of(model) == {1, 7, 9, 12}
    assert ends_of(model, tokenizer) == {1, 9, 12}  # 7 is a letter of this tokenizer, and a default of the config
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    model.config.eos_token_id = tokenizer.convert_tokens_to_ids("<turn>")
    model.generation_config.eos_token_id = None
    assert ends_of(model, tokenizer) == {1, len(tokenizer) - 1}
    model.config.eos_token_id = tokenizer.eos_token = None
    assert ends_of(model, tokenizer) == frozenset()


@pytest.mark.parametrize("known_to", ["generation config", "tokenizer"])
def test_a_sample_stops_at_any_end(known_to: str) -> None:
    model, tokenizer = tiny_llama(), byte_tokenizer()
    prompt = [11, 12, 13]
    free = theirs(model, [prompt], 20, [])[0]
    end = next(token for i, token in enumerate(free) if i > 4 and token not in free[:i])
    own, other = (end, 250) if known_to == "generation config" else (250, end)
    model.generation_config.eos_token_id = own
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(other)
    config = Samples(max_new_tokens=20, temperature=1e-4)
    assert complete(model, tokenizer, [prompt], config, 0)[0] == free[: free.index(end) + 1]
    assert stream(model, tokenizer, "abc", max_new_tokens=20)["new_tokens"] <= 20


def test_settings_of_a_model_do_not_reach_the_loop() -> None:
    """Sampling defaults, penalties, limits, kinds of cache and a missing pad token, as checkpoints have them."""
    plain, tokenizer = tiny_llama(), byte_tokenizer()
    expected = stream(plain, tokenizer, "1+1", max_new_tokens=12)
    model = tiny_llama(use_cache=False, pad_token_id=None)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=5.0,
        top_k=3,
        repetition_penalty=9.0,
        no_repeat_ngram_size=1,
        max_length=5,
        max_new_tokens=2,
        min_new_tokens=50,
        cache_implementation="static",
        use_cache=False,
        eos_token_id=[1],
    )
    held = model.generation_config.to_dict()
    for _ in range(2):
        found = stream(model, tokenizer, "1+1", max_new_tokens=12)
        assert (found["text"], found["new_tokens"]) == (expected["text"], expected["new_tokens"])
    config = Samples(max_new_tokens=12, batch_size=2)
    assert complete(model, tokenizer, PROMPTS, config, 4) == complete(plain, tokenizer, PROMPTS, config, 4)
    assert model.generation_config.to_dict() == held


def test_a_stream_is_seeded_and_says_what_it_wrote() -> None:
    model, tokenizer, parts = tiny_llama(), byte_tokenizer(), []

    def hot(seed: int) -> Sampler:
        return nucleus(1, 1.5, 0.9, seed, torch.device("cpu"))

    one = stream(model, tokenizer, "hello", hot(3), max_new_tokens=16, emit=parts.append)
    again = stream(model, tokenizer, "hello", hot(3), max_new_tokens=16)
    assert one["text"] == again["text"] == "".join(parts) and one["text"]
    assert one["text"] != stream(model, tokenizer, "hello", hot(4), max_new_tokens=16)["text"]
    assert stream(model, tokenizer, "hello", max_new_tokens=1)["ttnt_ms"] is None


def test_a_prompt_without_tokens_is_refused() -> None:
    with pytest.raises(caprese.CapreseError, match="a prompt has no tokens"):
        next(generate(tiny_llama(), [[5, 6], []], 4))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_an_applied_model_has_a_cache_whatever_training_left_off(kind: str, capsys, monkeypatch) -> None:
    """transformers' own generate runs efficient without being told to; remove puts the settings back."""
    monkeypatch.setattr(progress, "quiet", False)
    model, plain = BUILDERS[kind](), BUILDERS[kind]()
    model.config.use_cache = model.generation_config.use_cache = False
    how = {**padded(PROMPTS), "max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    dense = plain.generate(**how)
    caprese.apply(plain, caprese.Griffin(sparsity=0.8))
    assert capsys.readouterr().err == ""
    caprese.apply(model, caprese.Griffin(sparsity=0.8))
    assert "use_cache false" in capsys.readouterr().err
    assert torch.equal(model.generate(**how), plain.generate(**how)) and not torch.equal(model.generate(**how), dense)
    assert capsys.readouterr().err == ""
    assert torch.equal(model.generate(**how, use_cache=False), dense)
    assert "runs dense" in capsys.readouterr().err
    caprese.remove(model)
    assert model.config.use_cache is model.generation_config.use_cache is False
    caprese.remove(plain)
    assert plain.config.use_cache is plain.generation_config.use_cache is True
    assert not capsys.readouterr().err
