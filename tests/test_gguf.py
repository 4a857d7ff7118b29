"""An exported SmolLM2 in llama.cpp: the text that transformers writes. `make llama-cpp` builds what it needs."""

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
    """Static 30% with a recovered adapter, as a checkpoint and as GGUF in two types."""
    pytest.importorskip("llama_cpp", reason="make llama-cpp")
    out = tmp_path_factory.mktemp("gguf")
    if not os.environ.get("LLAMA_CPP"):
        found = sorted((ROOT / ".venv" / "src").glob("llama_cpp_python-*/vendor/llama.cpp"))
        os.environ["LLAMA_CPP"] = str(found[-1]) if found else ""
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
    facts = caprese.export(model, tokenizer, out / "hf", dtype=torch.float32)
    assert facts["largest_logit_difference"] < 1e-4
    assert facts["bytes"] < 4 * facts["base_parameters"]  # smaller than the base in the same type
    for outtype in ("f32", "f16"):
        facts = caprese.export(model, tokenizer, out / outtype, dtype=torch.float32, format="gguf", outtype=outtype)
        assert (out / outtype / facts["gguf"]).is_file()
    return out


@pytest.mark.parametrize("outtype", ["f32", "f16"])
def test_llama_cpp_writes_what_transformers_writes(exported, outtype):
    from llama_cpp import Llama

    dtype = torch.float16 if outtype == "f16" else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(exported / "hf")
    # the same weights; float16 products on a CPU are rounded in ways of their own
    stock = AutoModelForCausalLM.from_pretrained(exported / "hf", dtype=dtype).float().eval()
    path = next((exported / outtype).glob("*.gguf"))
    engine = Llama(model_path=str(path), n_ctx=256, n_threads=2, verbose=False)
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")
        assert engine.tokenize(prompt.encode(), add_bos=False, special=True) == ids.input_ids[0].tolist()
        with torch.no_grad():
            tokens = stock.generate(**ids, max_new_tokens=32, do_sample=False)
        expected = tokenizer.decode(tokens[0, ids.input_ids.shape[1] :], skip_special_tokens=True)
        got = engine.create_completion(prompt, max_tokens=32, temperature=0.0)["choices"][0]["text"]
        assert got == expected, prompt
