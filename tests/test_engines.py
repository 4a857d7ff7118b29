"""Other engines beside ours: which types are made for which, and what a process that is not there says."""

from __future__ import annotations

import sys

import pytest
from conftest import tiny_llama

import caprese
from caprese.data_gen.vllm import find_vllm
from caprese.efficient_methods import Griffin
from caprese.studies import bench, engines
from caprese.studies.engines import engine_types

# what the worker asks of vLLM, and nothing else
STAND_IN = """
import sys
print("a log on stdout")

class EngineArgs:
    def __init__(self, model, max_model_len, **other):
        assert max_model_len == 1024 and other["max_num_seqs"] == 1
        if "broken" in model:
            raise ValueError("this checkpoint is broken")

class SamplingParams:
    def __init__(self, temperature, max_tokens, **other):
        assert temperature == 0 and max_tokens == 1024 - 8

class LLMEngine:
    @classmethod
    def from_engine_args(cls, arguments):
        return cls()

    def add_request(self, name, prompt, how):
        assert len(prompt["prompt_token_ids"]) == 8
        self.steps = 0

    def step(self):
        self.steps += 1
        return [] if self.steps == 1 else ["a token"]

    def has_unfinished_requests(self):
        return True
"""


@pytest.fixture
def vllm(tmp_path, monkeypatch):
    """A Python with what stands in for vLLM."""
    package = tmp_path / "stand_in" / "vllm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(STAND_IN)
    (package / "inputs.py").write_text("TokensPrompt = dict\n")
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    monkeypatch.setenv("CAPRESE_VLLM_PYTHON", sys.executable)


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(engines, "find_vllm", lambda: "python")
    monkeypatch.setattr(engines, "check_llama_cpp", lambda: None)
    monkeypatch.setattr(engines, "check_scheme", lambda scheme: None)


def test_types_go_to_the_engine_that_has_them(installed):
    assert engine_types(None, "q8_0") == {}
    assert engine_types("llama.cpp", None) == {"llama.cpp": ["q8_0", "q4_0", "q4_k_m"]}
    assert engine_types("vllm,llama.cpp", None)["vllm"] == ["bfloat16", "w4a16", "w8a8"]
    assert engine_types("llama.cpp,vllm", "w8a8,f16,fp8") == {"llama.cpp": ["f16"], "vllm": ["w8a8", "fp8"]}


@pytest.mark.parametrize(
    "names, types, message",
    [
        ("tgi", None, r"no engine 'tgi' runs beside ours: llama\.cpp, vllm"),
        ("vllm", "w4a16,q9", r"no type 'q9' of vllm: bfloat16, w4a16"),
        ("vllm", "w4a16,q8_0", r"no type 'q8_0' of vllm"),
        ("llama.cpp,vllm", "w4a16", r"no type of w4a16 is llama\.cpp's: f32, "),
    ],
)
def test_engines_and_types_that_there_are_not(names, types, message, installed):
    with pytest.raises(caprese.CapreseError, match=message):
        engine_types(names, types)


def test_a_python_without_vllm(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.delenv("CAPRESE_VLLM_PYTHON", raising=False)
    with pytest.raises(caprese.CapreseError, match=r"not installed here: make vllm, and set CAPRESE_VLLM_PYTHON to"):
        find_vllm()
    for python in (str(tmp_path / "nowhere"), "/bin/false"):
        monkeypatch.setenv("CAPRESE_VLLM_PYTHON", python)
        with pytest.raises(
            caprese.CapreseError, match=rf"CAPRESE_VLLM_PYTHON is {python}, which is no Python that has"
        ):
            find_vllm()


def test_a_checkpoint_takes_turns_with_ours(vllm, tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path / "mine")
    how = {"rank": 4, "prompt_tokens": 8, "new_tokens": 6, "rows": ["dense"]}
    result = bench(model, [Griffin()], (1, 2), {"mine": tmp_path / "mine"}, **how)
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == ["dense", "mine"] and rows["mine"]["ttnt_ms"] > 0
    assert rows["mine"]["bytes_per_token"] == (tmp_path / "mine" / "model.safetensors").stat().st_size
    assert [row["name"] for row in result["batches"][1]["rows"]] == ["dense"]


def test_why_vllm_ended(vllm, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "broken")
    with pytest.raises(caprese.CapreseError, match=r"vLLM ended with broken \(exit 1: ValueError: this checkpoint is"):
        engines.Engine("broken", tmp_path / "broken", [1, 2], 1).wait()
    how = {"rank": 4, "prompt_tokens": 8, "new_tokens": 6, "rows": ["dense"]}
    with pytest.raises(caprese.CapreseError, match=r"vLLM ended with broken"):
        bench(tiny_llama(), [Griffin()], (1,), {"broken": tmp_path / "broken"}, **how)
