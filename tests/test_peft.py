"""A recovery adapter is PEFT's: what PEFT does with adapters works in the slot, or is refused in one line.

Run on the installed PEFT, and by the last test on the oldest that pyproject.toml allows.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from conftest import recovered, tiny_llama
from families import tiny
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from test_phases import prompts
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import caprese
from caprese.adapters import get_branches
from caprese.efficient_methods import RecoverySlot, applied_ffns, cost_of
from caprese.evaluation import variant
from caprese.models import unwrap

ROOT = Path(__file__).parent.parent
METHOD = caprese.Griffin(sparsity=0.5)


def applied(seed: int = 0):
    return caprese.apply(tiny_llama(seed), METHOD)


def adapter(path: Path, seed: int) -> Path:
    """A saved adapter with weights of its own."""
    model = recovered(applied(), scale=0.5, seed=seed)
    caprese.save(model, path)
    return path


@pytest.fixture
def one(tmp_path):
    return adapter(tmp_path / "one", 1)


@pytest.fixture
def two(tmp_path):
    return adapter(tmp_path / "two", 2)


def logits(model, ids, start: int = 2, **more):
    with torch.no_grad(), caprese.phases(model, [start] * len(ids)):
        return model(input_ids=ids, **more).logits


def branch(path: Path) -> dict[str, torch.Tensor]:
    return get_branches(caprese.load(tiny_llama(), path))


def with_branch(weights):
    """The plain reference: a fresh model with these weights in its slots, alone."""
    model = recovered(applied(), seed=9)
    parameters = dict(unwrap(model).named_parameters())
    with torch.no_grad():
        for name, value in weights.items():
            parameters[name].copy_(value)
    return model


def test_from_pretrained_on_an_applied_base(one):
    ids = prompts(9)[0]
    model = PeftModel.from_pretrained(applied(), str(one))
    assert torch.equal(logits(model, ids), logits(caprese.load(tiny_llama(), one), ids))


def test_low_cpu_mem_loading(one):
    ids = prompts(9)[0]
    model = PeftModel.from_pretrained(applied(), str(one), low_cpu_mem_usage=True)
    assert torch.equal(logits(model, ids), logits(caprese.load(tiny_llama(), one), ids))


def test_several_adapters_are_switched_and_disabled(one, two):
    ids = prompts(9)[0]
    model = caprese.load(tiny_llama(), one)
    model.load_adapter(str(two), "two")
    first = logits(model, ids)
    model.set_adapter("two")
    second = logits(model, ids)
    assert torch.equal(first, logits(with_branch(branch(one)), ids))
    assert torch.equal(second, logits(with_branch(branch(two)), ids))
    with model.disable_adapter():
        bare = logits(model, ids)
    assert torch.equal(bare, logits(applied(), ids)) and not torch.allclose(bare, second)
    model.delete_adapter("two")
    model.set_adapter("default")
    assert torch.equal(logits(model, ids), first)


def test_weighted_combinations(one, two):
    ids = prompts(9)[0]
    model = caprese.load(tiny_llama(), one)
    model.load_adapter(str(two), "two")
    model.add_weighted_adapter(["default", "two"], [0.7, 0.3], "cat", combination_type="cat")
    model.add_weighted_adapter(["default", "two"], [0.7, 0.3], "svd", combination_type="svd", svd_rank=8)
    for name in ("cat", "svd"):
        for wrapper in applied_ffns(model).values():
            slot = wrapper.recovery
            deltas = {n: slot.get_delta_weight(n) for n in ("default", "two", name)}
            assert torch.allclose(deltas[name], 0.7 * deltas["default"] + 0.3 * deltas["two"], atol=1e-5)
        model.set_adapter(name)
        mixed = logits(model, ids)
        assert not torch.allclose(mixed, logits(caprese.load(tiny_llama(), one), ids))
    caprese.fuse(model)
    tokens = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
    caprese.unfuse(model)
    assert torch.equal(tokens, model.generate(input_ids=ids, max_new_tokens=6, do_sample=False))


def test_each_row_of_a_batch_with_its_own_adapter(one, two):
    ids = prompts(9)[0].repeat(3, 1)
    model = caprese.load(tiny_llama(), one)
    model.load_adapter(str(two), "two")
    names = ["two", "__base__", "default"]
    together = logits(model, ids, adapter_names=names)
    tokens = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False, adapter_names=names)
    for row, name in enumerate(names):
        alone = applied() if name == "__base__" else caprese.load(tiny_llama(), one if name == "default" else two)
        assert torch.allclose(together[row], logits(alone, ids[:1])[0], atol=1e-5)
        assert torch.equal(tokens[row], alone.generate(input_ids=ids[:1], max_new_tokens=6, do_sample=False)[0])


def test_hot_swap(one, two):
    ids = prompts(9)[0]
    model = caprese.load(tiny_llama(), one, fused=True)
    before = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
    hotswap_adapter(model, str(two), adapter_name="default", torch_device="cpu")
    after = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
    fresh = caprese.load(tiny_llama(), two)
    assert torch.equal(after, fresh.generate(input_ids=ids, max_new_tokens=8, do_sample=False))
    assert not torch.equal(after, before)


@pytest.mark.parametrize(
    "how", [{"use_dora": True}, *({"init_lora_weights": w} for w in ("pissa", "pissa_niter_2", "olora", "corda"))]
)
def test_what_needs_weights_is_refused_in_one_line_and_leaves_the_model_as_it_was(how):
    model = applied()
    with pytest.raises(caprese.CapreseError, match=r"no weights to .*plain LoRA.*caprese\.fuse") as caught:
        get_peft_model(model, LoraConfig(target_modules=["recovery"], r=4, **how))
    assert "\n" not in str(caught.value)
    assert all(type(w.recovery) is RecoverySlot for w in applied_ffns(model).values())
    ids = prompts(9)[0]
    assert torch.equal(logits(model, ids), logits(applied(), ids))


@pytest.mark.parametrize("merge", ["merge_and_unload", "merge_adapter"])
def test_merging_is_refused_and_leaves_the_adapter(one, merge):
    model = caprese.load(tiny_llama(), one)
    ids = prompts(9)[0]
    before = logits(model, ids)
    with pytest.raises(caprese.CapreseError, match=r"merge_and_unload.*caprese\.fuse\(model\)"):
        getattr(model, merge)()
    assert torch.equal(logits(model, ids), before)


def test_other_starts_are_pefts_own_business():
    for how in ({"init_lora_weights": "gaussian"}, {"init_lora_weights": "orthogonal"}, {"use_rslora": True}):
        model = get_peft_model(applied(), LoraConfig(target_modules=["recovery"], r=4, **how))
        for parameter in model.parameters():
            parameter.data += 0.01 * torch.ones_like(parameter)
        ids = prompts(9)[0]
        fused = caprese.fuse(model).generate(input_ids=ids, max_new_tokens=4, do_sample=False)
        caprese.unfuse(model)
        assert torch.equal(model.generate(input_ids=ids, max_new_tokens=4, do_sample=False), fused)


def test_training_goes_on_from_a_loaded_adapter(one, tmp_path):
    model = PeftModel.from_pretrained(applied(), str(one), is_trainable=True)
    ids = prompts(9)[0]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with caprese.phases(model, [2]):
        model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    caprese.save(model, tmp_path / "more")
    assert torch.equal(logits(caprese.load(tiny_llama(), tmp_path / "more"), ids), logits(model, ids))
    assert not torch.allclose(logits(model, ids), logits(caprese.load(tiny_llama(), one), ids))


@pytest.mark.parametrize("method", [METHOD, caprese.Cats(sparsity=0.5), caprese.Nothing()], ids=lambda m: m.name)
def test_a_base_in_nf4(method, tmp_path):
    shape = {"hidden_size": 64, "intermediate_size": 128}
    dense = tiny_llama(**shape)
    dense.save_pretrained(tmp_path / "base")
    caprese.save(recovered(caprese.apply(dense, method)), tmp_path / "adapter")

    def quantised(path: Path):
        bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
        model = AutoModelForCausalLM.from_pretrained(path, quantization_config=bits)
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False  # or its products are in bfloat16
        return model

    model = caprese.load(quantised(tmp_path / "base"), tmp_path / "adapter")
    ids = prompts(9)[0]
    floats = caprese.apply(quantised(tmp_path / "base").dequantize(), method)
    reference = PeftModel.from_pretrained(floats, str(tmp_path / "adapter"))
    assert torch.allclose(logits(model, ids), logits(reference, ids), atol=1e-3)
    with model.disable_adapter():
        bare = logits(model, ids)
    assert not torch.allclose(logits(model, ids), bare)
    tokens = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
    caprese.fuse(model)
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=6, do_sample=False), tokens)
    tiny_llama(1, **shape).save_pretrained(tmp_path / "other")
    with pytest.raises(caprese.CapreseError, match="other weights"):
        caprese.load(quantised(tmp_path / "other"), tmp_path / "adapter")


def tuned(base, targets: list[str] | str, seed: int = 3) -> PeftModel:
    """A base with somebody's LoRA on it."""
    model = get_peft_model(base, LoraConfig(r=3, lora_alpha=6, target_modules=targets, init_lora_weights=False)).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.2, generator=generator)
    return model


def loras(model) -> list[str]:
    return [name for name, _ in model.named_parameters() if ".lora_" in name]


def chosen(model, method):
    rows = [caprese.Tokens(prompts(40)[0].view(2, 20), [6, 9])]
    return caprese.calibrate(model, method, rows) if "samples" in method.learns else None


def dense(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def generated(model, ids):
    return model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)


TARGETS = {
    "llama": ["up_proj", "down_proj", "v_proj"],
    "phi3": ["gate_up_proj", "o_proj"],
    "gpt2": ["c_fc", "c_attn"],
    "opt": ["fc1", "fc2", "out_proj"],
}
READING = [caprese.Static(), caprese.Griffin(score="output"), caprese.Nf4()]
CALLING = [caprese.Griffin(), caprese.Cats(threshold="calibrated"), caprese.Teal(greedy=False)]


@pytest.mark.parametrize("method", CALLING, ids=lambda m: m.name)
@pytest.mark.parametrize("kind", TARGETS)
def test_a_lora_below_acts_as_if_it_were_merged(kind, method):
    ids = prompts(9)[0]
    below, merged = (tuned(tiny(kind), TARGETS[kind]) for _ in range(2))
    merged, names, before = merged.merge_and_unload(), loras(below), dense(below, ids)
    known = chosen(merged, method)
    for name, choice in (chosen(below, method) or {}).items():
        assert torch.allclose(choice, known[name], rtol=1e-3)
    for model in (below, merged):
        caprese.apply(model, method, calibration=known)
    assert torch.allclose(logits(below, ids, 4), logits(merged, ids, 4), atol=1e-3)
    with below.disable_adapter():
        plain = caprese.apply(tiny(kind), method, calibration=known)
        assert torch.allclose(logits(below, ids, 4), logits(plain, ids, 4), atol=1e-3)
    assert caprese.remove(below) is below and loras(below) == names
    assert torch.equal(dense(below, ids), before)


@pytest.mark.parametrize("method", READING, ids=str)
def test_what_reads_rows_refuses_a_lora_below_and_a_later_one(method, tmp_path):
    ids = prompts(9)[0]
    known = chosen(tiny_llama(), method)
    below = tuned(tiny_llama(), ["v_proj", "down_proj"])
    before = dense(below, ids)
    line = rf"{method.name} reads weights by row, and layer 0: mlp\.down_proj carries an adapter .*merge_and_unload"
    with pytest.raises(caprese.CapreseError, match=line):
        caprese.apply(below, method, calibration=known)
    assert torch.equal(dense(below, ids), before) and not applied_ffns(below)
    below.save_pretrained(tmp_path)
    model = caprese.apply(tiny_llama(), method, calibration=known)
    with pytest.raises(caprese.CapreseError, match=line):
        PeftModel.from_pretrained(model, str(tmp_path))


@pytest.mark.parametrize("targets", [["q_proj", "o_proj"], ["gate_proj"], "all-linear"], ids=str)
@pytest.mark.parametrize("method", CALLING, ids=lambda m: m.name)
def test_a_task_lora_beside_the_recovery_adapter(targets, method, tmp_path):
    """It is loaded onto the applied model, also a fused one, and acts as on the plain base; remove takes only ours."""
    ids = prompts(9)[0]
    known = chosen(tiny_llama(), method)
    tuned(tiny_llama(), targets).save_pretrained(tmp_path / "task")
    merged = tuned(tiny_llama(), targets).merge_and_unload()
    ours = recovered(caprese.apply(tiny_llama(), method, calibration=known), scale=0.5, seed=1)
    caprese.save(ours, tmp_path / "ours")
    alone = generated(ours, ids)

    model = caprese.load(tiny_llama(), tmp_path / "ours", fused=True)
    generated(model, ids)
    model.load_adapter(str(tmp_path / "task"), "task")
    model.base_model.set_adapter(["default", "task"])
    reference = recovered(caprese.apply(merged, method, calibration=known), scale=0.5, seed=1)
    assert torch.allclose(logits(model, ids, 4), logits(reference, ids, 4), atol=1e-3)
    assert torch.equal(generated(model, ids), generated(reference, ids))
    assert torch.equal(generated(caprese.fuse(model), ids), generated(reference, ids))

    caprese.save(model, tmp_path / "again")
    saved = caprese.load(tiny_llama(), tmp_path / "again")
    assert torch.equal(generated(saved, ids), alone)

    assert caprese.remove(model) is model
    assert loras(model) and not any(".recovery." in name for name in loras(model))
    assert torch.allclose(dense(model, ids), dense(caprese.remove(reference), ids), atol=1e-4)
    assert torch.equal(dense(model.unload(), ids), dense(tiny_llama(), ids))


def test_a_task_lora_that_comes_and_goes():
    ids = prompts(9)[0]
    model = applied()
    before = generated(model, ids)
    task = tuned(model, ["q_proj", "up_proj"])
    assert not torch.equal(generated(task, ids), before)
    with task.disable_adapter():
        assert torch.equal(generated(task, ids), before)
    assert torch.equal(generated(task.unload(), ids), before)
    merged = tuned(tiny_llama(), ["q_proj", "up_proj"]).merge_and_unload()
    ours = tuned(model, ["q_proj", "up_proj"]).merge_and_unload()
    assert torch.equal(generated(ours, ids), generated(caprese.apply(merged, METHOD), ids))


@pytest.mark.parametrize("part", ["fc1", "fc2"])
def test_parts_on_the_decoder_layer_itself_take_a_lora_only_before(part):
    model = caprese.apply(tiny("opt"), METHOD)
    with pytest.raises(ValueError, match=r"an adapter goes on it before caprese\.apply"):
        tuned(model, [part])


def test_a_recovery_adapter_goes_on_first(one):
    below = tuned(tiny_llama(), ["v_proj"])
    line = r"carries an adapter already \(model\.layers\.0\.self_attn\.v_proj\).*merge it"
    with pytest.raises(caprese.CapreseError, match=line):
        caprese.load(below, one)
    with pytest.raises(caprese.CapreseError, match=line):
        recovered(caprese.apply(below, METHOD))
    assert loras(below)


def test_an_adapter_is_no_model_of_its_own(one, tmp_path):
    """transformers loads the base, finds no slot in it and says so, rather than run it dense."""
    tiny_llama().save_pretrained(tmp_path / "base")
    config = one / "adapter_config.json"
    config.write_text(re.sub(r'("base_model_name_or_path": )"[^"]*"', rf'\1"{tmp_path / "base"}"', config.read_text()))
    with pytest.raises(ValueError, match="recovery"):
        peft.AutoPeftModelForCausalLM.from_pretrained(str(one))
    # transformers' own integration wants a newer PEFT than our oldest
    with pytest.raises((ValueError, ImportError), match=r"recovery|peft"):
        AutoModelForCausalLM.from_pretrained(str(one))
    with pytest.raises(caprese.CapreseError, match=r"is a recovery adapter, not a model.*`adapter`"):
        caprese.load_base(str(one))


@pytest.mark.slow
def test_on_the_oldest_supported_peft(tmp_path):
    oldest = re.search(r'"peft>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())[1]
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path)]
    done = subprocess.run([*pip, f"peft=={oldest}.0"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    files = [str(ROOT / "tests" / name) for name in ("test_peft.py", "test_adapters.py")]
    which = ["-k", "not oldest", "-p", "no:cacheprovider", "-p", "no:xdist"]
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    run = [sys.executable, "-m", "pytest", "-q", *files, *which]
    done = subprocess.run(run, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:]
    look = [sys.executable, "-c", "import peft; print(peft.__version__)"]
    assert subprocess.run(look, capture_output=True, text=True, env=env).stdout.strip() == f"{oldest}.0"


def test_a_tasks_adapter_is_no_branch():
    """It is not counted as one, and stays on where the branches are off."""
    model = recovered(caprese.apply(tiny_llama(), caprese.Griffin(sparsity=0.5)))
    alone = cost_of(model).adapter
    assert alone == sum(p.numel() for n, p in model.named_parameters() if ".recovery.lora_" in n)
    model.add_adapter("task", LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "task"])
    assert cost_of(model).adapter == alone
    ids = prompts(7)[0]
    with variant(model, "dense"):
        dense = model(ids).logits
    with variant(model, "efficient"):
        assert torch.equal(model(ids).logits, dense)  # a prompt: the task's adapter is in both
        with caprese.phases(model, [3]):
            efficient = model(ids).logits
    with caprese.phases(model, [3]):
        assert not torch.equal(model(ids).logits, efficient)
