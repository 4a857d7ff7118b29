"""The command line, on real files."""

from __future__ import annotations

import importlib
import json
import re
import shutil
from pathlib import Path
from typing import Annotated

import pytest
import torch
import typer
import yaml
from typer.testing import CliRunner

import caprese
from caprese import progress
from caprese.adapters import attach_adapter
from caprese.cli import app
from caprese.commands.recover import recover as recover_verb
from caprese.commands.verb import in_flags
from caprese.data_gen import read_shard
from caprese.evaluation import VARIANTS
from caprese.files import read_sealed, sha256, write_sealed
from caprese.models import ALIASES
from caprese.models.loading import YARDSTICKS, pick_device
from caprese.recipes import Recipe, names, resolve_recipe

runner = CliRunner()


def call(*args: str) -> str:
    result = runner.invoke(app, list(args), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def refusal(*args: str) -> str:
    result = runner.invoke(app, list(args))
    assert result.exit_code == 1, result.output
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def adapter(tiny_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "out"
    sizes = {"train": 12, "validation": 4, "test": 4, "max_new_tokens": 8, "prompts": "gym:simple_equations"}
    model, tokenizer = caprese.load_base(str(tiny_dir))
    caprese.recover(
        model,
        tokenizer,
        Recipe(
            model=str(tiny_dir),
            rank=4,
            output=str(out),
            samples=sizes,
            end_to_end={"epochs": 1},
            evaluation={"latency_tokens": 6},
        ),
    )
    return out


def test_help_names_the_extra():
    """Square brackets are markup to rich unless they are escaped."""
    shown = runner.invoke(app, ["eval", "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).stdout
    assert "caprese[eval]" in shown


def test_help_groups_its_flags():
    shown = runner.invoke(app, ["recover", "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).stdout
    panels = re.split(r"─ (\w+) ─", shown)
    found = dict(zip(panels[1::2], panels[2::2], strict=True))
    flags = {"Model": "--dtype", "Method": "--keep-attention", "Samples": "--column", "Training": "--rank"}
    for panel, flag in {**flags, "Output": "--overwrite", "Options": "--json"}.items():
        assert flag in found[panel] and shown.count(f"{flag} ") >= 1, panel


def test_version():
    assert call("--version").strip() == f"caprese {caprese.__version__}"


def test_recipes(tmp_path):
    assert {"smollm2-135m", "llama-3.1-8b", "gemma-2-9b"} <= set(json.loads(call("recipes", "ls", "--json")))
    shown = yaml.safe_load(call("recipes", "show", "llama-3.1-8b"))
    assert shown["rank"] == 256 and shown["samples"]["train"] == 20000
    copy = tmp_path / "mine.yaml"
    call("recipes", "cp", "smollm2-135m", str(copy))
    assert "valid" in call("recipes", "validate", str(copy))
    assert resolve_recipe(str(copy)) == resolve_recipe("smollm2-135m")


@pytest.mark.parametrize("name", names())
def test_shipped_recipes_are_valid_and_named_for_their_model(name):
    recipe = resolve_recipe(name)
    assert recipe.model == name.removesuffix("-quick").removesuffix("-mamba")
    assert recipe.model in (*ALIASES, *YARDSTICKS)
    if name in ALIASES and name != "smollm2-135m":
        assert recipe.rank == 256 and recipe.samples.train == 20_000


def test_flags_override_the_recipe(tiny_dir):
    plan = json.loads(
        call(
            "recover",
            "--recipe",
            "smollm2-135m",
            "--model",
            str(tiny_dir),
            "--method",
            "cats",
            "--sparsity",
            "0.7",
            "--layers",
            "0-1",
            "--rank",
            "8",
            "--dry-run",
            "--json",
        )
    )
    assert plan["method"] == "cats:0.7 on 2 of 3 layers"
    assert plan["adapter_parameters"] == 2 * 2 * 32 * 8
    assert plan["active_parameters_dense"] < plan["base_parameters"]  # untied: the input embedding is a look-up
    assert plan["estimated_total_seconds"] > 0


@pytest.mark.parametrize(
    ("flags", "prefill", "objective"),
    [
        ([], "dense", "kl"),
        (["--for", "export", "--method", "static:0.3"], "efficient", "kl"),
        (["--for", "lossless"], "dense", "tv"),
        (["--for", "lossless", "--objective", "kl"], "dense", "kl"),
    ],
)
def test_what_an_adapter_is_for_says_how_it_is_made(tiny_dir, monkeypatch, flags, prefill, objective):
    made = []
    monkeypatch.setattr("caprese.plan.plan", lambda config, recipe: made.append(recipe) or {})
    call("recover", "--model", str(tiny_dir), *flags, "--dry-run", "--json")
    assert (made[0].prefill, made[0].end_to_end.objective) == (prefill, objective)


def test_dry_run_counts_what_the_run_counts(tiny_dir, adapter):
    plan = json.loads(call("recover", "--model", str(tiny_dir), "--rank", "4", "--dry-run", "--json"))
    report = json.loads((adapter / "report.json").read_text())
    assert plan["adapter_parameters"] == report["parameters"]["adapter"]
    assert plan["active_parameters_recovered"] == report["parameters"]["active_recovered"]
    assert plan["base_parameters"] == report["parameters"]["base"]


def test_a_plan_takes_its_hours_from_a_run_like_it(tiny_dir, adapter):
    ask = ("recover", "--recipe", str(adapter / "recipe.yaml"), "--model", str(tiny_dir), "--dry-run", "--json")
    ask += ("--like", str(adapter))
    same, more = json.loads(call(*ask)), json.loads(call(*ask, "--samples", "2400", "--gpus", "4"))
    seconds = {stage["name"]: stage["seconds"] for stage in json.loads((adapter / "report.json").read_text())["stages"]}
    planned = same["estimated_seconds"]
    assert planned == pytest.approx({name: seconds[name] for name in planned}, rel=0.01, abs=0.1)
    assert len(planned) >= 4
    times = {stage: more["flops"][stage] / same["flops"][stage] for stage in same["flops"]}
    assert times["end_to_end"] > 50 and more["gpu_hours"].pop("kind") == "cpu"
    for stage, hours in more["gpu_hours"].items():
        assert hours * 4 * 3600 == pytest.approx(times[stage] * seconds[stage], rel=0.03)


def test_only_a_run_is_like_a_plan(tiny_dir, adapter, tmp_path):
    ask = ("recover", "--model", str(tiny_dir), "--rank", "4", "--like")
    assert "are for a plan" in refusal(*ask, str(adapter))
    assert "not a (finished) caprese adapter" in refusal(*ask, str(tmp_path), "--dry-run")
    report = read_sealed(adapter / "report.json", "")
    odd = tmp_path / "odd"
    shutil.copytree(adapter, odd)
    stage = report["stages"][0]
    changes = ({"recipe": {"unknown": 1}}, {"parameters": {}}, {"stages": [{"name": "samples"}]})
    for change in (*changes, *({"stages": [{**stage, "seconds": seconds}]} for seconds in (-5, "long", [1], 10**400))):
        write_sealed(odd / "report.json", {**report, **change})
        assert "give a run of this version" in refusal(*ask, str(odd), "--dry-run"), change
    alone = tmp_path / "alone"
    shutil.copytree(adapter, alone)
    for name in ("report.json", "recipe.yaml"):
        (alone / name).unlink()
    assert "without the report.json" in refusal(*ask, str(alone), "--dry-run")


@pytest.mark.parametrize(("dtype", "size"), [("auto", 4), ("float32", 4), ("bfloat16", 2), ("float16", 2)])
def test_dry_run_reckons_in_the_type_of_the_run(tiny_dir, monkeypatch, dtype, size):
    module, asked = importlib.import_module("caprese.plan.job"), []
    monkeypatch.setattr(module, "measure_rate", lambda device, kind: asked.append(kind) or 1e9)
    plan = json.loads(
        call(
            "recover",
            "--model",
            str(tiny_dir),
            "--rank",
            "4",
            "--device",
            "cpu",
            "--dtype",
            dtype,
            "--dry-run",
            "--json",
        )
    )
    assert plan["model_bytes"] == size * plan["base_parameters"] and asked[0].itemsize == size


@pytest.mark.parametrize(
    ("asked", "found"), [("auto", "meta:1"), ("meta", "meta:1"), ("meta:0", "meta:0"), ("cpu", "cpu")]
)
def test_each_process_has_its_own_accelerator(monkeypatch, asked, found):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("meta"))
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pick_device(asked) == found


def test_generate(tiny_dir, adapter):
    answer = json.loads(
        call(
            "generate",
            "--model",
            str(tiny_dir),
            "--adapter",
            str(adapter),
            "--prompt",
            "1+1",
            "--max-new-tokens",
            "6",
            "--json",
        )
    )
    assert 1 <= answer["new_tokens"] <= 6 and answer["first_token_ms"] > 0
    dense = call("generate", "--model", str(tiny_dir), "--prompt", "1+1", "--max-new-tokens", "6", "--json")
    assert set(json.loads(dense)) == {"text", "new_tokens", "first_token_ms", "ttnt_ms"}
    streamed = call(
        "generate", "--model", str(tiny_dir), "--adapter", str(adapter), "--prompt", "1+1", "--max-new-tokens", "6"
    )
    assert streamed.rstrip("\n") == progress.clean(answer["text"]).rstrip("\n")


def test_eval(tiny_dir, adapter, monkeypatch):
    asked = ["eval", "--model", str(tiny_dir), "--adapter", str(adapter), "--samples", "3", "--max-new-tokens", "8"]
    asked += ["--prompts", "gym:simple_equations", "--latency-tokens", "0"]
    figures = json.loads(call(*asked, "--json"))
    quality = figures["quality"]
    assert quality["dense"]["kl"] == 0 < quality["efficient"]["kl"] and figures["method"] == "griffin"
    monkeypatch.setenv("COLUMNS", "120")
    lines = call(*asked).splitlines()
    for name in VARIANTS:
        cells = next(line.split() for line in lines if line.split()[:1] == [name])
        shown = [f"{quality[name]['kl']:.4f}", f"{quality[name]['top1_agreement']:.1%}"]
        assert cells[1:4] == [*shown, f"{quality[name]['perplexity']:.2f}"] and cells[-1] == "–"
    share = f"{figures['recovered_fraction']['kl']:.0%} in KL divergence"
    assert lines[-1].startswith("Recovered: ") and share in lines[-1]


SHORT = ("--samples", "3", "--latency-tokens", "0", "--json")


def test_eval_has_no_nan_in_its_json(tiny_dir, adapter, monkeypatch):
    module = importlib.import_module("caprese.evaluation.fidelity")
    monkeypatch.setattr(module, "kl_divergence", lambda student, teacher: torch.full((len(student),), torch.nan))
    text = call("eval", "--model", str(tiny_dir), "--adapter", str(adapter), *SHORT)
    assert "NaN" not in text and "Infinity" not in text
    figures = json.loads(text)
    assert [figures["quality"][name]["kl"] for name in VARIANTS] == [None] * 3
    assert figures["recovered_fraction"]["kl"] is None


def test_eval_samples_as_the_adapter_was_made_to(tiny_dir, adapter, tmp_path):
    copy = shutil.copytree(adapter, tmp_path / "copy")
    recipe = yaml.safe_load((copy / "recipe.yaml").read_text())
    recipe["samples"].update(instruction="Say it.", chat_template=False, temperature=0.3, top_p=0.5)
    (copy / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    report = read_sealed(copy / "report.json", "")
    files = {**report["files"], "recipe.yaml": sha256(copy / "recipe.yaml")}
    write_sealed(copy / "report.json", {**report, "files": files})
    asked = ("eval", "--model", str(tiny_dir), "--adapter", str(copy), *SHORT)
    as_made = json.loads(call(*asked))["samples"]
    assert as_made == {k: v for k, v in recipe["samples"].items() if k not in ("train", "validation")} | {"test": 3}
    assert json.loads(call(*asked, "--max-new-tokens", "5"))["samples"] == as_made | {"max_new_tokens": 5}
    (copy / "recipe.yaml").unlink()
    assert json.loads(call(*asked))["samples"]["instruction"] == "Please reason step by step."


def test_eval_does_not_ask_what_the_adapter_was_trained_on(tiny_dir, adapter, tmp_path, monkeypatch):
    samples = adapter / "samples"
    known = [s.prompt for split in ("train", "validation") for s in read_shard(samples / f"{split}-00000.parquet")]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in [*known, "1 + 1 = ?", "2 + 2 = ?"]))
    asked = []
    measuring = importlib.import_module("caprese.evaluation.evaluate")
    make = measuring.complete_in_shards
    monkeypatch.setattr(
        measuring,
        "complete_in_shards",
        lambda *a: (asked.extend(p.text for p in a[1] if p.source != "elsewhere"), make(*a))[1],
    )
    call("eval", "--model", str(tiny_dir), "--adapter", str(adapter), "--prompts", str(file), *SHORT)
    assert set(asked) == {"1 + 1 = ?", "2 + 2 = ?"}


def test_json_alone_on_stdout(tiny_dir, adapter):
    report = read_sealed(adapter / "report.json", "")
    again = call(
        "recover",
        "--model",
        str(tiny_dir),
        "--recipe",
        str(adapter / "recipe.yaml"),
        "--output",
        str(adapter),
        "--json",
    )
    assert json.loads(again) == report


# What a file of another's may hold: a tag that closes nothing, a colour, a title for the window, a line written over,
# one written backwards.
FOREIGN = "[/x] \x1b[31m \x1b]0;owned\x07 \x9b2J \rover \u202edrow"
SHOWN = r"[/x] \x1b[31m \x1b]0;owned\x07 \x9b2J \rover \u202edrow"
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def shown(*args: str, code: int = 0) -> str:
    """Both streams of a command, in one line, checked to hold nothing that a terminal would obey."""
    progress.quiet = False
    result = runner.invoke(app, list(args), env={"COLUMNS": "300"}, catch_exceptions=False)
    progress.quiet = True
    assert result.exit_code == code, result.output
    assert not OBEYED.search(result.output), result.output
    return result.output


def test_what_a_terminal_obeys_is_written_out():
    assert progress.clean(FOREIGN) == SHOWN
    assert progress.clean("half an emoji \ud83d") == r"half an emoji \ud83d"
    plain = "Zürich, 東京\n\t👩‍🔬 שלום [bold]:smile:"
    assert progress.clean(plain) == plain


@pytest.fixture
def foreign(adapter, tmp_path):
    """An adapter whose directory and sidecar hold what a terminal would obey."""
    place = shutil.copytree(adapter, tmp_path / "x[" / "foo] \x1b[31m\x1b]0;t\x07\u202e")
    sidecar = json.loads((place / "caprese_config.json").read_text())
    sidecar["base"] |= {"id": FOREIGN}
    sidecar["caprese_version"] = "0 [/x] \x1b[2J"
    (place / "caprese_config.json").write_text(json.dumps(sidecar))
    for name in ("report.json", "recipe.yaml"):
        (place / name).unlink()
    return place


def test_foreign_text_in_an_adapter(tiny_dir, foreign, tmp_path):
    assert SHOWN in (text := shown("info", str(foreign))) and r"0 [/x] \x1b[2J" in text and r"foo] \x1b[31m" in text
    assert json.loads(shown("info", str(foreign), "--json"))["needs"][0].endswith(FOREIGN)
    assert r"foo] \x1b[31m" in shown("info", str(foreign / "[/y]"), code=1)
    assert "no[x]" in shown("push", str(foreign), "no[x] \x1b[1m", code=1)
    assert r"would push" in shown("push", str(foreign), "user/name", "--dry-run")
    model = ("--model", str(tiny_dir))
    base, _ = caprese.load_base(str(tiny_dir))
    caprese.save(attach_adapter(caprese.apply(base, caprese.Nothing()), 2), foreign / "static")
    args = ("export", str(foreign / "static"), *model, "--to", str(foreign))
    assert r"foo] \x1b[31m" in shown(*args, code=1) and r"foo] \x1b[31m" in shown(*args, "--dry-run", code=1)
    assert "would write" in shown(*args[:-1], str(foreign / "stock"), "--dry-run")
    scale = (
        "scale",
        *model,
        "--adapter",
        str(foreign),
        "--samples",
        "2",
        "--problems",
        "2",
        "--prompts",
        "chains:test",
    )
    assert "first prompt" in shown(*scale, "--dry-run")
    assert r"\x1b[31m" in shown(*scale, "--max-new-tokens", "4", "--output", str(foreign / "[/s]"))


def test_foreign_text_in_a_recipe_and_in_prompts(tiny_dir, tmp_path):
    recipe = tmp_path / "mine[" / "x].yaml"
    recipe.parent.mkdir()
    recipe.write_text(yaml.safe_dump({"output": str(tmp_path / "out") + FOREIGN, "samples": {"prompts": "[/p]"}}))
    text = shown("recipes", "show", str(recipe))
    assert yaml.safe_load(text)["output"].endswith(FOREIGN)  # YAML has escapes of its own
    assert "mine[/x].yaml: valid" in shown("recipes", "validate", str(recipe))
    plan = ("recover", "--recipe", str(recipe), "--model", str(tiny_dir), "--rank", "2", "--dry-run")
    assert r"out[/x] \x1b[31m" in shown(*plan)
    recipe.write_text(yaml.safe_dump({"[/key]\x1b[31m": 1}))
    assert r"[/key]\x1b[31m" in shown("recipes", "validate", str(recipe), code=1)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"[/column]\x1b[31m": "1 + 1"}) + "\n")
    asked = (
        "recover",
        "--model",
        str(tiny_dir),
        "--rank",
        "2",
        "--prompts",
        str(rows),
        "--output",
        str(tmp_path / "o"),
    )
    assert r"[/column]\x1b[31m" in shown(*asked, code=1)


def test_what_a_model_writes_is_streamed_as_text(tiny_dir, monkeypatch):
    def write(*args, emit, **how):
        for piece in ("a\n\tb ", "\x1b[31", "m[/x]"):
            emit(piece)
        return {"text": "", "new_tokens": 3, "first_token_ms": 1.0, "ttnt_ms": None}

    monkeypatch.setattr("caprese.inference.stream", write)
    assert shown("generate", "--model", str(tiny_dir), "--prompt", "1").startswith("a\n\tb \\x1b[31m[/x]\n")


def test_one_place_prints():
    """But for what answers in a process of its own."""
    for file in Path(caprese.__file__).parent.rglob("*.py"):
        if file.name not in ("progress.py", "llama_cpp_worker.py", "vllm_worker.py"):
            assert not re.search(r"(?<![\w.])print\(|Console\(|sys\.std(out|err)", file.read_text()), file


def test_arguments_are_flags_on_the_command_line():
    def command(
        output: Annotated[str, typer.Option("--output", "-o")],
        target_kl: Annotated[float, typer.Option()],
        compiled: Annotated[bool, typer.Option("--compile/--no-compile")],
        name: str = "",
    ) -> None: ...

    said = "choose another `output`, `target_kl` or `sparsity`; `compiled=False`, `target_kl=0.1`, `name`, `a b`"
    flags = "choose another --output, --target-kl or `sparsity`; --no-compile, --target-kl 0.1, `name`, `a b`"
    assert in_flags(said, command) == flags
    assert in_flags('leave out `prefill="efficient"`', recover_verb) == "leave out --for export"
