"""What an engine's plugin computes: GRIFFIN and its branch by rows of a batch, against the applied model."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import recovered, tiny_llama
from hypothesis import given
from hypothesis import strategies as st
from test_gguf import PROMPTS
from torch import nn

import caprese
from caprese.adapters import Adapter, fingerprint
from caprese.efficient_methods import Griffin
from caprese.models import FAMILIES, FFN
from caprese.serving.spans import Layer, spans_of

HERE = Path(__file__).parent.parent / ".venv-vllm" / "bin" / "python"
PYTHON = os.environ.get("CAPRESE_VLLM_PYTHON") or str(HERE)


def served(model: nn.Module, number: int, rank: int = 4) -> tuple[Layer, Any]:
    """A layer of the plugin on one FFN of a dense model, and that FFN."""
    mlp = model.model.layers[number].mlp
    parts = nn.Module()
    parts.gate_up_proj = nn.Linear(32, 192, bias=False)
    parts.gate_up_proj.weight = nn.Parameter(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]), False)
    parts.down_proj, parts.activation_fn = mlp.down_proj, mlp.act_fn
    torch.manual_seed(number)
    branch = 0.1 * torch.randn(rank, 32), 0.1 * torch.randn(32, rank), torch.randn(32)
    return Layer(Griffin(sparsity=0.5), FFN(parts, FAMILIES["phi3"]), branch), mlp


def expected(layer: Layer, mlp: Any, x: torch.Tensor, prompt: int) -> torch.Tensor:
    """In float64, by the paper: x [T, D] of one sequence whose first `prompt` tokens are its prompt."""
    gate, up, down = (w.weight.double() for w in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    z = nn.functional.silu(x.double() @ gate.T) * (x.double() @ up.T)
    score = (z[:prompt] / z[:prompt].norm(dim=1, keepdim=True)).norm(dim=0)
    keep = torch.zeros(len(score), dtype=torch.bool)
    keep[score.topk(len(score) // 2).indices] = True
    first, second, bias = (t.double() for t in layer.branch if t is not None)
    out = z @ down.T
    out[prompt:] = (z[prompt:] * keep) @ down.T + x[prompt:].double() @ first.T @ second.T + bias
    return out


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 6)), min_size=1, max_size=4),
    st.lists(st.integers(1, 5), min_size=40, max_size=40),
    st.booleans(),
)
def test_rows_of_any_batch_are_what_each_request_alone_gives(requests, chunks, preempted):
    """Requests (prompt, generated tokens) pass in chunks of any size, beside each other, and some once more."""
    layer, mlp = served(tiny_llama(), 1)
    torch.manual_seed(len(chunks))
    x = [torch.randn(prompt + new, 32) for prompt, new in requests]
    want = [expected(layer, mlp, rows, prompt) for rows, (prompt, _) in zip(x, requests, strict=True)]
    done, sizes, again = [0] * len(requests), iter(chunks * 40), preempted
    while any(at < len(rows) for at, rows in zip(done, x, strict=True)):
        batch = [(i, min(next(sizes), len(x[i]) - done[i])) for i in range(len(x)) if done[i] < len(x[i])]
        spans = spans_of((str(i), rows, done[i], requests[i][0]) for i, rows in batch)
        padding = torch.zeros(2, 32)
        out = layer.forward(torch.cat([*(x[i][done[i] : done[i] + rows] for i, rows in batch), padding]), spans)
        at = 0
        for i, rows in batch:
            torch.testing.assert_close(
                out[at : at + rows].double(), want[i][done[i] : done[i] + rows], atol=2e-5, rtol=2e-4
            )
            done[i] += rows
            at += rows
        assert not out[at:].any()
        if again and done[0] > requests[0][0]:  # its keys were taken: prompt and generated tokens pass again
            done[0], again = 0, False
        layer.forget([str(i) for i in range(len(x)) if done[i] < len(x[i])])
    assert not layer.known


def test_one_reads_its_own_rows_and_many_the_whole():
    layer, _ = served(tiny_llama(), 0)
    layer.forward(torch.randn(6, 32), spans_of([("a", 3, 0, 3), ("b", 3, 0, 3)]))
    layer.forward(torch.randn(1, 32), spans_of([("a", 1, 3, 3)]))
    assert layer.known["a"].packed is not None and layer.known["a"].packed.width == 48
    layer.forward(torch.randn(2, 32), spans_of([("a", 1, 4, 3), ("b", 1, 3, 3)]))
    assert layer.known["a"].packed is layer.known["b"].packed is None


def test_a_prompt_that_was_not_seen_is_refused():
    layer, _ = served(tiny_llama(), 0)
    for requests in ([("a", 1, 7, 7)], [("a", 2, 4, 8)]):
        with pytest.raises(RuntimeError, match="from a prompt that was not seen here.*--no-enable-prefix-caching"):
            layer.forward(torch.randn(2, 32), spans_of(requests))


def test_without_vllm_the_plugin_is_one_import(monkeypatch):
    """vLLM calls it in every process, several times."""
    known: dict[str, str] = {}

    class ModelRegistry:
        get_supported_archs = staticmethod(lambda: set(known))
        register_model = staticmethod(known.__setitem__)

    monkeypatch.setitem(__import__("sys").modules, "vllm", type("vllm", (), {"ModelRegistry": ModelRegistry}))
    from caprese.serving import register

    register(), register()
    assert known == {"CapreseLlamaForCausalLM": "caprese.serving.vllm:CapreseLlamaForCausalLM"}


# greedy continuations of each prompt alone, then of all at once
ASK = """
import json, os, sys
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt
path, adapter, asked, out, more = sys.argv[1:]
asked, settings = json.load(open(asked)), {"enable_prefix_caching": False, "kv_cache_memory_bytes": 1 << 28}
settings |= {"worker_cls": "caprese.serving.vllm.Worker", "enforce_eager": True, "disable_log_stats": False}
settings |= json.loads(more)
overrides = {"architectures": ["CapreseLlamaForCausalLM"], "caprese_adapter": adapter}
engine = LLM(path, skip_tokenizer_init=True, max_model_len=256, dtype="float32", hf_overrides=overrides, **settings)
how = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False)
prompts = [TokensPrompt(prompt_token_ids=ids) for ids in asked]
alone = [list(engine.generate([p], how)[0].outputs[0].token_ids) for p in prompts]
together = [list(request.outputs[0].token_ids) for request in engine.generate(prompts, how)]
preempted = sum(m.value for m in engine.get_metrics() if m.name == "vllm:num_preemptions")
json.dump([alone, together, preempted], open(out, "w"))
"""


@pytest.fixture(scope="module")
def griffin(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, list[list[int]], list[list[int]]]:
    """SmolLM2 with GRIFFIN and a branch that does something: its adapter, its base, eight prompts, their answers."""
    base, tokenizer = caprese.load_base("smollm2-135m", dtype="float32")
    directory = tmp_path_factory.mktemp("adapters") / "griffin"
    model = recovered(caprese.apply(base, Griffin(sparsity=0.5)), 8, 0.02)
    caprese.save(model, directory)
    asked = [tokenizer(prompt).input_ids for prompt in [*PROMPTS, *("And " + prompt for prompt in PROMPTS)][:8]]
    asked[0] = (asked[0] * 40)[:150]  # some chunks long
    answers = []
    for ids in asked:
        out = model.generate(input_ids=torch.tensor([ids]), max_new_tokens=24, do_sample=False, eos_token_id=None)
        answers.append(out[0, len(ids) :].tolist())
    source = caprese.models.base_of(base).source
    return directory, source, asked, answers


def ask(griffin: Any, tmp_path: Path, base: str | None = None, **settings: object) -> Any:
    directory, source, asked, _ = griffin
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    files = [str(tmp_path / "asked.json"), str(tmp_path / "found.json"), json.dumps(settings)]
    command = [PYTHON, "-c", ASK, base or source, str(directory), *files]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not Path(PYTHON).exists(), reason="make vllm")
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_num_batched_tokens": 32, "max_num_seqs": 8, "enable_chunked_prefill": True},  # prompts in chunks
        {"num_gpu_blocks_override": 9, "block_size": 32, "max_num_seqs": 8},  # some are preempted
    ],
)
def test_vllm_says_what_caprese_says(griffin, settings, tmp_path):
    done = ask(griffin, tmp_path, **settings)
    assert done.returncode == 0, done.stderr[-3000:]
    alone, together, preempted = json.loads((tmp_path / "found.json").read_text())
    assert alone == griffin[3] and together == griffin[3]
    assert bool(preempted) == ("num_gpu_blocks_override" in settings)


@pytest.mark.slow
@pytest.mark.skipif(not Path(PYTHON).exists(), reason="make vllm")
@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"enable_prefix_caching": True}, "wants no cached prompts; give --no-enable-prefix-caching"),
        ({"worker_cls": "auto"}, "wants its own worker; give --worker-cls caprese.serving.vllm.Worker"),
        ({"enforce_eager": False}, "wants no compilation; give --enforce-eager"),
    ],
)
def test_what_it_does_not_go_with_is_refused(griffin, settings, line, tmp_path):
    done = ask(griffin, tmp_path, **settings)
    assert done.returncode and line in done.stderr + done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not Path(PYTHON).exists(), reason="make vllm")
def test_another_base_is_refused(griffin, tmp_path):
    base, tokenizer = caprese.load_base("smollm2-135m", dtype="float32")
    base.model.layers[3].mlp.down_proj.weight.data.mul_(1.5)
    base.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    done = ask(griffin, tmp_path, str(tmp_path / "other"))
    assert done.returncode and "has other weights (ffn); serve that base" in " ".join(
        (done.stderr + done.stdout).split()
    )


def test_a_fingerprint_is_the_same_from_a_checkpoint(tmp_path):
    """As the plugin takes it, of names and tensors as they are stored."""
    from safetensors.torch import load_file

    from caprese.adapters import Fingerprint
    from caprese.adapters.fingerprint import noted

    model = tiny_llama()
    model.save_pretrained(tmp_path)
    found = Fingerprint()
    stored = load_file(tmp_path / "model.safetensors")
    asked = {**stored, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    assert dict(noted(asked.items(), False, found)).keys() == asked.keys()
    assert found.digests() == fingerprint(model)
    caprese.save(recovered(caprese.apply(model, Griffin())), tmp_path / "out")
    assert Adapter.open(tmp_path / "out").sidecar.base.fingerprint == found.digests()
