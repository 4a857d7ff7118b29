"""Whatever a user gets wrong: one line with cause and remedy, a non-zero exit code, and earlier output untouched."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from conftest import byte_tokenizer, tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BloomConfig,
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    MixtralConfig,
    PretrainedConfig,
    T5Config,
)
from typer.testing import CliRunner

import caprese
from caprese import progress
from caprese.adapters import attach_adapter
from caprese.adapters.sidecar import Sidecar
from caprese.cli import app
from caprese.data_gen import read_shard, write_shard
from caprese.data_gen.shards import shard_settings
from caprese.errors import CapreseError
from caprese.files import at_work

RECIPE = caprese.Recipe(
    rank=4,
    samples={
        "prompts": "gym:simple_equations",
        "train": 8,
        "validation": 4,
        "test": 4,
        "max_new_tokens": 8,
        "batch_size": 8,
        "shard_size": 8,
    },
    layerwise={"batch_size": 4},
    end_to_end={"epochs": 1, "batch_size": 4, "micro_batch": 4},
    evaluation={"latency_tokens": 0, "batch_size": 4, "generate": False},
)


def tiny_gemma2() -> Gemma2ForCausalLM:
    return Gemma2ForCausalLM(
        Gemma2Config(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            vocab_size=258,
            max_position_embeddings=1024,
        )
    )


@dataclass
class Desk:
    """What a case works on: a base, a finished result of `recover`, and room for more."""

    base: Path
    out: Path
    tmp: Path

    def recover(self, *flags: object) -> list[str]:
        recipe = self.tmp / "recipe.yaml"
        recipe.write_text(RECIPE.to_yaml())
        first = ["recover", "--recipe", recipe, "--model", self.base, "--output", self.out]
        return [str(word) for word in (*first, *flags)]

    def generate(self, *flags: object) -> list[str]:
        first = ["generate", "--model", self.base, "--prompt", "2 + 2 =", "--max-new-tokens", 4]
        return [str(word) for word in (*first, *flags)]

    def recovered(self, *flags: object) -> list[str]:
        return self.generate("--adapter", self.out, *flags)

    def prompts(self, content: str | bytes, *flags: object) -> list[str]:
        file = self.tmp / "prompts.jsonl"
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return self.recover("--overwrite", "--prompts", file, *flags)

    def recipe(self, text: str) -> list[str]:
        (self.tmp / "mine.yaml").write_text(text)
        return self.recover("--recipe", self.tmp / "mine.yaml")

    def model(self, config: PretrainedConfig, architecture: str) -> list[str]:
        config.architectures = [architecture]
        config.save_pretrained(self.tmp / "model")
        return self.recover("--model", self.tmp / "model")

    def other_base(self, change: Callable[[Path], None]) -> Path:
        copy = self.tmp / "base"
        shutil.copytree(self.base, copy)
        change(copy)
        return copy


def digests(directory: Path) -> dict[str, str]:
    """Every file byte for byte; the marks of a run that goes on are not output."""
    files = (p for p in sorted(directory.rglob("*")) if p.is_file() and ".state" not in p.parts)
    return {str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def finished(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "out"
    model, tokenizer = caprese.load_base(str(tiny_dir))
    caprese.recover(model, tokenizer, RECIPE.model_copy(update={"output": str(out)}))
    return out


@pytest.fixture
def desk(tiny_dir: Path, finished: Path, tmp_path: Path) -> Iterator[Desk]:
    shutil.copytree(finished, tmp_path / "out")
    yield Desk(tiny_dir, tmp_path / "out", tmp_path)
    progress.quiet = True


def told(code: int, stderr: str, *fragments: str) -> str:
    """The one line, checked."""
    lines = stderr.strip().splitlines()
    assert code == 1, stderr
    assert "Traceback" not in stderr
    assert [line.startswith("error: ") for line in lines].count(True) == 1, stderr
    assert lines[-1].startswith("error: "), stderr
    for fragment in fragments:
        assert fragment in lines[-1]
    return lines[-1]


def refused(desk: Desk, arguments: list[str], *fragments: str) -> None:
    before = digests(desk.out)
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, SystemExit), result.exception
    told(result.exit_code, result.stderr, *fragments)
    assert digests(desk.out) == before


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def poison(tensors: dict[str, torch.Tensor]) -> None:
    next(iter(tensors.values()))[0, 0] = float("nan")


# Each case prepares its harm and gives a command line; the fragments are cause and remedy.
Case = Callable[[Desk], list[str]]
CASES: dict[str, tuple[Case, tuple[str, ...]]] = {}


def case(*fragments: str) -> Callable[[Case], Case]:
    def add(function: Case) -> Case:
        assert function.__name__ not in CASES, function
        CASES[function.__name__] = (function, fragments)
        return function

    return add


def simple(name: str, make: Case, *fragments: str) -> None:
    assert name not in CASES, name
    CASES[name] = (make, fragments)


# models
simple("unknown_alias", lambda d: d.recover("--model", "lama"), "unknown model 'lama'", "llama-3.2-1b", "owner/name")
simple("no_model", lambda d: ["recover", "--output", str(d.out)], "give --model")
simple("no_such_directory", lambda d: d.recover("--model", d.tmp / "gone"), "unknown model", "existing directory")
simple("no_config", lambda d: d.recover("--model", d.tmp), "without config.json", "save_pretrained")
simple("encoder", lambda d: d.model(BertConfig(), "BertModel"), "not a causal LM", "decoder-only")
simple(
    "encoder_decoder", lambda d: d.model(T5Config(), "T5ForConditionalGeneration"), "encoder-decoder", "decoder-only"
)
simple("experts", lambda d: d.model(MixtralConfig(), "MixtralForCausalLM"), "mixture of experts", "dense FFNs")
simple("family", lambda d: d.model(BloomConfig(), "BloomForCausalLM"), "'bloom' is not supported", "supported: gemma")


def damaged_base(name: str, change: Callable[[Path], None], *fragments: str) -> None:
    for verb in ("recover", "generate"):
        simple(f"{name}_{verb}", lambda d, v=verb: getattr(d, v)("--model", d.other_base(change)), *fragments)


damaged_base("base_config_damaged", lambda b: truncate(b / "config.json"), "config.json", "damaged", "again")
damaged_base("base_truncated", lambda b: truncate(b / "model.safetensors"), "truncated or damaged", "download")
damaged_base(
    "base_weightless",
    lambda b: (b / "model.safetensors").unlink(),
    "no file named model.safetensors",
    "save_pretrained",
)
damaged_base("base_tokenizerless", lambda b: [p.unlink() for p in b.glob("token*")], "tokenizer", "save_pretrained")
simple(
    "base_nan",
    lambda d: d.recover("--model", d.other_base(lambda b: edit_weights(b / "model.safetensors", poison))),
    "NaN or infinity",
    "download the base model again",
)

simple(
    "base_nan_without_adapter",
    lambda d: d.generate("--model", d.other_base(lambda b: edit_weights(b / "model.safetensors", poison))),
    "NaN or infinity",
    "download the base model again",
)

# numbers and names in a recipe
for value in ("0", "1", "-1", "nan", "inf"):
    simple(f"sparsity_{value}", lambda d, v=value: d.recover("--sparsity", v), "sparsity: input should be", value)
for value, fragment in {
    "0": "--rank 0: use a number from 1",
    "33": "hidden size 32; choose 1 to 32",
    "x": "from 1, or auto",
}.items():
    simple(f"rank_{value}", lambda d, v=value: d.recover("--rank", v), fragment)
for value, fragment in {
    "3": "do not fit a model of 3 layers: numbers 0-2",
    "0,0": "each once",
    "2-1": "numbers like 0,1,4-7",
    "a,b": "use all, first-half, or numbers like",
}.items():
    simple(f"layers_{value}", lambda d, v=value: d.recover("--layers", v), fragment)
simple("unknown_method", lambda d: d.recover("--method", "magic"), "unknown method 'magic'", "griffin, cats")
simple("unknown_stage", lambda d: d.recover("--layerwise", "open"), "layerwise.how", "'closed'")
simple("no_samples", lambda d: d.recover("--samples", 0), "samples.train", "greater than or equal to 1")
simple("unknown_dtype", lambda d: d.recover("--dtype", "float7"), "unknown dtype 'float7'", "bfloat16")
simple("integer_dtype", lambda d: d.recover("--dtype", "int8"), "unknown dtype 'int8'", "bfloat16")
simple("unknown_device", lambda d: d.recover("--device", "toaster"), "device 'toaster'", "--device auto")
if not torch.cuda.is_available():
    simple("absent_device", lambda d: d.generate("--device", "cuda"), "device 'cuda'", "--device auto")
simple("recipe_missing", lambda d: d.recover("--recipe", "nope"), "no recipe 'nope'", "smollm2-135m", "nor a file")
simple("recipe_directory", lambda d: d.recover("--recipe", d.tmp), "is a directory", "YAML file")
simple("recipe_not_yaml", lambda d: d.recipe("rank: [1,\nmethod: }"), "not valid YAML at line 2", "recipes show")
simple("recipe_list", lambda d: d.recipe("- rank"), "not a mapping")
simple("recipe_key", lambda d: d.recipe("rnak: 4"), "unknown key 'rnak'", "recipes show")
simple("recipe_inner_key", lambda d: d.recipe("samples: {trian: 4}"), "unknown key 'samples.trian'")
simple("recipe_section", lambda d: d.recipe("samples: 4"), "samples: ", "given 4")
simple("recipes_show", lambda d: ["recipes", "show", "nope"], "no recipe 'nope'")
simple("recipes_validate", lambda d: ["recipes", "validate", "nope"], "no recipe 'nope'")
simple("recipes_cp", lambda d: ["recipes", "cp", "smollm2-135m", str(d.out / "report.json")], "exists", "another name")

simple("batches", lambda d: d.recipe("end_to_end: {batch_size: 6}"), "batch_size 6 is not a multiple of micro_batch 8")


@case("layerwise.how=sequential", "gemma2 normalises in between", "layerwise.how=closed")
def sequential_with_a_norm_after_the_ffn(d: Desk) -> list[str]:
    tiny_gemma2().save_pretrained(d.tmp / "base")
    byte_tokenizer().save_pretrained(d.tmp / "base")
    return d.recover("--model", d.tmp / "base", "--layerwise", "sequential", "--overwrite")


@case("layerwise.how=sequential", "gemma2 normalises in between", "layerwise.how=closed")
def sequential_planned(d: Desk) -> list[str]:
    return [*sequential_with_a_norm_after_the_ffn(d), "--dry-run"]


simple("planned_dtype", lambda d: d.recover("--dtype", "float7", "--dry-run"), "unknown dtype 'float7'", "bfloat16")
simple("planned_device", lambda d: d.recover("--device", "toaster", "--dry-run"), "device 'toaster'", "--device auto")

simple("layers_without_end", lambda d: d.recover("--layers", "1-88888888888"), "use all, first-half, or numbers like")
simple("rank_of_many_digits", lambda d: d.recover("--rank", "7" * 4400), "from 1, or auto")
simple("seed_too_large", lambda d: d.recover("--seed", 2**40), "seed: input should be less than")
simple("recipe_null", lambda d: d.recover("--recipe", "my\0recipe"), "is no path", "null")
simple("output_null", lambda d: d.recover("--output", "my\0result"), "is no path", "null")
simple("recipe_name_too_long", lambda d: d.recover("--recipe", "my" * 3000), "is no path", "too long", "give another")
for name, text in {
    "a_list": "method: [cats]",
    "a_number": "method: 7",
    "words": "methods: cats:0.6",
    "a_list_of_words": "methods: [static, cats]",
    "one_mapping": "methods: {name: cats}",
}.items():
    simple(f"methods_as_{name}", lambda d, t=text: d.recipe(t), "`methods` is a list", "a line such as")

# methods
simple("methods_refused", lambda d: d.recover("--method", "nf4+griffin"), "do not compose", "rows or columns")
simple("methods_setting", lambda d: d.recover("--method", "cats:speed=2"), "no setting 'speed'", "it has layers")
simple("methods_nothing", lambda d: d.recover("--method", "none+cats"), "takes nothing away", "leave it out")
simple("threshold_elsewhere", lambda d: d.recover("--threshold", "calibrated"), "no setting of griffin")
simple("threshold_unknown", lambda d: d.recover("--threshold", "guess"), "--threshold is no setting of griffin")
simple("sparsity_of_none", lambda d: d.recover("--method", "nf4", "--sparsity", 0.9), "no setting of nf4", "leave it")
simple("sparsity_said", lambda d: d.recover("--method", "griffin:0.5", "--sparsity", 0.9), "said there already")
simple("sparsity_twice", lambda d: d.recover("--method", "griffin:0.5:0.7"), "sparsity is said twice", "leave one out")
simple("auto_without_target", lambda d: d.recover("--sparsity", "auto"), "needs one of --target-kl and --target-active")
simple(
    "target_beside_a_number", lambda d: d.recover("--target-kl", 0.1, "--sparsity", 0.5), "goes with --sparsity auto"
)
simple("target_out_of_reach", lambda d: d.recover("--sparsity", "auto", "--target-active", 0.01, "--overwrite"),
       "out of reach")  # fmt: skip
simple("sparsity_list", lambda d: d.recover("--sparsity", "0.5,0.4"), "2 sparsities were given for 3 layers")
simple("sparsity_words", lambda d: d.recover("--sparsity", "half"), "--sparsity 'half'", "or auto")
simple("reselect_zero", lambda d: d.recover("--reselect-every", 0), "reselect_every: input should be greater than")
simple("reselect_dense", lambda d: d.generate("--reselect-every", 8), "goes with --adapter")
simple("adapter_without_name", lambda d: d.generate("--adapter", ""), "no adapter at ''")
simple("output_of_nobody", lambda d: [*d.recover(), "--output", "~nosuchuser/out"], "~nosuchuser", "is no path")
simple("adapter_half_a_character", lambda d: d.generate("--adapter", "a\ud83d"), "is no path")
simple(
    "samples_without_end", lambda d: d.recover("--overwrite", "--samples", 10**12), "less than or equal to 100000000"
)
simple(
    "rate_without_bounds",
    lambda d: d.recipe("end_to_end: {learning_rate: 1.0e+300}"),
    "learning_rate",
    "or equal to 100000",
)
simple("temperature_of_nothing", lambda d: d.recipe("samples: {temperature: 1.0e-300}"), "temperature", "0.0001")
simple("seed_of_70_bits", lambda d: d.recipe(f"seed: {2**70}"), "seed", "less than 4294967296")
simple("number_of_5000_digits", lambda d: d.recipe("seed: " + "9" * 5000), "cannot read recipe", "4300 digits")
simple("layers_of_truth", lambda d: d.recipe("method: griffin:0.5\nlayers: [true]"), "layers", "given [True]")
simple("name_of_5000_characters", lambda d: d.recipe("revision: " + "m" * 5000), "at most 4096 characters")
simple("nested_without_end", lambda d: d.recipe("method: " + "[" * 5000), "nested too deeply")
simple("merges_in_merges", lambda d: d.recipe("a0: &a0 {x: 1}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 12))
), "over 100,000 values")  # fmt: skip
simple("anchors_in_anchors", lambda d: d.recipe(
    "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)) + "method: *a11"
), "over 100,000 values")  # fmt: skip


def another_shape(name: str, text: str) -> None:
    """Files of an adapter and of a base that are JSON and nothing that they ought to be."""

    def adapter(file: str) -> Case:
        return lambda d: [str((d.out / file).write_text(text) and "info"), str(d.out)]

    for file in ("report.json", "adapter_config.json", "caprese_config.json"):
        simple(f"{file}_is_{name}", adapter(file), file, "damaged")
    base = lambda d: d.recover("--model", d.other_base(lambda b: (b / "config.json").write_text(text)))  # noqa: E731
    simple(f"base_config_is_{name}", base, "config.json", "damaged")


another_shape("a_list", "[]")
another_shape("a_number", "7")
another_shape("deep", '{"a":' * 30_000 + "1" + "}" * 30_000)


@case("altered", "recover again")
def figures_edited(d: Desk) -> list[str]:
    edit_json(d.out / "report.json", lambda report: report["quality"]["recovered"].update(kl=0.0))
    return ["push", str(d.out), "someone/else", "--dry-run"]


@case("recipe.yaml", "altered after the run")
def recipe_of_a_result_edited(d: Desk) -> list[str]:
    path = d.out / "recipe.yaml"
    path.write_text(path.read_text().replace("max_new_tokens: ", "max_new_tokens: 1"))
    return ["eval", "-m", str(d.base), "-a", str(d.out)]


@case("caprese_config.json", "damaged", "no name")
def method_without_a_name(d: Desk) -> list[str]:
    edit_json(d.out / "caprese_config.json", lambda c: c["methods"][0].update(name=["griffin"]))
    return ["info", str(d.out)]


simple("adapter_name_too_long", lambda d: ["info", "so/" + "long" * 2000], "is no path", "too long")
simple("reselect_negative", lambda d: d.recovered("--reselect-every", -3), "reselect_every -3", "from 1")

# prompts
ROW = '{"prompt": "hello"}\n'
simple("prompt_empty", lambda d: d.generate("--prompt", ""), "prompt is empty", "--prompt")
simple("prompt_blank", lambda d: d.generate("--prompt", " \n "), "prompt is empty", "--prompt")
simple("prompt_too_long", lambda d: d.generate("--prompt", "x" * 1200), "exceed the model's context of 1024", "shorten")
simple("file_missing", lambda d: d.recover("--overwrite", "--prompts", d.tmp / "no.jsonl"), "no prompt file at")
simple("file_empty", lambda d: d.prompts(""), "holds no prompts")
simple("file_not_json", lambda d: d.prompts(ROW + "hello\n"), "line 2: not JSON", "one object with a 'prompt' per line")
simple("file_not_object", lambda d: d.prompts('["hello"]\n'), "line 1: not an object")
simple("file_not_text", lambda d: d.prompts(b"\xff\xfe\x00"), "not UTF-8 text")
simple("file_blank_prompt", lambda d: d.prompts(ROW + '{"prompt": " "}\n'), "row 2: the prompt is empty", "remove")
simple("column_missing", lambda d: d.prompts(ROW, "--column", "question"), "column 'question'", "columns: prompt")
simple("column_number", lambda d: d.prompts('{"prompt": 4}\n'), "no text in column 'prompt'", "--column")
simple("too_few_prompts", lambda d: d.prompts(ROW), "1 distinct prompts", "lower samples.test")
simple("long_prompt", lambda d: d.prompts("".join(json.dumps({"prompt": f"{i}" * 1200}) + "\n" for i in range(10, 40))),
       "exceed the model's context of 1024", "lower max_new_tokens")  # fmt: skip
simple("task_unknown", lambda d: d.recover("--overwrite", "--prompts", "gym:simple_equation"),
       "no task 'simple_equation'", "did you mean", "simple_equations")  # fmt: skip
simple("eval_too_long", lambda d: ["eval", "-m", str(d.base), "-a", str(d.out), "--max-new-tokens", "1200"],
       "exceed the model's context of 1024")  # fmt: skip


@case("not a readable Parquet file", "write it again")
def file_not_parquet(d: Desk) -> list[str]:
    (d.tmp / "prompts.parquet").write_text("prompt\nhello\n")
    return d.recover("--overwrite", "--prompts", d.tmp / "prompts.parquet")


# adapters
WEIGHTS, CONFIG, SIDECAR = "adapter_model.safetensors", "adapter_config.json", "caprese_config.json"


def damaged_adapter(name: str, change: Callable[[Path], object], *fragments: str) -> None:
    def make(d: Desk) -> list[str]:
        change(d.out)
        return d.recovered()

    simple(f"adapter_{name}", make, *fragments)


def edit_signed(adapter: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """As somebody would who also brings the sidecar's digest along."""
    edit_json(adapter / SIDECAR, change)
    with contextlib.suppress(ValueError):
        digest = Sidecar.model_validate_json((adapter / SIDECAR).read_text()).make_digest()
        edit_json(adapter / SIDECAR, lambda c: c.update(digest=digest))


simple("adapter_missing", lambda d: d.generate("--adapter", d.tmp / "gone"), "no adapter at", "owner/name")
simple("adapter_empty", lambda d: d.generate("--adapter", d.base), f"holds no {SIDECAR}", "run caprese recover")
damaged_adapter("no_sidecar", lambda o: (o / SIDECAR).unlink(), f"holds no {SIDECAR}", "run caprese recover")
damaged_adapter("no_weights", lambda o: (o / WEIGHTS).unlink(), f"holds no {WEIGHTS}", "run caprese recover")
damaged_adapter("truncated", lambda o: truncate(o / WEIGHTS), "truncated or damaged", "make the adapter again")
damaged_adapter("altered", lambda o: flip(o / WEIGHTS), "was altered after it was saved", "fetch or make")
damaged_adapter("nan", lambda o: edit_weights(o / WEIGHTS, poison), "NaN or infinity", "make the adapter again")
damaged_adapter("sidecar_truncated", lambda o: truncate(o / SIDECAR), f"{SIDECAR} of", "is damaged", "again")
damaged_adapter("sidecar_binary", lambda o: (o / SIDECAR).write_bytes(b"\xff"), "is damaged", "again")
damaged_adapter(
    "unknown_method",
    lambda o: edit_signed(o, lambda c: c["methods"][0].update(name="magic")),
    "needs the method 'magic'",
    "upgrade caprese",
)
damaged_adapter(
    "bad_method",
    lambda o: edit_signed(o, lambda c: c["methods"][0].update(sparsity=7)),
    SIDECAR,
    "is damaged",
    "again",
)
damaged_adapter(
    "other_method",
    lambda o: edit_json(o / SIDECAR, lambda c: c["methods"][0].update(sparsity=0.4)),
    f"{SIDECAR} of",
    "was altered after it was saved",
)
damaged_adapter(
    "no_fingerprint",
    lambda o: edit_signed(o, lambda c: c["base"].update(fingerprint={})),
    f"{SIDECAR} of",
    "base.fingerprint: no digest of ffn, attention, rest",
)
damaged_adapter("config_truncated", lambda o: truncate(o / CONFIG), CONFIG, "damaged", "again")
damaged_adapter("config_empty", lambda o: (o / CONFIG).write_text("{}"), CONFIG, "again")
damaged_adapter("config_deep", lambda o: (o / CONFIG).write_text("[" * 50_000), CONFIG, "damaged", "again")
damaged_adapter("config_rank", lambda o: edit_json(o / CONFIG, lambda c: c.update(r=2)), CONFIG, "again")


def damaged_run(name: str, change: Callable[[Path], object]) -> None:
    def make(d: Desk) -> list[str]:
        change(d.out)
        return ["push", str(d.out), "me/mine", "--dry-run"]

    simple(f"push_{name}", make, "damaged or missing", "recover again")


damaged_run("altered_page", lambda o: flip(o / "report.html"))
damaged_run("lost_plot", lambda o: next((o / "plots").iterdir()).unlink())

CALIBRATION = "caprese_calibration.safetensors"


def calibrated_adapter(name: str, change: Callable[[Path], object], *fragments: str) -> None:
    """An adapter with a method that chose from samples, its choices damaged."""

    def make(d: Desk) -> list[str]:
        model = tiny_llama()
        rows = [caprese.Tokens(torch.arange(2, 22)[None], torch.tensor([5]))]
        methods = [caprese.Static(sparsity=0.5)]
        caprese.apply(model, methods, calibration=caprese.calibrate(model, methods, rows))
        caprese.save(attach_adapter(model, 2), d.tmp / "static")
        change(d.tmp / "static")
        return d.generate("--adapter", d.tmp / "static")

    simple(f"calibration_{name}", make, *fragments)


calibrated_adapter("missing", lambda o: (o / CALIBRATION).unlink(), f"holds no {CALIBRATION}")
calibrated_adapter("truncated", lambda o: truncate(o / CALIBRATION), CALIBRATION, "truncated or damaged", "again")
calibrated_adapter("altered", lambda o: flip(o / CALIBRATION), CALIBRATION, "was altered", "fetch or make")


@case("was made for", "other weights", "ffn", "load that base")
def base_of_another_seed(d: Desk) -> list[str]:
    tiny_llama(seed=1).save_pretrained(d.tmp / "base")
    byte_tokenizer().save_pretrained(d.tmp / "base")
    return d.recovered("--model", d.tmp / "base")


@case("was made for", "other weights (ffn)", "recover this one")
def base_fine_tuned(d: Desk) -> list[str]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.down_proj.weight"][3, 5] += 0.5

    return d.recovered("--model", d.other_base(lambda b: edit_weights(b / "model.safetensors", change)))


# output
@case("cannot write", "Not a directory", "choose another directory")
def output_under_file(d: Desk) -> list[str]:
    return d.recover("--output", d.out / "report.json" / "out")


@case("cannot write", "File exists", "choose another directory")
def output_is_file(d: Desk) -> list[str]:
    return d.recover("--output", d.out / "report.json")


simple("output_taken", lambda d: d.recover("--seed", 9), "holds the result of another recipe", "--overwrite")
simple("output_half", lambda d: half_done(d, "other"), "half way through another recipe", "--overwrite")


@case("samples made with another max_new_tokens", "--overwrite")
def samples_of_other_settings(d: Desk) -> list[str]:
    (d.out / "report.json").unlink()
    return d.recover("--max-new-tokens", 9)


@case("samples made with another version", "--overwrite")
def samples_of_another_version(d: Desk) -> list[str]:
    arguments = half_done(d, own_identity(d))
    path = d.out / "samples" / "test-00000.parquet"
    settings = shard_settings(path)
    del settings["version"]
    write_shard(path, read_shard(path), settings)
    return arguments


def half_done(d: Desk, identity: str) -> list[str]:
    """As if the run was stopped after the samples."""
    state = d.out / ".state"
    state.mkdir()
    (state / "identity.json").write_text(json.dumps({"identity": identity}))
    (d.out / "report.json").unlink()
    return d.recover()


def own_identity(d: Desk) -> str:
    return json.loads((d.out / "report.json").read_text())["identity"]


@case("truncated or damaged", "delete it and run again")
def checkpoint_damaged(d: Desk) -> list[str]:
    arguments = half_done(d, own_identity(d))
    (d.out / ".state" / "moments.safetensors").write_bytes(b"\0" * 64)
    return arguments


@case("stages.json", "damaged", "delete it and run again")
def stages_damaged(d: Desk) -> list[str]:
    arguments = half_done(d, own_identity(d))
    (d.out / ".state" / "stages.json").write_text("[")
    return arguments


@case("identity.json is damaged", "--overwrite")
def mark_damaged(d: Desk) -> list[str]:
    arguments = half_done(d, own_identity(d))
    (d.out / ".state" / "identity.json").write_text("{")
    return arguments


@case("is damaged", "delete it, and recover makes it anew")
def shard_truncated(d: Desk) -> list[str]:
    truncate(d.out / "samples" / "train-00000.parquet")
    return d.recover("--overwrite", "--epochs", 0)


@case("rows were altered", "delete it, and recover makes it anew")
def shard_altered(d: Desk) -> list[str]:
    path = d.out / "samples" / "validation-00000.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    rows[0]["input_ids"][-1] += 1
    pq.write_table(table.from_pylist(rows, schema=table.schema), path)
    return d.recover("--overwrite", "--epochs", 0)


@pytest.mark.parametrize("name", CASES)
def test_refused(name: str, desk: Desk):
    make, fragments = CASES[name]
    refused(desk, make(desk), *fragments)


@pytest.mark.slow
def test_overwrite_replaces_the_shards_of_other_settings(desk: Desk):
    shards = desk.out / "samples"
    before = digests(shards)
    for flags in (("--max-new-tokens", 9), ("--max-new-tokens", 9, "--samples", 12), ("--max-new-tokens", 9)):
        result = CliRunner().invoke(app, desk.recover("--overwrite", *flags))
        assert result.exit_code == 0, result.stderr
        now = {path.name: shard_settings(path) for path in sorted(shards.glob("*.parquet"))}
        assert {s["max_new_tokens"] for s in now.values()} == {9}
        assert sum(s["rows"] for name, s in now.items() if name.startswith("train")) == (12 if len(flags) > 2 else 8)
    after = digests(shards)
    assert after.keys() == before.keys() and not set(after.values()) & set(before.values())


def test_table_is_long():
    assert len(CASES) >= 25


def test_same_command_again_does_nothing(desk: Desk):
    before = digests(desk.out)
    result = CliRunner().invoke(app, desk.recover())
    assert result.exit_code == 0 and "nothing to do" in result.stderr
    assert digests(desk.out) == before


def test_json_keeps_stdout_clean(desk: Desk):
    result = CliRunner().invoke(app, desk.recover("--seed", 9, "--json"))
    assert result.exit_code == 1 and result.stdout == ""
    assert len(result.stderr.splitlines()) == 1


def test_disk_full_while_writing(desk: Desk, monkeypatch: pytest.MonkeyPatch):
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    refused(desk, desk.recover("--overwrite", "--epochs", "0"), "cannot write", "No space left", "free space")


def test_two_runs_in_one_directory(desk: Desk):
    """In whatever way the second one writes there."""
    says = "another run is at work in", f"process {os.getpid()} on", "wait for it"
    scale = ["scale", "--model", desk.base, "--adapter", desk.out, "--prompts", "gym:leg_counting"]
    scale += ["--samples", 1, "--problems", 1, "--output", desk.out]
    with at_work(desk.out):
        refused(desk, desk.recover("--overwrite"), *says)
        refused(desk, [str(word) for word in scale], *says)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 256 KB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(disk: Path, leave: int) -> None:
    free = shutil.disk_usage(disk).free
    (disk / "filler").write_bytes(b"x" * (free - leave))


def test_disk_full(desk: Desk, small_disk: Path):
    shutil.copytree(desk.out, small_disk / "out", ignore=shutil.ignore_patterns("*.html", "*.png", "assets"))
    fill(small_disk, 8192)
    there = Desk(desk.base, small_disk / "out", desk.tmp)
    refused(there, there.recover("--overwrite", "--epochs", "0"), "cannot write", "No space left", "free space")


def test_save_on_a_full_disk(small_disk: Path):
    model = attach_adapter(caprese.apply(tiny_llama(), caprese.Griffin()), 4)
    caprese.save(model, small_disk / "out")
    before = digests(small_disk / "out")
    fill(small_disk, 0)
    with pytest.raises(CapreseError, match="No space left.*free space"):
        caprese.save(model, small_disk / "out")
    assert digests(small_disk / "out") == before


# True processes, and a hub of our own on the loopback

HUB = {
    "nobody/nothing": (401, "RepoNotFound", "Invalid username or password."),
    "nobody/moved": (404, "RepoNotFound", "Repository not found"),
    "owner/gated": (401, "GatedRepo", "Access to model owner/gated is restricted. You must have access to it."),
    "owner/asked": (403, "GatedRepo", "Access to model owner/asked is restricted and you are not in the list."),
    "owner/bare": (404, "EntryNotFound", "Entry not found"),
    "owner/old": (404, "RevisionNotFound", "Invalid rev id: v9"),
}


class _Hub(BaseHTTPRequestHandler):
    """Answers as the hub does where it refuses."""

    def do_GET(self) -> None:
        repository = next((name for name in HUB if name in self.path), "nobody/nothing")
        status, code, message = HUB[repository]
        body = json.dumps({"error": message}).encode()
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


# one process for many commands: most of a command's time is imports
_DRIVER = """
import json, sys, time
time.sleep = lambda _: None  # the hub client waits longer and longer between its attempts
from huggingface_hub.utils import logging
logging.get_logger()  # its handler keeps the stderr it finds first
from typer.testing import CliRunner
from caprese.cli import app
results = [CliRunner().invoke(app, arguments) for arguments in json.load(sys.stdin)]
print(json.dumps([[r.exit_code, r.stderr, repr(r.exception)] for r in results]))
"""


def environment(endpoint: str, home: Path) -> dict[str, str]:
    drop = ("HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")
    kept = {k: v for k, v in os.environ.items() if k not in drop}
    root = str(Path(caprese.__file__).parents[1])
    return {**kept, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}


def on_hub(endpoint: str, desk: Desk, commands: list[list[str]]) -> list[tuple[int, str]]:
    done = subprocess.run(
        [sys.executable, "-c", _DRIVER],
        input=json.dumps(commands),
        env=environment(endpoint, desk.tmp / "hf"),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])
    for _, _, exception in rows:
        assert exception.startswith("SystemExit"), exception
    return [(code, stderr) for code, stderr, _ in rows]


def test_hub_refuses(desk: Desk, hub: str):
    before = digests(desk.out)
    table = [
        (desk.recover("--model", "nobody/nothing"), ("no model 'nobody/nothing' on the hub", "check the spelling")),
        (desk.recover("--model", "nobody/moved"), ("no model 'nobody/moved' on the hub", "check the spelling")),
        (desk.recover("--model", "owner/gated"), ("owner/gated is gated", "accept its licence", "hf auth login")),
        (desk.generate("--model", "owner/asked"), ("owner/asked is gated", "accept its licence", "hf auth login")),
        (desk.recover("--model", "owner/bare"), ("owner/bare has no config.json that names", "choose")),
        (desk.recover("--model", "owner/old", "--revision", "v9"), ("owner/old", "no revision 'v9'", "--revision")),
        (desk.generate("--adapter", "nobody/nothing"), ("no repository 'nobody/nothing' on the hub", "check")),
        (desk.generate("--adapter", "owner/gated"), ("owner/gated is gated", "accept its terms", "hf auth login")),
        (desk.recover("--overwrite", "--prompts", "nobody/nothing"), ("prompts 'nobody/nothing'", "gym:TASK")),
    ]
    for (code, stderr), (_, fragments) in zip(on_hub(hub, desk, [c for c, _ in table]), table, strict=True):
        told(code, stderr, *fragments)
    assert digests(desk.out) == before


def test_no_network(desk: Desk):
    before = digests(desk.out)
    commands = [desk.recover("--model", "owner/name"), desk.generate("--adapter", "owner/name")]
    with socket.socket() as taken:  # a port nobody listens on, and, as long as it is held, nobody will
        taken.bind(("127.0.0.1", 0))
        model, adapter = on_hub(f"http://127.0.0.1:{taken.getsockname()[1]}", desk, commands)
    told(*model, "cannot reach the model hub for owner/name", "check the network", "local directory")
    told(*adapter, "cannot reach the hub for owner/name", "check the network")
    assert digests(desk.out) == before


def test_true_process(desk: Desk):
    before = digests(desk.out)
    done = subprocess.run(
        [sys.executable, "-m", "caprese", *desk.recover("--seed", "9")],
        env=environment("http://127.0.0.1:1", desk.tmp / "hf"),
        capture_output=True,
        text=True,
        timeout=120,
    )
    told(done.returncode, done.stderr, "holds the result of another recipe", "--overwrite")
    assert digests(desk.out) == before


def test_true_process_usage():
    done = subprocess.run(
        [sys.executable, "-m", "caprese", "recover", "--samples", "much"],
        env=environment("http://127.0.0.1:1", Path("/nowhere")),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert "'--samples'" in done.stderr and "Traceback" not in done.stderr


# Python


def test_apply_twice(tiny: torch.nn.Module):
    caprese.apply(tiny, caprese.Griffin())
    with pytest.raises(CapreseError, match=r"already applied.*caprese\.remove"):
        caprese.apply(tiny, caprese.Cats())


IDS = torch.ones(2, 5, dtype=torch.long)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: caprese.apply(model, "griffin"), r"'griffin' is no method; give one such as caprese\.Griffin"),
        (lambda model: caprese.apply(model, caprese.Griffin), "is no method"),
        (lambda model: caprese.apply(model, [caprese.Griffin(), None]), "None is no method"),
        (lambda model: caprese.calibrate(model, caprese.Static(), [IDS]), r"takes a list of caprese\.Tokens"),
        (lambda model: caprese.Tokens(IDS, torch.tensor([1])), "a prompt length for each of the B sequences"),
        (lambda model: caprese.Tokens(IDS, [1, 2, 3]), r"given \(2, 5\), \(3,\)"),
        (lambda model: caprese.Tokens(IDS[0], [1, 2, 3, 4, 5]), r"ids \[B, T\]"),
        (lambda model: caprese.Tokens(IDS, [1, 1], IDS[:, 1:]), r"a mask \[B, T\]"),
    ],
)
def test_refused_in_python(tiny: torch.nn.Module, call: Callable[[torch.nn.Module], object], message: str):
    with pytest.raises(CapreseError, match=message):
        call(tiny)


def test_prompt_lengths_as_a_list():
    as_tensor = caprese.Tokens(IDS, torch.tensor([1, 4]))
    assert caprese.Tokens(IDS, [1, 4]).completion().equal(as_tensor.completion())


def test_remove_without_apply(tiny: torch.nn.Module):
    with pytest.raises(CapreseError, match="nothing to remove"):
        caprese.remove(tiny)


def test_save_without_adapter(tiny: torch.nn.Module, tmp_path: Path):
    with pytest.raises(CapreseError, match=r"no recovery adapter.*caprese\.recover"):
        caprese.save(caprese.apply(tiny, caprese.Griffin()), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("at", "name", "said"), [("v_proj", "default", "to save$"), ("recovery", "mine", ".*'mine'")])
def test_save_without_a_branch_of_its_own(tiny: torch.nn.Module, tmp_path: Path, at: str, name: str, said: str):
    """What `load` would not take."""
    model = get_peft_model(caprese.apply(tiny, caprese.Cats()), LoraConfig(r=2, target_modules=[at]), name)
    with pytest.raises(CapreseError, match=f"no recovery adapter called 'default' .*{said}"):
        caprese.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_save_nan(tiny: torch.nn.Module, tmp_path: Path):
    model = attach_adapter(caprese.apply(tiny, caprese.Griffin()), 2)
    next(p for n, p in model.named_parameters() if "lora_A" in n).data[0, 0] = float("nan")
    with pytest.raises(CapreseError, match="NaN or infinity; not saved"):
        caprese.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_raw_base_is_no_place_for_the_adapter(tiny: torch.nn.Module, finished: Path):
    with pytest.raises(ValueError, match="recovery"):
        PeftModel.from_pretrained(tiny, str(finished))


def test_failed_load_leaves_the_base(tiny: torch.nn.Module, desk: Desk):
    truncate(desk.out / CONFIG)
    names = [name for name, _ in tiny.named_modules()]
    with pytest.raises(CapreseError, match=CONFIG):
        caprese.load(tiny, desk.out)
    assert [name for name, _ in tiny.named_modules()] == names


@pytest.mark.parametrize("ranks", [0, 33, [2, 2]])
def test_ranks(tiny: torch.nn.Module, ranks: int | list[int]):
    with pytest.raises(CapreseError, match="choose 1 to 32|3 applied layers"):
        attach_adapter(caprese.apply(tiny, caprese.Griffin()), ranks)


def test_adapter_without_method(tiny: torch.nn.Module):
    with pytest.raises(CapreseError, match=r"caprese\.apply"):
        attach_adapter(tiny, 2)


def test_phases_without_method(tiny: torch.nn.Module):
    with pytest.raises(CapreseError, match=r"caprese\.apply"), caprese.phases(tiny, [1]):
        pass
    with pytest.raises(CapreseError, match=r"caprese\.apply"), caprese.dense(tiny):
        pass


@pytest.mark.parametrize("lengths", [[-1], [[1]], 3, [0.5]])
def test_phases_lengths(tiny: torch.nn.Module, lengths: Any):
    caprese.apply(tiny, caprese.Griffin())
    with pytest.raises(CapreseError, match="one length >= 0 per sequence"), caprese.phases(tiny, lengths):
        pass


def test_phases_batch(tiny: torch.nn.Module):
    caprese.apply(tiny, caprese.Griffin())
    with pytest.raises(CapreseError, match="3 prompt lengths for a batch of 2"), caprese.phases(tiny, [1, 1, 1]):
        tiny(torch.ones(2, 4, dtype=torch.long))
    tiny(torch.ones(2, 4, dtype=torch.long))  # and the model is as it was


def test_decode_after_a_dense_pass(tiny: torch.nn.Module):
    caprese.apply(tiny, caprese.Griffin())
    cache = DynamicCache(config=tiny.config)
    with caprese.dense(tiny):
        tiny(torch.ones(1, 4, dtype=torch.long), past_key_values=cache)
    with pytest.raises(CapreseError, match="has seen no prompt for this KV cache.*start with an empty cache"):
        tiny(torch.ones(1, 1, dtype=torch.long), past_key_values=cache)


def test_layers_out_of_range(tiny: torch.nn.Module):
    with pytest.raises(CapreseError, match="numbers 0-2"):
        caprese.apply(tiny, caprese.Griffin(layers=[3]))
