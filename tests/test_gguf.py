"""SmolLM2, exported: exact, smaller, and in llama.cpp the text that transformers writes (after `make llama-cpp`)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import caprese
from caprese.recipes import resolve_recipe

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
PROMPTS = [
    "The capital of France is",
    "Once upon a time there was",
    "To bake bread you need",
    "The first man on the moon",
    "Water boils at",
    "def fibonacci(n):",
    "The opposite of hot is",
    "In winter the trees",
    "My favourite book is about",
    "The sun rises in",
    "A triangle has",
    "The largest animal on earth",
    "She opened the door and",
    "Photosynthesis is the process",
    "1, 2, 3, 4,",
    "Dear Sir or Madam,",
]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """SmolLM2, static 30% with a recovered adapter: the caprese model, and its checkpoint."""
    out = tmp_path_factory.mktemp("gguf")
    base, tokenizer = caprese.load_base("smollm2-135m")
    recipe = resolve_recipe(
        "smollm2-135m",
        method="static:0.3",
        output=str(out / "adapter"),
        samples={"train": 16, "validation": 4, "test": 4, "max_new_tokens": 40, "shard_size": 24},
        end_to_end={"epochs": 1, "learning_rate": 1e-3},
        evaluation={"generate": False, "latency_tokens": 0},
    )
    caprese.recover(base, tokenizer, recipe)
    model = caprese.load(base, out / "adapter")
    return model, tokenizer, out, caprese.export(model, tokenizer, out / "hf")


def test_smollm2_is_exported_exactly_and_smaller(exported):
    _, _, out, facts = exported
    assert facts["largest_logit_difference"] < 1e-4
    before = Path(caprese.models.resolve("smollm2-135m").source) / "model.safetensors"
    assert (out / "hf" / "model.safetensors").stat().st_size < before.stat().st_size


@pytest.mark.parametrize("outtype", ["f32", "f16"])
def test_llama_cpp_writes_what_transformers_writes(exported, outtype, monkeypatch):
    Llama = pytest.importorskip("llama_cpp", reason="make llama-cpp").Llama
    if not os.environ.get("LLAMA_CPP"):
        found = sorted((ROOT / ".venv" / "src").glob("llama_cpp_python-*/vendor/llama.cpp"))
        monkeypatch.setenv("LLAMA_CPP", str(found[-1]) if found else "")
    model, tokenizer, out, _ = exported
    facts = caprese.export(model, tokenizer, out / outtype, format="gguf", outtype=outtype)
    dtype = torch.float16 if outtype == "f16" else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(out / "hf")
    # the same weights; float16 products on a CPU are rounded in ways of their own
    stock = AutoModelForCausalLM.from_pretrained(out / "hf", dtype=dtype).float().eval()
    engine = Llama(model_path=str(out / outtype / facts["gguf"]), n_ctx=256, n_threads=2, verbose=False)
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")
        assert engine.tokenize(prompt.encode(), add_bos=False, special=True) == ids.input_ids[0].tolist()
        with torch.no_grad():
            tokens = stock.generate(**ids, max_new_tokens=32, do_sample=False)
        expected = tokenizer.decode(tokens[0, ids.input_ids.shape[1] :], skip_special_tokens=True)
        expected = expected.replace("\ufffd", "")  # of half a character one prints this, the other nothing
        got = engine.create_completion(prompt, max_tokens=32, temperature=0.0)["choices"][0]["text"]
        assert got == expected, prompt
