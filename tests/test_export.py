"""An exported checkpoint computes what the caprese model computes, and needs no caprese."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import byte_tokenizer, recovered, tiny_llama
from families import tiny
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import caprese
from caprese.adapters import attach_adapter, branch_parameters
from caprese.cli import app
from caprese.exports import checkpoint, plan_export
from caprese.models import FAMILIES, family_of

runner = CliRunner()
#: families whose gated FFN has no place for a branch in transformers
NO_PLACE = {"qwen3", "gemma", "gemma2", "gemma3_text", "olmo2", "phi3"}


def pruned(model, sparsity: float | list[float] = 0.3, layers="all"):
    method = caprese.Static(sparsity=sparsity, layers=layers)
    ids = torch.randint(2, 258, (2, 24), generator=torch.Generator().manual_seed(1))
    return caprese.apply(model, method, calibration=caprese.calibrate(model, method, [caprese.Tokens(ids, [3, 3])]))


def difference(model, path) -> float:
    """The largest difference of logits, on tokens of our own choice."""
    ids = torch.randint(2, 258, (3, 17), generator=torch.Generator().manual_seed(2))
    with torch.no_grad(), caprese.phases(model, [0, 0, 0]):
        expected = model(input_ids=ids).logits
    stock = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        return float((stock(ids).logits - expected).abs().max())


@pytest.fixture
def here(monkeypatch):
    """Reads back in this process, which takes a moment instead of seconds; the other tests start one of its own."""

    def read_back(path, batch, base):
        with torch.no_grad():
            return AutoModelForCausalLM.from_pretrained(path)(**batch).logits

    monkeypatch.setattr(checkpoint, "_read_back", read_back)


@pytest.mark.parametrize("kind", sorted(FAMILIES.keys() - NO_PLACE))
def test_static_and_branch_are_exact(kind, here, tmp_path):
    window = {"sliding_window": None} if kind == "mistral" else {}
    adapted = recovered(pruned(tiny(kind, **window)), 5, 0.1, kind in ("llama", "qwen2", "gpt2"))
    facts = caprese.export(adapted, None, tmp_path / "out")
    assert facts["largest_logit_difference"] < 1e-4 * max(1, facts["largest_logit"])
    assert difference(adapted, tmp_path / "out") < 1e-4 * max(1, facts["largest_logit"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == ("llama" if kind in ("mistral", "qwen2") else kind)
    assert facts["ffn_width"] == 96  # 67 neurons and 5 or 10 more, filled up to a multiple of 32


@pytest.mark.parametrize("kind", sorted(NO_PLACE))
def test_a_family_without_biases_is_refused_with_the_reason(kind, tmp_path):
    model = pruned(tiny(kind), 0.5)
    with pytest.raises(caprese.CapreseError, match=f"{kind}.*has no biases"):
        caprese.export(recovered(model), None, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["gemma2", "phi3"])
def test_without_a_branch_every_family_is_exported(kind, here, tmp_path):
    model = pruned(tiny(kind), 0.5)
    caprese.export(model, None, tmp_path / "out")
    assert difference(model, tmp_path / "out") < 1e-3
    stock = json.loads((tmp_path / "out" / "config.json").read_text())
    assert stock["model_type"] == kind and stock["intermediate_size"] == 64


def test_a_dense_model_with_an_adapter(tmp_path):
    model = recovered(caprese.apply(tiny_llama(), caprese.Nothing()), scale=0.3)
    facts = caprese.export(model, byte_tokenizer(), tmp_path / "out")
    assert facts["ffn_width"] == 128 and difference(model, tmp_path / "out") < 1e-4
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("ab").input_ids == byte_tokenizer()("ab").input_ids


def test_layers_of_several_widths_and_ranks(here, tmp_path):
    model = pruned(tiny_llama(), [0.5, 0.25], layers=[0, 2])
    adapted = attach_adapter(model, [3, 7])
    for p in branch_parameters(adapted):
        p.data.normal_(0, 0.2)
    facts = caprese.export(adapted.eval(), None, tmp_path / "out")
    assert difference(adapted, tmp_path / "out") < 1e-4
    assert facts["ffn_width"] >= facts["base_ffn_width"] and "prune all of them" in facts["note"]


def test_two_adapters_and_their_sum(here, tmp_path):
    model = recovered(pruned(tiny_llama()), scale=0.2)
    caprese.save(model, tmp_path / "adapter")
    model.load_adapter(str(tmp_path / "adapter"), "twin")
    model.add_weighted_adapter(["default", "twin"], [0.5, 1.0], "sum", combination_type="cat")
    model.set_adapter("sum")
    caprese.export(model, None, tmp_path / "out")
    assert difference(model, tmp_path / "out") < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_another_type_the_constant_gate_is_made_up_for(dtype, here, tmp_path):
    """bfloat16 has no number whose SiLU is 1 to better than 0.3%: R is divided by what it is."""
    base = tiny_llama().to(dtype).float()
    model = recovered(caprese.apply(base, caprese.Nothing()), scale=0.2)
    for p in branch_parameters(model):
        p.data.copy_(p.data.to(dtype))
    caprese.export(model, None, tmp_path / "out", dtype=dtype)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert weights["model.layers.0.mlp.gate_proj.bias"].dtype == dtype
    layer = next(iter(caprese.efficient_methods.applied_ffns(model).values()))
    w = {
        n: weights[f"model.layers.0.mlp.{n}"].double() for n in ("gate_proj.bias", "up_proj.weight", "down_proj.weight")
    }
    r = slice(96, 100)
    act = torch.nn.functional.silu(w["gate_proj.bias"][r])
    made = w["down_proj.weight"][:, r] @ (act[:, None] * w["up_proj.weight"][r])
    wanted = layer.recovery.get_delta_weight("default").double()
    step = torch.finfo(dtype).eps
    assert (made - wanted).norm() < step * wanted.norm()


def test_it_is_read_back_where_caprese_is_not(tmp_path, monkeypatch):
    caprese.export(recovered(pruned(tiny_llama())), None, tmp_path / "out")
    script = (
        "import sys; sys.modules['caprese'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        f"AutoModelForCausalLM.from_pretrained({str(tmp_path / 'out')!r})\n"
        "try:\n    import caprese\nexcept ImportError:\n    print('alone')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "alone", done.stderr


@pytest.mark.parametrize("method", [caprese.Griffin(), caprese.Cats()], ids=lambda m: m.name)
def test_what_depends_on_the_prompt_is_refused(method, tmp_path):
    model = recovered(caprese.apply(tiny_llama(), method))
    with pytest.raises(
        caprese.CapreseError, match=f"{method.name} decides anew for each prompt or token.*with method static"
    ):
        caprese.export(model, None, tmp_path / "out")


def test_a_sliding_window_is_refused(tmp_path):
    model = recovered(pruned(tiny("mistral")))
    with pytest.raises(caprese.CapreseError, match="sliding window"):
        caprese.export(model, None, tmp_path / "out")


def test_a_target_in_use_is_left_alone(tmp_path):
    model = recovered(pruned(tiny_llama()))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    with pytest.raises(caprese.CapreseError, match="`overwrite=True`"):
        caprese.export(model, None, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["precious"]
    caprese.export(model, None, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "config.json").exists() and not (tmp_path / "out" / "precious").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]  # nothing half done beside it
    assert len({p.stat().st_mode for p in (tmp_path / "out").iterdir()}) == 1  # others may read all of it


def test_adapters_and_bases_are_not_overwritten(tiny_dir, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_dir, base)
    model, _ = caprese.load_base(str(base))
    model = recovered(caprese.apply(model, caprese.Nothing()))
    caprese.save(model, tmp_path / "run" / "adapter")
    for target in (tmp_path / "run" / "adapter", tmp_path / "run", base):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(caprese.CapreseError, match=r"which `overwrite` does not replace"):
            caprese.export(model, None, target, overwrite=True)
        assert sorted(tmp_path.rglob("*")) == before


def test_what_was_there_stays_if_the_last_step_fails(here, tmp_path, monkeypatch):
    model = recovered(pruned(tiny_llama()))
    caprese.export(model, None, tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    real = os.replace

    def fails(source, target):
        if str(source).endswith("/.out.tmp"):
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(caprese.CapreseError, match="No space left"):
        caprese.export(recovered(pruned(tiny_llama()), seed=7), None, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


def test_the_difference_is_measured_on_what_was_written(here, tmp_path, monkeypatch):
    model = recovered(pruned(tiny_llama()), scale=0.5)
    real = checkpoint.widen

    def wrong(ffn, w, branch, dtype, **how):
        return real(ffn, w, (branch[0], 0 * branch[1], branch[2]), dtype, **how)

    monkeypatch.setattr(checkpoint, "widen", wrong)
    assert caprese.export(model, None, tmp_path / "out")["largest_logit_difference"] > 0.1


def test_what_transformers_alone_cannot_read_is_not_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_READ_BACK", "import caprese_is_not_here")
    with pytest.raises(caprese.CapreseError, match=r"transformers alone does not load.*caprese_is_not_here"):
        caprese.export(recovered(pruned(tiny_llama())), None, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_checkpoints_own_type_is_kept(here, tmp_path):
    tiny_llama().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    model, tokenizer = caprese.load_base(str(tmp_path / "base"))
    assert model.dtype == torch.float32  # as on any CPU
    caprese.export(recovered(caprese.apply(model, caprese.Nothing())), tokenizer, tmp_path / "out")
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}


def test_vllms_llama_class_would_take_it(here, tmp_path):
    """What vllm/model_executor/models/llama.py (0.33) reads of a config, and the names its loader maps."""
    caprese.export(recovered(pruned(tiny("qwen2"))), None, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["hidden_act"] == "silu"
    assert config["mlp_bias"] is True and config["attention_bias"] is True
    assert not {"qkv_bias", "bias", "sliding_window"} & config.keys()
    wanted = {"hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "rms_norm_eps"}
    assert wanted | {"max_position_embeddings", "rope_parameters", "vocab_size", "tie_word_embeddings"} <= config.keys()
    parts = {name.split(".", 3)[3] for name in load_file(tmp_path / "out" / "model.safetensors") if ".layers." in name}
    linear = [*(f"self_attn.{n}_proj" for n in "qkvo"), *(f"mlp.{n}_proj" for n in ("gate", "up", "down"))]
    norms = {"input_layernorm.weight", "post_attention_layernorm.weight"}
    assert parts == {f"{name}.{kind}" for name in linear for kind in ("weight", "bias")} | norms


def test_the_command(tiny_dir, tmp_path):
    sizes = ["--samples", "8", "--max-new-tokens", "6", "--epochs", "0", "--rank", "2", "--prompts"]
    out = str(tmp_path / "out")
    args = ["recover", "--model", str(tiny_dir), *sizes, "gym:simple_equations", "--method", "static:0.3"]
    assert runner.invoke(app, [*args, "--output", out], catch_exceptions=False).exit_code == 0
    args = ["export", out, "--model", str(tiny_dir), "--to", str(tmp_path / "stock"), "--json"]
    planned = json.loads(runner.invoke(app, [*args, "--dry-run"], catch_exceptions=False).stdout)
    assert not (tmp_path / "stock").exists()
    done = json.loads(runner.invoke(app, args, catch_exceptions=False).stdout)
    for key in ("architecture", "ffn_width", "base_ffn_width", "parameters", "base_parameters"):
        assert planned[key] == done[key]
    assert done["largest_logit_difference"] < 1e-4
    card = (tmp_path / "stock" / "README.md").read_text()
    assert "base_model: tiny-llama" in card and str(tmp_path) not in card
    for more in ([], ["--dry-run"]):
        again = runner.invoke(app, [*args, *more])
        assert again.exit_code == 1 and "--overwrite" in again.output


def test_gguf_without_a_converter_says_where_it_comes_from(tmp_path, monkeypatch):
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(caprese.CapreseError, match=r"convert_hf_to_gguf\.py: git clone .*LLAMA_CPP.*make llama-cpp"):
        caprese.export(recovered(pruned(tiny_llama())), None, tmp_path / "out", format="gguf")
    monkeypatch.setenv("LLAMA_CPP", "/no/such")
    with pytest.raises(caprese.CapreseError, match="LLAMA_CPP names /no/such, which has none"):
        caprese.export(recovered(pruned(tiny_llama())), None, tmp_path / "out", format="gguf")


def test_plans_refuse_what_exports_refuse():
    config = tiny("gemma2").config
    with pytest.raises(caprese.CapreseError, match="no biases"):
        plan_export(config, [caprese.Static()], lambda layer: 4)
    assert family_of(tiny("gpt2").config).width == "n_inner"
