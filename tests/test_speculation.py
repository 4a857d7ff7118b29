"""Speculative decoding of llama.cpp and vLLM with an exported draft (after `make llama-cpp llama-server vllm`).

Each writes what it writes without a draft: where a token differs from that, it is as likely up to rounding.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import caprese
from caprese.studies.prompts import some_prompts

ROOT = Path(__file__).parent.parent
# what the engine's own sums may miss the largest logit by, of the largest
WITHIN = {"llama.cpp": 1e-4, "vllm": 2 * 2**-7}
TOKENS = 48


@pytest.fixture(scope="module")
def smollm2():
    return caprese.load_base("smollm2-135m", dtype="float32")


@pytest.fixture
def measures(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("measures.speculation"), importlib.import_module("measures.served")


def _needs(engine: str, monkeypatch) -> dict[str, str]:
    """Where the engine is, and the types of target and draft."""
    if engine == "vllm":
        python = ROOT / ".venv-vllm" / "bin" / "python"
        if not (os.environ.get("CAPRESE_VLLM_PYTHON") or python.exists()):
            pytest.skip("make vllm")
        pytest.importorskip("compressed_tensors", reason="pip install 'caprese[compressed]'")
        monkeypatch.setenv("CAPRESE_VLLM_PYTHON", os.environ.get("CAPRESE_VLLM_PYTHON", str(python)))
        return {"target": "bfloat16", "outtype": "w8a8"}
    server = ROOT / ".venv" / "src" / "llama-server" / "bin" / "llama-server"
    sources = [*(ROOT / ".venv" / "src").glob("llama_cpp_python-*/vendor/llama.cpp")]
    if not (os.environ.get("CAPRESE_LLAMA_SERVER") or server.exists()) or not sources:
        pytest.skip("make llama-cpp llama-server")
    monkeypatch.setenv("CAPRESE_LLAMA_SERVER", os.environ.get("CAPRESE_LLAMA_SERVER", str(server)))
    monkeypatch.setenv("LLAMA_CPP", os.environ.get("LLAMA_CPP", str(sources[0])))
    return {"target": "f32", "outtype": "f16"}  # q8_0 crashes on some virtual machines with AMX


def _is_likeliest(model: Any, prompt: list[int], text: list[int], within: float) -> None:
    with torch.no_grad():
        logits = model(torch.tensor([prompt + text])).logits[0, len(prompt) - 1 : -1]
    found = logits.gather(1, torch.tensor(text)[:, None])[:, 0]
    logits[:, model.generation_config.eos_token_id] = -torch.inf  # servers were told to go on
    assert float(((logits.amax(-1) - found) / found.abs()).max()) < within


@pytest.mark.slow
@pytest.mark.parametrize("engine", WITHIN)
def test_an_exported_draft(engine, smollm2, measures, monkeypatch, tmp_path):
    speculation, served = measures
    model, tokenizer = smollm2
    kinds = _needs(engine, monkeypatch)
    prompts = some_prompts(None, 4, model, tokenizer, TOKENS)
    measure = speculation.Measure()
    measure.model, measure.tokenizer = model, tokenizer
    target = measure.dense(engine, kinds["target"])
    method = caprese.Static(sparsity=0.1)
    seen = caprese.calibrate(model, method, [caprese.Tokens(torch.tensor([ids]), [1]) for ids in prompts])
    outtype = kinds["outtype"]
    how = {"format": "gguf"} if engine == "llama.cpp" else {"dtype": torch.bfloat16}
    applied = caprese.apply(model, method, calibration=seen)
    facts = caprese.export(applied, tokenizer, tmp_path / "draft", outtype=outtype, **how)
    caprese.remove(model)
    draft = tmp_path / "draft" / (facts["gguf"] or "")
    texts: dict[str, list[Any]] = {}
    for name, given in {"dense": None, "draft": draft, "lookup": "lookup"}.items():
        with served.serve(engine, target, given, tokens=3, quick=True) as server:
            server.write(prompts[0], TOKENS)
            texts[name] = [server.write(prompt, TOKENS) for prompt in prompts]
    for name in ("draft", "lookup"):
        figures = speculation.compared(texts["dense"], texts[name])
        print(f"{engine}, {name}: {figures}")
    figures = speculation.compared(texts["dense"], texts["draft"])
    assert figures["acceptance"] > 0.3 and figures["tokens_per_round"] > 1.5
    for found in texts.values():
        for prompt, text in zip(prompts, found, strict=True):
            assert len(text.ids) == TOKENS
            _is_likeliest(model, prompt, text.ids, WITHIN[engine])
    assert figures["identical"] >= (len(prompts) if engine == "llama.cpp" else 1)


def test_what_is_not_there_is_said(measures, monkeypatch):
    _, served = measures
    monkeypatch.setenv("CAPRESE_LLAMA_SERVER", "nowhere")
    with pytest.raises(caprese.CapreseError, match="make llama-server"), served.serve("llama.cpp", Path("x.gguf")):
        pass
