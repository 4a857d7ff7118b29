"""The fused decode step: the same tokens as unfused, in every family, with every method, compiled too."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import recovered
from families import tiny
from transformers import CompileConfig, DynamicCache, StaticCache

import caprese
from caprese.adapters import attach_adapter, branch_parameters
from caprese.efficient_methods import Tokens, applied_ffns, calibrate, make_method, needs_calibration, parse_methods
from caprese.inference import is_fused
from caprese.models import FAMILIES

METHODS = [
    "griffin:0.5",
    "griffin:0.5:shared_choice=true",
    "cats:0.5",
    "cats:0.5:threshold=calibrated",
    "teal:0.4:greedy=false",
    "static:0.3",
    "static:0.3+cats:0.5",
    "static:0.3+griffin:0.5",
    "griffin:0.5+cats:0.5",
    "griffin:0.5+teal:0.4:where=attention:greedy=false",
    "nf4",
    "q8:head=true",
    "griffin:0.5+q8",
    "griffin:0.5+q4:head=true",
    "static:0.3+q4",
    "cats:0.5+q8:where=ffn",
    "static:0.3+griffin:0.5+q4:where=ffn+q8:where=attention",
    "none",
]
PROMPT = torch.randint(2, 258, (1, 9), generator=torch.Generator().manual_seed(0))
PADDED = torch.randint(2, 258, (3, 9), generator=torch.Generator().manual_seed(1))


def applied(kind: str, spec: str, *, bias: bool = True, rank: int = 3, adapter: bool = True) -> Any:
    model = tiny(kind)
    methods = [make_method(facts) for facts in parse_methods(spec)]
    calibration = None
    if needs_calibration(methods):
        ids = torch.randint(2, 258, (4, 20), generator=torch.Generator().manual_seed(2))
        calibration = calibrate(model, methods, [Tokens(ids, torch.full((4,), 8))])
    caprese.apply(model, methods, calibration=calibration)
    if not adapter:
        return model
    return recovered(model, rank, 0.2, bias)


def answer(model: Any, ids: torch.Tensor, **how: Any) -> torch.Tensor:
    """Scores of every generated token, [B, n, V]."""
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **how}
    mask = torch.ones_like(ids)
    if len(ids) > 1:
        mask[1, :4] = 0
    out = model.generate(
        input_ids=ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **settings
    )
    return torch.stack(out.logits, 1)


def same(a: torch.Tensor, b: torch.Tensor, within: float = 2e-5) -> None:
    assert a.shape == b.shape
    assert (a - b).abs().max() <= within * b.abs().max()


@pytest.mark.parametrize("spec", METHODS)
@pytest.mark.parametrize("kind", FAMILIES)
def test_fused_is_unfused(kind: str, spec: str) -> None:
    model = applied(kind, spec)
    for ids in (PROMPT, PADDED):
        before = answer(model, ids)
        caprese.fuse(model)
        assert is_fused(model)
        same(answer(model, ids), before)
        caprese.unfuse(model)
        assert not is_fused(model)
        assert torch.equal(answer(model, ids), before)


def test_the_branch_matters() -> None:
    model = applied("llama", "griffin:0.5")
    caprese.fuse(model)
    with_branch = answer(model, PROMPT)
    with model.disable_adapter():
        without = answer(model, PROMPT)
    assert (with_branch - without).abs().max() > 0.1 * without.abs().max()
    same(answer(model, PROMPT), with_branch)


def test_in_inference_mode() -> None:
    """A model that is made there, whose tensors count no changes."""
    before = answer(applied("llama", "griffin:0.5"), PROMPT)
    with torch.inference_mode():
        model = applied("llama", "griffin:0.5")
        caprese.fuse(model)
        same(answer(model, PROMPT), before)


def test_follows_the_adapter() -> None:
    """Another adapter, two at once, other weights, none: fused is what unfused would be."""
    model = applied("llama", "griffin:0.5", rank=2)
    other = copy.deepcopy(model.peft_config["default"])
    other.r = other.lora_alpha = 4
    model.add_adapter("other", other)
    for parameter in branch_parameters(model):
        parameter.data.normal_(0, 0.2)
    results = []
    for fused in (False, True):
        (caprese.fuse if fused else caprese.unfuse)(model)
        seen = []
        model.set_adapter("other")
        seen.append(answer(model, PROMPT))
        model.base_model.set_adapter(["default", "other"])
        seen.append(answer(model, PROMPT))
        model.set_adapter("default")
        seen.append(answer(model, PROMPT))
        with torch.no_grad():
            for wrapper in applied_ffns(model).values():
                wrapper.recovery.lora_B["default"].weight.mul_(2)
        seen.append(answer(model, PROMPT))
        with torch.no_grad():
            for wrapper in applied_ffns(model).values():
                wrapper.recovery.lora_B["default"].weight.div_(2)
        results.append(seen)
    for unfused, fused in zip(*results, strict=True):
        same(fused, unfused)
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(results[0], results[0][1:], strict=False))


def test_a_batch_of_several_adapters_runs_unfused() -> None:
    model = applied("llama", "griffin:0.5", rank=2)
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    for parameter in branch_parameters(model):
        parameter.data.normal_(0, 0.2)
    names = ["default", "other", "default"]
    before = answer(model, PADDED, adapter_names=names)
    caprese.fuse(model)
    assert torch.equal(answer(model, PADDED, adapter_names=names), before)


def test_two_caches_take_turns() -> None:
    """Two interleaved generations, each with its own choice."""
    model = applied("llama", "griffin:0.5")
    prompts = [PROMPT, PROMPT.flip(1)]
    token = torch.tensor([[7]])

    def turns() -> list[torch.Tensor]:
        caches = [DynamicCache(), DynamicCache()]
        with torch.no_grad():
            for ids, cache in zip(prompts, caches, strict=True):
                model(input_ids=ids, past_key_values=cache)
            return [model(input_ids=token, past_key_values=caches[i % 2]).logits for i in range(6)]

    before = turns()
    caprese.fuse(model)
    for a, b in zip(turns(), before, strict=True):
        same(a, b)


def test_reselection_and_a_second_turn() -> None:
    model = applied("llama", "griffin:0.5")

    def talk() -> torch.Tensor:
        cache = DynamicCache()
        with torch.no_grad(), caprese.reselection(model, 3):
            first = model.generate(
                input_ids=PROMPT, past_key_values=cache, max_new_tokens=8, do_sample=False, pad_token_id=0
            )
            more = torch.cat([first, PROMPT], 1)
            return answer(model, more, past_key_values=cache)

    before = talk()
    caprese.fuse(model)
    same(talk(), before)


def test_gradients_run_unfused() -> None:
    model = applied("llama", "griffin:0.5")
    caprese.fuse(model)
    with torch.no_grad():
        cache = model(input_ids=PROMPT, use_cache=True).past_key_values
    model(input_ids=torch.tensor([[7]]), past_key_values=cache).logits.sum().backward()
    assert all(p.grad is not None for p in branch_parameters(model))


def test_a_copy_is_on_its_own() -> None:
    """A deep copy of an applied, fused model prefills, decodes and hooks into itself."""
    model = applied("llama", "griffin:0.5+teal:0.4:where=attention:greedy=false")
    caprese.fuse(model)
    before = answer(model, PROMPT)
    twin = copy.deepcopy(model)
    same(answer(twin, PROMPT), before)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0.5)
    expected = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter.mul_(0.5)
    changed = answer(twin, PROMPT)
    assert torch.equal(changed, answer(expected, PROMPT)) and (changed - before).abs().max() > 0.1
    cache = DynamicCache()
    with torch.no_grad():
        same(changed[:, 0], twin(input_ids=PROMPT, past_key_values=cache).logits[:, -1])
    caprese.remove(twin)
    same(answer(model, PROMPT), before)
    caprese.remove(model)


def test_remove_undoes_fuse() -> None:
    model = tiny("llama")
    before = answer(model, PROMPT)
    caprese.fuse(caprese.apply(model, caprese.Griffin()))
    caprese.remove(model)
    assert torch.equal(answer(model, PROMPT), before)


def test_nothing_to_fuse() -> None:
    with pytest.raises(caprese.CapreseError, match=r"nothing to fuse.*caprese\.apply"):
        caprese.fuse(tiny("llama"))
    with pytest.raises(caprese.CapreseError, match="no form 'fast'"):
        caprese.fuse(applied("llama", "griffin:0.5"), "fast")  # type: ignore[arg-type]


INDEXED = [
    "griffin:0.5",
    "griffin:0.5:shared_choice=true",
    "cats:0.5",
    "teal:0.4:where=ffn:greedy=false",
    "static:0.3+griffin:0.5",
    "static:0.3+cats:0.5",
]


@pytest.mark.parametrize("triton", [True, False], ids=["triton", "here"])
@pytest.mark.parametrize("spec", INDEXED)
@pytest.mark.parametrize("kind", ["llama", "gemma2", "phi3", "gpt_neox", "opt", "gpt2"])
def test_indexed_is_unfused(kind: str, spec: str, triton: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the references of Triton's kernels, and as a CPU runs it; families it does not fit keep another form."""
    if triton:
        monkeypatch.setattr("caprese.kernels.triton_runs", lambda device: True)
    model = applied(kind, spec)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    strides = {name: p.stride() for name, p in model.named_parameters()}
    for ids in (PROMPT, PADDED):
        before = answer(model, ids)
        caprese.fuse(model, "indexed")
        same(answer(model, ids), before)
        assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
        caprese.unfuse(model)
        assert torch.equal(answer(model, ids), before)
    assert {name: p.stride() for name, p in model.named_parameters()} == strides


def test_indexed_holds_no_second_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("caprese.kernels.triton_runs", lambda device: True)
    model = applied("llama", "griffin:0.5", rank=2)
    sizes = {}
    for form in ("packed", "indexed"):
        caprese.fuse(model, form)
        answer(model, PROMPT)
        sizes[form] = sum(w.fused.nbytes for w in applied_ffns(model).values())
    ffn = sum(p.nbytes for n, p in model.named_parameters() if "mlp" in n and "lora" not in n)
    assert sizes["packed"] > 0.45 * ffn and sizes["indexed"] < 0.1 * ffn


def test_indexed_needs_a_gpu_or_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    monkeypatch.setattr("caprese.kernels.quantized.native.library", lambda: None)
    with pytest.raises(caprese.CapreseError, match="needs Triton and a GPU, or a C compiler"):
        caprese.fuse(applied("llama", "griffin:0.5"), "indexed")


@pytest.mark.slow
def test_indexed_in_the_interpreter(tmp_path: Path) -> None:
    """The kernels themselves under a whole model, interpreted, in a process where Triton knows early."""
    pytest.importorskip("triton")
    script = """
import sys; sys.path.insert(0, sys.argv[1])
import test_fused as t
for spec in ("griffin:0.5", "cats:0.5", "teal:0.4:where=ffn:greedy=false"):
    model = t.applied("llama", spec)
    for ids in (t.PROMPT, t.PADDED):
        before = t.answer(model, ids, max_new_tokens=4)
        t.caprese.fuse(model, "indexed")
        t.same(t.answer(model, ids, max_new_tokens=4), before)
        t.caprese.unfuse(model)
print("same")
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(Path(__file__).parent)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "same" in done.stdout, done.stderr[-2000:]


COMPILE = CompileConfig(fullgraph=True, mode="default")
COMPILE._compile_all_devices = True


@pytest.mark.parametrize(
    ("spec", "prompt"),
    [
        ("griffin:0.5", PROMPT),
        ("cats:0.5", PROMPT),
        ("static:0.3", PROMPT),
        ("griffin:0.5+teal:0.4:where=attention", PROMPT),
        ("griffin:0.5+q8:head=true", PROMPT),
        ("griffin:0.5+q4", PADDED),
        ("griffin:0.5", PADDED),
        ("griffin:0.8", PADDED),  # a union of three that is less than all
        ("griffin:0.5:shared_choice=true", PADDED),
    ],
)
def test_compiled_decode_without_breaks_or_recompilation(spec: str, prompt: torch.Tensor) -> None:
    """generate with a static cache compiles the decode step once; new prompts, and so new choices, reuse it."""
    torch._dynamo.reset()
    model = applied("llama", spec)
    how = {"cache_implementation": "static", "max_new_tokens": 6}
    prompts = [prompt, prompt.flip(1), prompt.roll(3, 1), (prompt * 3 + 1) % 256 + 2]
    before = [answer(model, ids, **how) for ids in prompts]
    caprese.fuse(model)
    counters = torch._dynamo.utils.counters
    same(answer(model, prompts[0], compile_config=COMPILE, **how), before[0])
    counters.clear()
    for ids, expected in zip(prompts[1:], before[1:], strict=True):
        with torch.compiler.set_stance("fail_on_recompile"):
            same(answer(model, ids, compile_config=COMPILE, **how), expected)
    assert not counters["graph_break"] and not counters["stats"]["unique_graphs"]


def test_compiled_with_reselection() -> None:
    """The dense pass is made between two runs of the compiled step."""
    torch._dynamo.reset()
    model = applied("llama", "griffin:0.5")
    how = {"cache_implementation": "static", "max_new_tokens": 9}
    with caprese.reselection(model, 3):
        before = answer(model, PROMPT, **how)
        caprese.fuse(model)
        same(answer(model, PROMPT, compile_config=COMPILE, **how), before)


def test_compiled_unfused_runs_eager() -> None:
    torch._dynamo.reset()
    model = applied("llama", "griffin:0.5")
    how = {"cache_implementation": "static", "max_new_tokens": 6}
    assert torch.equal(answer(model, PROMPT, compile_config=COMPILE, **how), answer(model, PROMPT, **how))


def test_static_caches_take_turns_compiled() -> None:
    torch._dynamo.reset()
    model = applied("llama", "griffin:0.5", adapter=False)
    prompts = [PROMPT, PROMPT.flip(1)]
    token = torch.tensor([[7]])

    def turns(config: Any) -> list[torch.Tensor]:
        caches = [StaticCache(model.config, max_cache_len=32) for _ in prompts]
        step = model if config is None else model.get_compiled_call(config)
        with torch.no_grad():
            for ids, cache in zip(prompts, caches, strict=True):
                model(input_ids=ids, past_key_values=cache)
            return [step(input_ids=token, past_key_values=caches[i % 2]).logits.clone() for i in range(6)]

    before = turns(None)
    caprese.fuse(model)
    for a, b in zip(turns(COMPILE), before, strict=True):
        same(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["griffin:0.5", "griffin:0.5+q8:head=true", "griffin:0.5+q4:head=true"])
def test_same_text_on_smollm2(spec: str) -> None:
    """32 prompts, 64 tokens each, float32: to the token."""
    import reasoning_gym

    model, tokenizer = caprese.load_base("smollm2-135m", dtype="float32")
    methods = [make_method(facts) for facts in parse_methods(spec)]
    model = attach_adapter(caprese.apply(model, methods), 32)
    torch.manual_seed(0)
    for parameter in branch_parameters(model):
        parameter.data.normal_(0, 0.005)
    data = reasoning_gym.create_dataset("gsm_symbolic", size=32, seed=0)
    how: dict[str, Any] = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False, "pad_token_id": 0}
    for row in data:
        ids = tokenizer(row["question"], return_tensors="pt").input_ids
        before = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **how)
        caprese.fuse(model)
        after = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **how)
        caprese.unfuse(model)
        assert torch.equal(after, before)


def test_follows_the_adapter_within_a_generation() -> None:
    """Bias and weights that change between two tokens."""
    model = applied("llama", "griffin:0.5")

    def talk() -> list[torch.Tensor]:
        cache = DynamicCache()
        with torch.no_grad():
            model(input_ids=PROMPT, past_key_values=cache)
            seen = [model(input_ids=torch.tensor([[7]]), past_key_values=cache).logits]
            for wrapper in applied_ffns(model).values():
                wrapper.recovery.lora_B["default"].bias.add_(1)
            seen.append(model(input_ids=torch.tensor([[7]]), past_key_values=cache).logits)
            for wrapper in applied_ffns(model).values():
                wrapper.recovery.lora_B["default"].bias.sub_(1)
                layer = wrapper.recovery.lora_B["default"]
                layer.weight.data = layer.weight.data * 3
            seen.append(model(input_ids=torch.tensor([[7]]), past_key_values=cache).logits)
            for wrapper in applied_ffns(model).values():
                layer = wrapper.recovery.lora_B["default"]
                layer.weight.data = layer.weight.data / 3
        return seen

    before = talk()
    caprese.fuse(model)
    for a, b in zip(talk(), before, strict=True):
        same(a, b)


def test_thresholds_keep_their_precision() -> None:
    """bfloat16: a neuron at the threshold is kept fused as it is unfused."""
    model = caprese.apply(tiny("llama", torch.bfloat16), caprese.Cats(sparsity=0.5))
    for seed in range(6):
        ids = torch.randint(2, 258, (1, 9), generator=torch.Generator().manual_seed(seed))
        before = answer(model, ids, max_new_tokens=2)
        caprese.fuse(model, "packed")
        assert torch.equal(answer(model, ids, max_new_tokens=2), before)
        caprese.unfuse(model)


def test_a_cache_that_is_reset_starts_afresh() -> None:
    torch._dynamo.reset()
    model = applied("llama", "griffin:0.5", adapter=False)
    caprese.fuse(model)
    cache = StaticCache(model.config, max_cache_len=32)
    step = model.get_compiled_call(COMPILE)
    token = torch.tensor([[7]])
    with torch.no_grad():
        model(input_ids=PROMPT, past_key_values=cache)
        step(input_ids=token, past_key_values=cache)
        cache.reset()
        step(input_ids=token, past_key_values=cache)  # a prompt of one token
        again = step(input_ids=token, past_key_values=cache).logits
        other = StaticCache(model.config, max_cache_len=32)
        model(input_ids=token, past_key_values=other)
        expected = model(input_ids=token, past_key_values=other).logits
    same(again, expected)


def test_dense_steps_between_compiled_ones() -> None:
    torch._dynamo.reset()
    model = applied("llama", "griffin:0.5", adapter=False)
    caprese.fuse(model)
    token = torch.tensor([[7]])

    def talk(compiled: bool) -> list[torch.Tensor]:
        cache = StaticCache(model.config, max_cache_len=32)
        step = model.get_compiled_call(COMPILE) if compiled else model
        with torch.no_grad():
            model(input_ids=PROMPT, past_key_values=cache)
            step(input_ids=token, past_key_values=cache)
            with caprese.dense(model):
                for _ in range(3):
                    model(input_ids=token, past_key_values=cache)
            with caprese.reselection(model, 2):
                return [step(input_ids=token, past_key_values=cache).logits.clone() for _ in range(5)]

    for a, b in zip(talk(True), talk(False), strict=True):
        same(a, b)
