"""`caprese bench`: what it reports, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny
from typer.testing import CliRunner

import caprese
from caprese.cli import app
from caprese.data_gen.vllm import find_vllm
from caprese.efficient_methods import Griffin, Nf4
from caprese.errors import CapreseError
from caprese.models import random_model, shape_config
from caprese.studies import ROWS, bench
from caprese.studies.bench import Contender, weights_read
from caprese.studies.rows import rows_of

MADE = rows_of([Griffin()], dtype=torch.float32)
EAGER = [r for r in MADE if not r.endswith("compiled")]


def test_rows_and_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times are a clock's of our own, bytes are counted by hand: so every figure of every row is known."""
    torch._dynamo.reset()
    took = {name: 1.0 + number for number, name in enumerate(ROWS)}  # ms, but for one slow step of each
    steps: dict[str, int] = {}

    really = Contender.advance

    def advance(self: Contender) -> float:
        really(self)
        steps[self.name] = steps.get(self.name, 0) + 1
        return took[self.name] * (100 if steps[self.name] == 5 else 1)

    monkeypatch.setattr(Contender, "advance", advance)
    model, rank, new_tokens = tiny("llama"), 4, 5
    result = bench(model, [Griffin(sparsity=0.5)], rank=rank, prompt_tokens=8, new_tokens=new_tokens)
    assert [row["name"] for row in result["rows"]] == MADE
    assert result["rank"] == 4 and result["sparsity"] == 0.5 and result["dtype"] == "float32"
    c = model.config
    read = sum(p.numel() for p in model.parameters())
    if not c.tie_word_embeddings:
        read -= c.vocab_size * c.hidden_size  # looked up, not read
    half = c.num_hidden_layers * 3 * c.hidden_size * c.intermediate_size // 2
    branch = c.num_hidden_layers * 2 * c.hidden_size * rank
    known = {"dense": read, "efficient": read - half, "recovered": read - half + branch, "fused": read - half + branch}
    for row in result["rows"]:
        name, dense = row["name"], took["dense_compiled" if row["name"].endswith("compiled") else "dense"]
        assert row["ttnt_ms"] == took[name] and row["ratio_same_engine"] == took[name] / dense
        assert row["ratio_dense_eager"] == took[name] / took["dense"]
        assert row["ratio_best_dense"] == took[name] / min(t for n, t in took.items() if n.startswith("dense"))
        assert row["tokens_per_second"] == pytest.approx(1000 / took[name])
        if name.removesuffix("_compiled") in known:
            weights = known[name.removesuffix("_compiled")]
            assert row["bytes_per_token"] == 4 * weights
            assert row["efficiency"] == pytest.approx(weights / read * dense / took[name])
        assert row["peak_bytes"] > (2 if "bfloat16" in name else 4) * read
        if name == "dense_bfloat16":
            assert row["bytes_per_token"] == 2 * read
    assert result["floor_ratio"] == pytest.approx(known["fused"] / read)
    by_name = {row["name"]: row for row in result["rows"]}
    assert by_name["fused"]["selection_ms"] > 0 and by_name["fused_compiled"]["compile_s"] > 0


def test_the_model_is_left_as_it_was() -> None:
    model = tiny("llama")
    ids = torch.arange(2, 12)[None]
    before = model(input_ids=ids).logits
    bench(model, [Griffin(sparsity=0.5)], rank=4, prompt_tokens=8, new_tokens=3, rows=EAGER)
    assert torch.equal(model(input_ids=ids).logits, before)
    caprese.apply(model, caprese.Griffin())  # nothing is applied to it


def test_floor_of_known_shapes() -> None:
    """The byte floors that follow from the weights alone (arXiv 2505.07861's shapes)."""
    with torch.device("meta"):
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_config(shape_config("llama-3.1-8b"))
        small = AutoModelForCausalLM.from_config(shape_config("smollm2-135m"))
    half = [Griffin(sparsity=0.5)]
    dense = weights_read(model, half, 256, "dense")
    assert weights_read(model, half, 256, "fused") / dense == pytest.approx(0.633, abs=1e-3)
    assert weights_read(model, [caprese.Cats(sparsity=0.5)], 256, "fused") / dense == pytest.approx(0.76, abs=1e-2)
    assert weights_read(small, half, 32, "fused") / weights_read(small, half, 32, "dense") == pytest.approx(
        0.712, abs=1e-3
    )


def test_larger_batches_read_more() -> None:
    model = tiny("llama")
    own = [weights_read(model, [Griffin(sparsity=0.5)], 4, "fused", batch) for batch in (1, 2, 4, 16)]
    shared = [weights_read(model, [Griffin(sparsity=0.5, shared_choice=True)], 4, "fused", b) for b in (1, 16)]
    assert own == sorted(own) and own[0] < own[1] and shared[0] == shared[1] == own[0]
    result = bench(model, [Griffin(sparsity=0.5)], (1, 2), rank=4, prompt_tokens=8, new_tokens=3, rows=EAGER)
    assert [each["batch"] for each in result["batches"]] == [1, 2]
    assert result["batches"][0]["floor_ratio"] < result["batches"][1]["floor_ratio"]


def test_packed_weights() -> None:
    """No LoRA on them, and their floor counts the model's own width of a weight."""
    how: dict[str, Any] = {"rank": 4, "prompt_tokens": 8, "new_tokens": 3}
    result = bench(tiny("llama"), [Nf4()], rows=rows_of([Nf4()], compiled=False), **how)
    assert [row["name"] for row in result["rows"]] == ["dense", "efficient", "recovered", "fused"]
    with pytest.raises(caprese.CapreseError, match="nf4 has no row efficient_lora"):
        bench(tiny("llama"), [Nf4()], rows=["dense", "efficient_lora"], **how)
    ffn = 2 * 3 * 32 * 96
    for dtype, bits in ((torch.float32, 32), (torch.bfloat16, 16)):
        model = tiny("llama", dtype)
        saved = weights_read(model, [Nf4()], 4, "dense") - weights_read(model, [Nf4()], 4, "efficient")
        assert saved == pytest.approx(ffn * (1 - 4.5 / bits), abs=2)


def test_lora_reads_chosen_rows() -> None:
    model = tiny("llama")
    bare, lora = (weights_read(model, [Griffin(sparsity=0.5)], 6, row) for row in ("efficient", "efficient_lora"))
    rank = round(2 * 32 * 6 / (3 * (32 + 96)))
    assert lora - bare == 2 * 3 * rank * (32 + 48)


def test_a_step_that_does_not_compile_whole() -> None:
    torch._dynamo.reset()
    rows = ["dense", "dense_compiled"]
    with pytest.raises(caprese.CapreseError, match="OPTForCausalLM does not compile whole .*out of `rows`"):
        bench(tiny("opt"), [Griffin(sparsity=0.5)], rank=4, prompt_tokens=8, new_tokens=3, rows=rows)


@pytest.mark.parametrize("name", ["smollm2-135m", "gemma-2-2b", "deepseek-r1-distill-qwen-1.5b"])
def test_random_weights_make_sense(name: str) -> None:
    config = shape_config(name)
    config.num_hidden_layers, config.vocab_size = 1, 64
    config.layer_types = getattr(config, "layer_types", None) and config.layer_types[:1]
    model = random_model(config)
    logits = model(input_ids=torch.arange(5, 15)[None]).logits
    assert torch.isfinite(logits).all() and logits.std() > 1e-3
    assert torch.equal(logits, random_model(config)(input_ids=torch.arange(5, 15)[None]).logits)


def run(*args: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["bench", *args])
    return done.exit_code, done.output


def test_command_line(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "model")
    from conftest import byte_tokenizer

    byte_tokenizer().save_pretrained(tmp_path / "model")
    model = ("--model", str(tmp_path / "model"), "--rank", "4")
    size = ("--prompt-tokens", "8", "--new-tokens", "3", "--no-compile", "--dtype", "float32", "--device", "cpu")
    code, out = run(*model, *size, "--json", "--output", str(tmp_path / "out"))
    assert code == 0, out
    result = json.loads(out)
    assert set(result) >= {"shape", "device", "dtype", "method", "sparsity", "rank", "floor_ratio", "rows", "command"}
    assert [row["name"] for row in result["rows"]] == EAGER
    assert json.loads((tmp_path / "out" / "bench.json").read_text())["rows"] == result["rows"]
    assert (tmp_path / "out" / "bench.png").stat().st_size > 5000
    code, out = run(*model, *size, "--batch", "1,2", "--output", str(tmp_path / "two"))
    assert code == 0 and "byte floor" in out and (tmp_path / "two" / "bench.png").exists()


def test_dry_run_needs_no_weights() -> None:
    code, out = run("--random-weights", "llama-3.1-8b", "--dtype", "bfloat16", "--dry-run", "--json")
    assert code == 0
    assert json.loads(out)["floor_ratio_batch_1"] == pytest.approx(0.633, abs=1e-3)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], "which model?"),
        (["--random-weights", "llama-9"], "no known shape 'llama-9'; known: "),
        (["--random-weights", "smollm2-135m", "--model", "x/y"], "not both"),
        (["--random-weights", "smollm2-135m", "--batch", "two"], "--batch 'two'"),
        (["--random-weights", "smollm2-135m", "--batch", "0"], "--batch takes numbers from 1"),
        (["--random-weights", "smollm2-135m", "--rows", "fused"], "leave it in --rows"),
        (["--random-weights", "smollm2-135m", "--rows", "dense,fast"], "no row fast"),
        (["--random-weights", "smollm2-135m", "--new-tokens", "0"], "start at 1"),
        (["--random-weights", "smollm2-135m", "--prompt-tokens", "131072"], "do not fit this model's context"),
        (["--random-weights", "smollm2-135m", "--sparsity", "1.5"], "sparsity"),
        (["--random-weights", "smollm2-135m", "--method", "nf4", "--sparsity", "0.9"], "no setting of nf4"),
        (["--random-weights", "smollm2-135m", "--rank", "577", "--rows", "dense,fused"], "rank 577"),
        (["--random-weights", "smollm2-135m", "--form", "best"], "no form 'best'"),
    ],
)
def test_bad_input(args: list[str], says: str) -> None:
    code, out = run(*args)
    assert code == 1 and says in " ".join(out.split())


def test_other_engines_are_asked_for_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny("llama").save_pretrained(tmp_path / "model")
    model = ("--model", str(tmp_path / "model"))
    for args, said in (
        ((*model, "--engine", "onnx"), "no engine 'onnx' runs beside ours: llama.cpp, vllm"),
        (("--random-weights", "llama-3.2-1b", "--engine", "llama.cpp"), "wants a tokenizer"),
        ((*model, "--gguf", str(tmp_path / "none.gguf")), "there is no such file"),
        ((*model, "--checkpoint", str(tmp_path / "none")), "none: there is no config.json in such a directory"),
        ((*model, "--checkpoint", ""), "there is no config.json in such a directory"),
        ((*model, "--engine-types", "w4a16"), "give --engine too"),
        ((*model, "--engine", "llama.cpp", "--batch", "2,4"), "other engines run at batch 1"),
    ):
        code, out = run(*args)
        assert code == 1 and said in " ".join(out.split()), out
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.delenv("CAPRESE_VLLM_PYTHON", raising=False)
    code, out = run(*model, "--engine", "llama.cpp")
    assert code == 1 and "pip install llama-cpp-python" in " ".join(out.split())
    code, out = run(*model, "--engine", "vllm")
    assert code == 1 and "make vllm" in " ".join(out.split())


@pytest.mark.parametrize("script", ["sleep 100", "exit 0", "echo not json", "printf '\\377'", "exit 3"])
def test_a_python_without_vllm_is_refused_before_any_work(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr("caprese.data_gen.vllm._PATIENCE", 1)
    monkeypatch.setenv("CAPRESE_VLLM_PYTHON", str(python))
    with pytest.raises(CapreseError, match="which is no Python that has vLLM"):
        find_vllm()


def test_two_rows_of_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("caprese.data_gen.vllm.find_vllm", lambda: "python")
    for place in ("a", "b"):
        tiny("llama").save_pretrained(tmp_path / place / "exported")
    both = [word for place in "ab" for word in ("--checkpoint", str(tmp_path / place / "exported"))]
    code, out = run("--model", str(tmp_path / "a" / "exported"), *both)
    assert code == 1 and "would both be the row exported" in " ".join(out.split())
