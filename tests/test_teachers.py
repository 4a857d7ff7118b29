"""Samples from an engine behind an endpoint: that it is this model, in order, whatever breaks on the way."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from conftest import byte_tokenizer, tiny_llama
from engine import Engine
from peft import LoraConfig, get_peft_model
from typer.testing import CliRunner

import caprese
from caprese.cli import app
from caprese.data_gen import Asked, Prompt, Samples, Shards, complete_in_shards, read_shard, teacher_of
from caprese.data_gen.probes import Probe, prove
from caprese.errors import CapreseError
from caprese.inference.generate import ends_of

PROMPTS = [[5, 6, 7], [40, 41], [99] * 9, [200, 3], [17], [18, 19, 20, 21]]


@pytest.fixture
def engine() -> Iterator[Engine]:
    found = Engine(tiny_llama(), byte_tokenizer())
    yield found
    found.close()


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries that follow one another without waiting."""
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.001)
    monkeypatch.setattr(openai._base_client, "MAX_RETRY_DELAY", 0.002)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def drawn(engine: Engine, model: torch.nn.Module | None = None, **settings: object) -> list[list[list[int]]]:
    config = Samples(**{"teacher": engine.url, "max_new_tokens": 12, "temperature": 1.0, **settings})
    with teacher_of(config, model or tiny_llama(), byte_tokenizer()) as teacher:
        return list(teacher.complete([Asked(PROMPTS, (0, n)) for n in range(3)], config))


def samples_of(engine: Engine) -> list[dict[str, object]]:
    return [body for body in engine.asked if body["temperature"]]


def test_completions_are_the_engines_own_in_order(engine):
    shards = drawn(engine)
    assert [len(shard) for shard in shards] == [6, 6, 6] and shards[0] != shards[1]
    by_seed = {(tuple(body["prompt"]), body["seed"]): body for body in samples_of(engine)}
    assert len(by_seed) == 18
    ends = ends_of(engine.model, engine.tokenizer)
    for shard in shards:
        for prompt, ids in zip(PROMPTS, shard, strict=True):
            answers = [
                engine.answer(b)["choices"][0]["token_ids"] for (p, _), b in by_seed.items() if list(p) == prompt
            ]
            assert (ids in answers and len(ids) == 12) or ids[-1] in ends
    for body in samples_of(engine):  # nothing of the engine's own defaults comes between
        assert body["top_k"] == -1 and body["min_p"] == 0 and body["repetition_penalty"] == 1 and body["top_p"] == 0.95
    assert drawn(engine) == shards


def test_ids_among_the_log_probabilities_are_read(engine):
    want = drawn(engine)
    engine.shape = "llama.cpp"
    assert drawn(engine) == want


def test_samples_read_back_from_text_are_counted():
    model, tokenizer = caprese.load_base("reasoner-tiny")
    engine = Engine(model, tokenizer)
    config = Samples(teacher=engine.url, max_new_tokens=8, temperature=1.0, instruction="")
    prompts = [config.encode(tokenizer)(f"{n}+4={n + 4};+7=") for n in range(6)]

    def read() -> tuple[list[list[list[int]]], str]:
        with teacher_of(config, model, tokenizer) as teacher:
            return list(teacher.complete([Asked(prompts, 0)], config)), teacher.note

    want, note = read()
    assert note == ""
    engine.shape = "none"
    assert read() == (want, "6 of 6 samples were read back from their text")
    asked, answer = len(engine.asked), engine.answer

    def broken(body: dict[str, Any]) -> dict[str, Any]:
        told = answer(body)
        if body["temperature"] and len(engine.asked) == asked + 12:  # one says more tokens than its text has
            told["usage"]["completion_tokens"] += 5
        return told

    engine.answer = broken
    assert read()[1] == (
        "6 of 6 samples were read back from their text, 1 drawn anew as theirs does not give back its tokens"
    )
    engine.shape, asked = "llama.cpp", len(engine.asked)

    def merged(body: dict[str, Any]) -> dict[str, Any]:
        told = answer(body)
        if body["temperature"] and len(engine.asked) == asked + 12:  # letters of several tokens have one row
            del told["choices"][0]["logprobs"]["content"][1:3]
        return told

    engine.answer = merged
    assert read()[1].startswith("0 of 6 samples were read back from their text, 1 drawn anew")
    engine.shape = "none"
    engine.answer = lambda body: {**answer(body), "usage": {"completion_tokens": 99}}
    with pytest.raises(CapreseError, match="gives no token ids, and its texts do not give back those that were drawn"):
        read()
    engine.close()


def test_as_many_at_once_as_are_allowed(engine):
    engine.delay = 0.02
    drawn(engine, teacher_concurrency=4)
    assert engine.most == 4


def test_what_passes_is_tried_again(engine):
    want = drawn(engine)
    engine.failures = [503, 0, 429, 500, 0]
    assert drawn(engine) == want and not engine.failures


def scaled(by: float) -> torch.nn.Module:
    model = tiny_llama()
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data.mul_(by)
    return model


def in_bits(bits: int) -> torch.nn.Module:
    model = tiny_llama()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            scale = parameter.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
            parameter.data = (parameter / scale).round() * scale
    return model


def with_lora() -> torch.nn.Module:
    torch.manual_seed(0)
    adapted = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj", "v_proj"], r=4))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2)
    return adapted.merge_and_unload()


@pytest.mark.parametrize("other", [lambda: tiny_llama(1), lambda: scaled(1.1), lambda: in_bits(4), with_lora])
def test_another_model_is_refused_with_the_figure(engine, other):
    with pytest.raises(CapreseError, match=r"is not the model that is loaded here: log-probabilities \d"):
        drawn(engine, other())
    assert not samples_of(engine)


def test_bfloat16_is_the_same_model(engine):
    engine.model = copy.deepcopy(engine.model).to(torch.bfloat16)
    assert drawn(engine)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"text": "another text"}, "has another vocabulary: it says 'another text' where"),
        ({"logprobs": None}, "gives no log-probabilities"),
        ({"finish_reason": "tool_calls"}, "does not answer as OpenAI's completions do"),
        ({"token_ids": [10**6]}, "does not answer as OpenAI's completions do"),
        ({"token_ids": "abc"}, "does not answer as OpenAI's completions do"),
        ({"token_ids": [5] * 100}, "does not answer as OpenAI's completions do"),
    ],
)
def test_answers_that_do_not_fit_are_refused(engine, changes, line):
    engine.changes = changes
    with pytest.raises(CapreseError, match=line):
        drawn(engine)


def test_which_model_of_several(engine):
    lora = {"id": "tuned", "object": "model", "parent": "base"}
    engine.served.append(lora)
    assert drawn(engine)  # the base, not the LoRA on it
    engine.served.append({"id": "other", "object": "model"})
    with pytest.raises(CapreseError, match=r"serves several models \(base, other\); name one with `teacher_model`"):
        drawn(engine)
    assert drawn(engine, teacher_model="other")
    with pytest.raises(CapreseError, match="serves no 'third'; it serves base, other"):
        drawn(engine, teacher_model="third")


def test_a_key_is_asked_for_and_kept_nowhere(engine, monkeypatch):
    engine.key = "sk-secret"
    with pytest.raises(CapreseError, match="wants a key .*set OPENAI_API_KEY"):
        drawn(engine)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    assert drawn(engine)


@pytest.mark.parametrize(
    ("teacher", "line"),
    [
        ("htp://x", "neither here nor vllm nor an address"),
        ("localhost:8000", "neither here nor vllm nor an address"),
        ("http://", "neither here nor vllm nor an address"),
        ("http://x:99999", "neither here nor vllm nor an address"),
        ("http://me:secret@x/v1", "holds no name, key or question"),
        ("http://x/v1?key=secret", "holds no name, key or question"),
    ],
)
def test_no_address_is_refused_before_any_work(teacher, line, tiny_dir):
    done = CliRunner().invoke(app, ["recover", "--model", str(tiny_dir), "--teacher", teacher, "--dry-run"])
    assert done.exit_code == 1 and line in " ".join(done.output.split()) and "secret" not in done.output


def test_what_never_passes_is_not_the_prompts_fault(engine):
    engine.failures = [503] * 1000
    with pytest.raises(CapreseError, match=r"no answer from .*503.*; see that it runs, then run again"):
        drawn(engine)


def test_a_page_is_no_endpoint(engine, monkeypatch):
    monkeypatch.setattr(engine, "served", "<html>")
    with pytest.raises(CapreseError, match="lists no models .*; give the address that ends in /v1"):
        drawn(engine)


def test_a_key_of_a_text_is_none(engine, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "\u201csk\u201d")
    with pytest.raises(CapreseError, match="OPENAI_API_KEY is no key"):
        drawn(engine)


def test_no_proxy_stands_before_this_machine(engine, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert drawn(engine)


def test_behind_an_end_that_the_engine_does_not_know_nothing_is_kept(engine):
    answer, end = engine.answer, engine.tokenizer.eos_token_id

    def longer(body: dict[str, Any]) -> dict[str, Any]:
        told = answer(body)
        if body["temperature"]:
            told["choices"][0] |= {"token_ids": [5, end, 7, 8], "finish_reason": "length"}
        return told

    engine.answer = longer
    assert drawn(engine)[0] == [[5, end]] * 6


def test_where_nothing_can_be_written_nothing_more_is_asked(engine, tmp_path):
    config = Samples(teacher=engine.url, max_new_tokens=3, temperature=1.0, teacher_concurrency=2)
    shards = Shards(tmp_path / "file" / "samples", "train", {"seed": 0}, 4)
    (tmp_path / "file").write_text("")
    prompts = [Prompt(str(i), ids=[2 + i, 9]) for i in range(80)]
    with teacher_of(config, tiny_llama(), byte_tokenizer()) as teacher:
        with pytest.raises(CapreseError, match="cannot write"):
            complete_in_shards(teacher, prompts, config, shards, lambda n: None)
        assert len(samples_of(engine)) < 40
        assert not [thread for thread in threading.enumerate() if thread.name == "caprese-endpoint"]


def test_a_model_of_no_endpoint_is_refused():
    with pytest.raises(CapreseError, match="`teacher_model` is of an endpoint"):
        Samples(teacher_model="base")


def test_one_text_proves_nothing(engine):
    """Where a model writes prompts, all begin alike: other questions are asked."""
    config = Samples(teacher=engine.url, max_new_tokens=3, temperature=1.0)
    with teacher_of(config, tiny_llama(), byte_tokenizer()) as teacher:
        list(teacher.complete([Asked([[5]] * 8, 0)], config))
    probes = [tuple(body["prompt"]) for body in engine.asked if not body["temperature"]]
    assert len(set(probes)) == len(probes) == 6


def test_nobody_there(engine):
    engine.close()
    with pytest.raises(CapreseError, match=r"no answer from http://127.*finished shards are kept"):
        drawn(engine)


def test_a_server_that_goes_loses_no_finished_shard(engine, tmp_path):
    config = Samples(teacher=engine.url, max_new_tokens=6, temperature=1.0, teacher_concurrency=4)
    shards = Shards(tmp_path, "train", {"seed": 0}, 6)
    prompts = [Prompt(str(i), ids=[2 + i, 9]) for i in range(30)]

    def make() -> list[object]:
        with teacher_of(config, tiny_llama(), byte_tokenizer()) as teacher:
            return complete_in_shards(teacher, prompts, config, shards, lambda n: None)

    answer, left = engine.answer, [20]

    def going(body: dict[str, object]) -> dict[str, object]:
        left[0] -= 1
        if left[0] < 0:
            raise ConnectionAbortedError
        return answer(body)

    engine.answer = going
    with pytest.raises(CapreseError, match="no answer from"):
        make()
    kept = sorted(path.name for path in tmp_path.glob("*.parquet"))
    assert 0 < len(kept) < 5
    engine.wait()  # for requests that were under way when it went: they are not the next run's
    engine.answer, before = answer, len(engine.asked)
    made = make()
    assert len([b for b in engine.asked[before:] if b["temperature"]]) == 30 - 6 * len(kept)
    for path in tmp_path.glob("*.parquet"):
        path.unlink()
    assert list(make()) == list(made)


@pytest.mark.parametrize("url", ["http://192.168.1.300:8000/v1", "http://[v1.x]:1/v1"])
def test_an_address_that_is_none_is_one_line(url):
    config = Samples(teacher=url, max_new_tokens=4)
    with (
        pytest.raises(CapreseError, match="see the address|no address"),
        teacher_of(config, tiny_llama(), byte_tokenizer()) as teacher,
    ):
        list(teacher.complete([Asked([[2, 3]], 0, [])], config))


def test_where_all_is_there_nobody_is_asked(engine, small_recipe, monkeypatch):
    model, tokenizer = tiny_llama(), byte_tokenizer()
    recipe = small_recipe.model_copy(update={"samples": {"teacher": engine.url}})
    report = caprese.recover(model, tokenizer, recipe)
    out = Path(recipe.output)
    engine.close()
    monkeypatch.setitem(sys.modules, "openai", None)  # nor is the client wanted
    (out / "report.json").unlink()
    again = caprese.recover(model, tokenizer, recipe)
    assert again["quality"] == report["quality"]
    for name in ("report.json", "recipe.yaml", "README.md", "report.html"):  # its address is nobody's business
        assert "127.0.0.1" not in (out / name).read_text()
    assert report["recipe"]["samples"]["teacher"] == "endpoint"
    with pytest.raises(CapreseError, match="holds the result of another recipe|holds samples made with"):
        caprese.recover(model, tokenizer, small_recipe)  # samples of an engine are others


def test_prompts_of_self_come_from_the_endpoint_too(engine, small_recipe):
    samples = {"teacher": engine.url, "prompts": "self", "self_tokens": 12, "train": 8, "validation": 2, "test": 2}
    report = caprese.recover(tiny_llama(), byte_tokenizer(), small_recipe.model_copy(update={"samples": samples}))
    assert report["samples"]["train"]["samples"] == 8
    assert len(samples_of(engine)) >= 24


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_and_called_again_it_gives_the_unbroken_runs_samples(tmp_path):
    """20,000 of reasoner-tiny, 8 requests at once; the server stays, the run is killed five times."""
    count, kills = 20_000, 5
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    serve = [sys.executable, str(here / "engine.py"), "reasoner-tiny", "0"]
    server = subprocess.Popen(serve, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(
            f"model: reasoner-tiny\nmethod: griffin:0.5\nrank: 4\nsamples: {{prompts: 'chains:distil', train: {count}, "
            f"validation: 4, test: 4, elsewhere: 0, max_new_tokens: 4, shard_size: {count // 20}, "
            f"teacher: '{url}', teacher_concurrency: 8}}\n"
            "layerwise: {how: none}\nend_to_end: {epochs: 0}\nevaluation: {latency_tokens: 0, generate: false}\n"
        )
        command = [sys.executable, "-m", "caprese", "recover", "--recipe", str(recipe), "--json", "--output"]
        done, unbroken = tmp_path / "killed", tmp_path / "unbroken"
        subprocess.run([*command, str(unbroken)], check=True, env=environment, capture_output=True)
        shards = done / "samples"
        for number in range(kills):
            run = subprocess.Popen([*command, str(done)], env=environment, stdout=-3, stderr=-3)
            enough = 20 * (number + 1) // (kills + 2)
            while len(list(shards.glob("train-*.parquet"))) < enough:
                assert run.poll() is None
                time.sleep(0.02)
            run.send_signal(signal.SIGKILL)
            run.wait()
        subprocess.run([*command, str(done)], check=True, env=environment, capture_output=True)
    finally:
        server.kill()
    found = [[row for p in sorted((d / "samples").glob("train-*")) for row in read_shard(p)] for d in (done, unbroken)]
    assert found[0] == found[1] and len(found[0]) == count
    assert len({tuple(row.prompt_ids) for row in found[0]}) == count
    reports = [json.loads((d / "report.json").read_text()) for d in (done, unbroken)]
    assert reports[0]["quality"] == reports[1]["quality"]
    assert all(a != b for a, b in pairwise(row.prompt for row in found[0]))


def test_what_is_loaded_is_exact_inside_autocast():
    """As a teacher of the caller's own may prove itself where samples are drawn in quick products."""
    model, tokenizer = tiny_llama(), byte_tokenizer()
    prompt, ids = list(range(5, 15)), [20, 21, 22, 23]
    with torch.no_grad():
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
    ids = [int(logits[0].argmax())]
    told = Probe(prompt, ids, str(tokenizer.decode(ids)), [float(logits[0, ids[0]])])
    with torch.autocast("cpu", torch.bfloat16):
        assert "0.0000 nats apart" in prove(model, tokenizer, [told], "it")
