"""SmolLM2, exported: exact, smaller, and in llama.cpp the text that transformers writes (after `make llama-cpp`)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import caprese
from caprese.efficient_methods import Griffin
from caprese.efficient_methods.rounded import Q8
from caprese.exports import dense_ggufs
from caprese.models import count_parameters
from caprese.recipes import resolve_recipe
from caprese.studies import bench
from caprese.studies.engines import Engine

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


@pytest.fixture
def converter(monkeypatch):
    pytest.importorskip("llama_cpp", reason="make llama-cpp")
    if not os.environ.get("LLAMA_CPP"):
        found = sorted((ROOT / ".venv" / "src").glob("llama_cpp_python-*/vendor/llama.cpp"))
        monkeypatch.setenv("LLAMA_CPP", str(found[-1]) if found else "")


def test_smollm2_is_exported_exactly_and_smaller(exported):
    _, _, out, facts = exported
    # float32, 30 layers, sums in another order: some tens of units of the largest logit's last place
    assert facts["largest_logit_difference"] < 1e-5 * facts["largest_logit"], facts
    before = Path(caprese.models.resolve("smollm2-135m").source) / "model.safetensors"
    assert (out / "hf" / "model.safetensors").stat().st_size < before.stat().st_size


@pytest.mark.parametrize("outtype", ["f32", "f16"])
def test_llama_cpp_writes_what_transformers_writes(exported, outtype, converter):
    from llama_cpp import Llama

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


def test_llama_cpp_runs_beside_ours(converter, tmp_path):
    model, tokenizer = caprese.load_base("smollm2-135m", dtype="float32")
    files = dense_ggufs(model, tokenizer, ["q8_0", "q4_k_m"], tmp_path)
    sizes = [path.stat().st_size for path in files.values()]
    assert 0.5 * count_parameters(model) < sizes[1] < sizes[0] < 1.2 * count_parameters(model)
    ggufs = {f"llama.cpp {kind}": path for kind, path in files.items()}
    how = {"rank": 4, "prompt_tokens": 8, "new_tokens": 6, "rows": ["dense", "fused"]}
    result = bench(model, [Griffin(), Q8()], (1, 2), ggufs, **how)
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == ["dense", "fused", "llama.cpp q8_0", "llama.cpp q4_k_m"]
    for name in ("llama.cpp q8_0", "llama.cpp q4_k_m"):
        assert rows[name]["ttnt_ms"] > 0
        assert rows[name]["ratio_dense_eager"] == pytest.approx(rows[name]["ttnt_ms"] / rows["dense"]["ttnt_ms"])
    assert [row["name"] for row in result["batches"][1]["rows"]] == ["dense", "fused"]


def test_a_file_that_is_no_gguf(converter, tmp_path):
    (tmp_path / "bad.gguf").write_bytes(b"GGUF but not really")
    with pytest.raises(caprese.CapreseError, match=r"llama\.cpp ended with bad\.gguf"):
        Engine("bad", tmp_path / "bad.gguf", [1, 2], 1).wait()
