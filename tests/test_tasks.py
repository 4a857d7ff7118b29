"""lm-eval on an applied model: contexts are prompts, what is scored or generated is completion."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, recovered, tiny_llama
from tokenizers.processors import TemplateProcessing
from typer.testing import CliRunner

import caprese
from caprese.cli import app
from caprese.data_gen import load_prompts
from caprese.evaluation import VARIANTS, variant
from caprese.studies.tasks import Tasks, language_model, run_tasks

runner = CliRunner()
GENERATE = """\
task: chains
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}\\n"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["<end>"], max_gen_toks: 210, do_sample: false}}
filter_list:
  - name: answer
    filter:
      - {{function: regex, regex_pattern: "=(\\\\d+)"}}
      - {{function: take_first}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
CHOOSE = """\
task: choose
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}\\n"
doc_to_choice: ["{{{{answer}}}}", "0"]
doc_to_target: 0
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


def write_tasks(place: Path) -> None:
    """chains.yaml, which generates, and choose.yaml, which scores, over twelve problems."""
    rows = load_prompts("chains:test", 12, 1, "prompt", set())
    data = place / "chains.jsonl"
    data.write_text("\n".join(json.dumps({"question": r.text, "answer": r.answer}) for r in rows))
    for name, text in (("chains", GENERATE), ("choose", CHOOSE)):
        (place / f"{name}.yaml").write_text(text.format(data=data))


@pytest.fixture
def tasks(tmp_path):
    write_tasks(tmp_path)
    return tmp_path


def stepwise(model, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """log p(continuation | context) token by token through the cache, as generation would."""
    total, greedy = 0.0, True
    out = model(input_ids=torch.tensor([context]), use_cache=True)
    for token in continuation:
        scores = out.logits[0, -1].log_softmax(-1)
        total += float(scores[token])
        greedy &= int(scores.argmax()) == token
        out = model(input_ids=torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
    return total, greedy


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("method", [caprese.Griffin(sparsity=0.7), caprese.Cats(sparsity=0.7)], ids=lambda m: m.name)
def test_a_scored_answer_is_what_generation_would_give_it(method, name):
    model = caprese.fuse(recovered(caprese.apply(tiny_llama(), method), scale=0.3))
    lm = language_model(model, byte_tokenizer(), 3)
    pairs = [("12+30=", "42"), ("a", "bcdef"), ("The moon is", " x"), ("7", "7"), ("", "whole")]
    from lm_eval.api.instance import Instance

    requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    with variant(model, name):
        scored = lm.loglikelihood(requests)
        for (context, continuation), (value, greedy) in zip(pairs, scored, strict=True):
            tokens = byte_tokenizer()(context).input_ids or [lm.prefix_token_id]
            expected, is_greedy = stepwise(model, tokens, byte_tokenizer()(continuation).input_ids)
            assert abs(value - expected) < 1e-3 and greedy == is_greedy


def test_a_context_does_not_end_with_end_of_text():
    tokenizer = byte_tokenizer()
    model = caprese.apply(tiny_llama(), caprese.Griffin(sparsity=0.5))
    lm = language_model(model, tokenizer, 2)
    pair = lm._encode_pair("12+30=", "42")
    ids, mask = lm.tok_batch_encode(["12+30=", "7"])
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<pad> $A <end>", special_tokens=[("<pad>", 0), ("<end>", 1)]
    )
    lm = language_model(model, tokenizer, 2)
    assert lm._encode_pair("12+30=", "42") == ([0, *pair[0]], pair[1])
    after, over = lm.tok_batch_encode(["12+30=", "7"])
    assert after[0].tolist() == [0, *ids[0].tolist()] and over[0].all()
    assert after[1, -2:].tolist() == [0, int(ids[1, -1])] and over[1].sum() == mask[1].sum() + 1


def test_yaml_tasks_on_generated_data_from_the_command_line(tasks, tmp_path):
    base, _ = caprese.load_base("reasoner-tiny")
    caprese.save(recovered(caprese.apply(base, caprese.Griffin(sparsity=0.7)), scale=0.0), tmp_path / "adapter")
    files = ",".join(str(tasks / f"{name}.yaml") for name in ("chains", "choose"))
    args = ["eval", "-m", "reasoner-tiny", "-a", str(tmp_path / "adapter"), "--tasks", files]
    args += ["--output", str(tmp_path / "out"), "--batch-size", "12", "--json"]
    result = json.loads(runner.invoke(app, args, catch_exceptions=False).stdout)
    match = result["tasks"]["chains"]["exact_match,answer"]
    assert match["dense"] >= 0.9 and match["efficient"] <= 0.5  # the model's own limit of 200 tokens would cut none
    assert match["recovered"] == match["efficient"]  # an adapter of zeros
    assert result["tasks"]["choose"]["acc"].keys() == set(VARIANTS) and "chains" in result["stderr"]
    for name in VARIANTS:
        own = json.loads((tmp_path / "out" / result["files"][name]).read_text())
        assert own["results"]["chains"]["exact_match,answer"] == match[name]
        assert {"configs", "versions", "n-shot", "config"} <= own.keys()
        assert own["n-samples"]["chains"]["effective"] == 12
    table = runner.invoke(app, args[:-1])
    assert "chains" in table.stdout and "recovered" in table.stdout


def test_a_rerun_goes_on_with_the_contender_that_is_missing(tasks, tmp_path):
    base, tokenizer = caprese.load_base("reasoner-tiny")
    model = recovered(caprese.apply(base, caprese.Griffin()), scale=0.0)
    choose = [str(tasks / "choose.yaml")]

    def asked(*contenders: str) -> Tasks:
        return Tasks(choose, limit=2, batch_size=2, contenders=contenders)

    run_tasks(model, tokenizer, asked("dense"), tmp_path / "out", identity="a")
    first = sorted((tmp_path / "out").rglob("results_*.json"))
    result = run_tasks(model, tokenizer, asked("dense", "efficient"), tmp_path / "out", identity="a")
    assert sorted((tmp_path / "out" / "dense").rglob("results_*.json")) == first
    assert result["tasks"]["choose"]["acc"].keys() == {"dense", "efficient"}
    (tasks / "chains.jsonl").open("a").write("\n" + (tasks / "chains.jsonl").read_text().splitlines()[0])
    with pytest.raises(caprese.CapreseError, match="of other settings or data.*`overwrite=True`"):
        run_tasks(model, tokenizer, asked("dense"), tmp_path / "out", identity="a")
    run_tasks(model, tokenizer, asked("dense"), tmp_path / "out", identity="a", overwrite=True)
    assert len(sorted((tmp_path / "out" / "dense").rglob("results_*.json"))) == 2


@pytest.mark.slow
def test_what_cannot_be_run_is_one_line(tasks, tmp_path, monkeypatch):
    base, tokenizer = caprese.load_base("reasoner-tiny")
    model = recovered(caprese.apply(base, caprese.Griffin()))
    with pytest.raises(caprese.CapreseError, match="knows no task no_such_task"):
        run_tasks(model, tokenizer, Tasks(["no_such_task"]), tmp_path / "out", identity="")
    found = run_tasks(
        model,
        tokenizer,
        Tasks(["choose"], include=str(tasks), limit=1, contenders=["dense"]),
        tmp_path / "named",
        identity="",
    )
    assert found["tasks"]["choose"]["acc"].keys() == {"dense"}
    (tasks / "twin.yaml").write_text((tasks / "choose.yaml").read_text())
    with pytest.raises(caprese.CapreseError, match="are both named 'choose'"):
        for name in ("choose", "twin"):
            run_tasks(model, tokenizer, Tasks([str(tasks / f"{name}.yaml")], limit=1), tmp_path / "twins", identity="")
    (tasks / "twin.yaml").unlink()
    (tmp_path / "bad.yaml").write_text("metric: [")
    with pytest.raises(caprese.CapreseError, match=r"bad\.yaml is no lm-eval task"):
        run_tasks(model, tokenizer, Tasks([str(tmp_path / "bad.yaml")]), tmp_path / "out", identity="")
    done = runner.invoke(app, ["eval", "-m", "x", "-a", "y", "--tasks", "gsm8k", "--prompts", "gym:gsm_symbolic"])
    assert done.exit_code == 1 and "--tasks brings its own prompts" in done.output
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(caprese.CapreseError, match=r"pip install 'caprese\[eval\]'"):
        run_tasks(model, tokenizer, Tasks(["gsm8k"]), tmp_path / "out", identity="")
