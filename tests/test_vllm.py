"""SmolLM2 in vLLM: what transformers computes with the same checkpoint, in few bits too (after `make vllm`)."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import recovered
from test_gguf import PROMPTS
from transformers import AutoModelForCausalLM

import caprese
from caprese.efficient_methods import Griffin
from caprese.exports import dense_checkpoints
from caprese.studies import bench

pytestmark = pytest.mark.slow
pytest.importorskip("compressed_tensors", reason="pip install 'caprese[compressed]'")
HERE = Path(__file__).parent.parent / ".venv-vllm" / "bin" / "python"
PYTHON = os.environ.get("CAPRESE_VLLM_PYTHON") or str(HERE)
if not Path(PYTHON).exists():
    pytest.skip("make vllm", allow_module_level=True)

# greedy continuations with the log-probability of each token
ASK = """
import json, os, sys
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt
path, asked, out = sys.argv[1:]
engine = LLM(path, skip_tokenizer_init=True, enforce_eager=True, max_model_len=256, kv_cache_memory_bytes=1 << 28)
how = SamplingParams(temperature=0, max_tokens=24, logprobs=1, ignore_eos=True, detokenize=False)
prompts = [TokensPrompt(prompt_token_ids=ids) for ids in json.load(open(asked))]
answers = [request.outputs[0] for request in engine.generate(prompts, how)]
found = [[[i, at[i].logprob] for i, at in zip(a.token_ids, a.logprobs)] for a in answers]
json.dump(found, open(out, "w"))
"""


@pytest.fixture(scope="module")
def model():
    """SmolLM2 with a tenth of its neurons gone and a branch that does something, and its tokenizer."""
    base, tokenizer = caprese.load_base("smollm2-135m", dtype="float32")
    method = caprese.Static(sparsity=0.1)
    ids = torch.tensor([tokenizer("The sun is a star, and the moon goes around the earth.").input_ids])
    seen = caprese.calibrate(base, method, [caprese.Tokens(ids, [3])])
    return recovered(caprese.apply(base, method, calibration=seen), 20, 0.02), tokenizer


@pytest.mark.parametrize("outtype, close", [(None, 0.1), ("w4a16", 0.1), ("w8a8", 0.3), ("fp8", 0.4)])
def test_vllm_computes_what_transformers_does(model, outtype, close, tmp_path):
    """In bfloat16, which rounded inputs make more of; wrong codes or scales would be off by whole units."""
    lm, tokenizer = model
    caprese.export(lm, tokenizer, tmp_path / "out", outtype=outtype, dtype=torch.bfloat16)
    ids = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    (tmp_path / "asked.json").write_text(json.dumps(ids))
    command = [PYTHON, "-c", ASK, str(tmp_path / "out"), str(tmp_path / "asked.json"), str(tmp_path / "found.json")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "VLLM_CPU_INT4_W4A8": "0"})
    assert done.returncode == 0, done.stderr[-2000:]
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    off, likeliest = [], []
    for prompt, answer in zip(ids, json.loads((tmp_path / "found.json").read_text()), strict=True):
        tokens, logprobs = torch.tensor([int(i) for i, _ in answer]), torch.tensor([p for _, p in answer])
        with torch.no_grad():
            logits = stock(torch.cat([torch.tensor(prompt), tokens])[None]).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1)
        off.append((expected.gather(1, tokens[:, None])[:, 0] - logprobs).abs())
        likeliest.append(expected.argmax(-1) == tokens)
    assert float(torch.cat(off).mean()) < close and float(torch.cat(likeliest).float().mean()) > 0.8


def test_vllm_runs_beside_ours(model, monkeypatch, tmp_path):
    monkeypatch.setenv("CAPRESE_VLLM_PYTHON", PYTHON)
    base, _ = caprese.load_base("smollm2-135m", dtype="float32")
    others = {f"vllm {kind}": path for kind, path in dense_checkpoints(base, ["bfloat16", "w4a16"], tmp_path).items()}
    result = bench(base, [Griffin()], (1,), others, rank=4, prompt_tokens=8, new_tokens=6, rows=["dense"])
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == ["dense", "vllm bfloat16", "vllm w4a16"]
    assert rows["vllm w4a16"]["bytes_per_token"] < 0.6 * rows["vllm bfloat16"]["bytes_per_token"]
    assert all(row["ttnt_ms"] > 0 for row in rows.values())


def test_vllm_draws_the_samples(monkeypatch, tmp_path):
    """It is started, proves that it is the model, and is gone afterwards; nothing is drawn twice."""
    monkeypatch.setenv("CAPRESE_VLLM_PYTHON", PYTHON)
    base, tokenizer = caprese.load_base("smollm2-135m", dtype="float32")
    recipe = caprese.Recipe(
        model="smollm2-135m",
        output=str(tmp_path / "out"),
        rank=4,
        samples={
            "teacher": "vllm",
            "train": 24,
            "validation": 4,
            "test": 4,
            "elsewhere": 2,
            "max_new_tokens": 12,
            "prompts": "gym:simple_equations=0.5,self=0.5",
            "self_tokens": 32,
        },
        layerwise={"how": "none"},
        end_to_end={"epochs": 0},
        evaluation={"latency_tokens": 0, "generate": False},
    )
    report = caprese.recover(base, tokenizer, recipe)
    assert report["samples"]["train"]["samples"] == 24 and report["recipe"]["samples"]["teacher"] == "vllm"
    assert subprocess.run(["pgrep", "-f", "caprese-teacher"], capture_output=True).returncode == 1
    monkeypatch.setenv("CAPRESE_VLLM_PYTHON", "/nowhere")
    (tmp_path / "out" / "report.json").unlink()
    assert caprese.recover(base, tokenizer, recipe)["quality"] == report["quality"]
