"""On a GPU: every form of a fused step gives what unfused gives, compiled with CUDA graphs too; hybrids as on a CPU;
lossless generation the dense model's text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import recovered, tiny_llama

import caprese
from caprese.efficient_methods import Tokens, calibrate, needs_calibration
from caprese.inference import is_fused

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

METHODS = {
    "griffin:0.5": ["packed", "indexed"],
    "griffin:0.5:shared_choice=true": ["packed", "indexed"],
    "cats:0.5": ["packed", "indexed"],
    "teal:0.4:where=ffn:greedy=false": ["packed", "indexed"],
    "static:0.3": ["packed", "indexed"],
    "static:0.3+griffin:0.5": ["packed", "indexed"],
    "q8:head=true": ["packed"],
    "q4": ["packed"],
    "griffin:0.5+q8": ["packed"],
    "griffin:0.5:shared_choice=true+q4:head=true": ["packed"],
    "cats:0.5+q8:where=ffn": ["packed"],
}


def prompts(batch: int) -> torch.Tensor:
    return torch.randint(2, 258, (batch, 9), generator=torch.Generator().manual_seed(batch)).cuda()


def applied(spec: str, dtype: torch.dtype = torch.float32) -> Any:
    model = tiny_llama(hidden_size=64, intermediate_size=128).to("cuda", dtype)
    methods = caprese.resolve_recipe(method=spec).methods
    calibration = None
    if needs_calibration(methods):
        ids = torch.randint(2, 258, (4, 20), generator=torch.Generator().manual_seed(2)).cuda()
        calibration = calibrate(model, methods, [Tokens(ids, torch.full((4,), 8).cuda())])
    caprese.apply(model, methods, calibration=calibration)
    return recovered(model, 4, 0.2)


def answer(model: Any, ids: torch.Tensor, **how: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and scores of a greedy answer."""
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=12,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
        **how,
    )
    return out.sequences, torch.stack(out.logits, 1)


@pytest.mark.parametrize("batch", [1, 3, 20])
@pytest.mark.parametrize(("spec", "form"), [(spec, form) for spec, forms in METHODS.items() for form in forms])
def test_fused_is_unfused(spec: str, form: Any, batch: int) -> None:
    model, ids = applied(spec), prompts(batch)
    tokens, scores = answer(model, ids)
    caprese.fuse(model, form)
    assert is_fused(model)
    got, fused = answer(model, ids)
    assert torch.equal(got, tokens)
    assert (fused - scores).abs().max() <= 1e-4 * scores.abs().max()
    caprese.unfuse(model)
    assert torch.equal(answer(model, ids)[0], tokens)


@pytest.mark.parametrize("spec", METHODS)
def test_compiled_is_eager(spec: str) -> None:
    """With a static cache, which transformers compiles into a CUDA graph: two prompts, one after the other."""
    torch.compiler.reset()
    model = applied(spec)
    caprese.fuse(model)
    for seed in (1, 2):
        ids = prompts(2).roll(seed, 1)
        tokens, scores = answer(model, ids)
        got, compiled = answer(model, ids, cache_implementation="static")
        assert torch.equal(got, tokens)
        assert (compiled - scores).abs().max() <= 1e-3 * scores.abs().max()


@pytest.mark.parametrize("spec", ["griffin:0.5", "cats:0.5", "griffin:0.5+q4"])
def test_bfloat16(spec: str) -> None:
    model, ids = applied(spec, torch.bfloat16), prompts(2)
    scores = answer(model, ids)[1]
    caprese.fuse(model)
    # the first token comes from the prompt; the second may already be another one, so no more scores are compared
    fused = answer(model, ids)[1]
    assert (fused[:, :2] - scores[:, :2]).float().abs().mean() <= 0.02 * scores.float().abs().max()


@pytest.mark.parametrize("keep", [0.5, 0.0])
def test_a_hybrid_is_as_on_a_cpu(keep: float) -> None:
    answers = []
    for device in ("cpu", "cuda"):
        model = tiny_llama(num_hidden_layers=2)
        caprese.apply(model, caprese.Mamba(keep_attention=keep))
        answers.append(answer(model.to(device), prompts(2).to(device))[1].cpu())
    assert (answers[0] - answers[1]).abs().max() <= 1e-3 * answers[0].abs().max()


DRAFTS = {
    "griffin": [caprese.Griffin(sparsity=0.3)],
    "cats": [caprese.Cats(sparsity=0.5)],
    "q8": [caprese.Q8(head=True)],
    "griffin + q4": [caprese.Griffin(sparsity=0.3), caprese.Q4()],
    "hybrid": [caprese.Mamba(keep_attention=[1])],
    "pure, sparse": [caprese.Mamba(keep_attention=0), caprese.Griffin(sparsity=0.5)],
}


def lossless_case(name: str) -> tuple[Any, Any]:
    """The dense model, and the same with what drafts on it."""
    shape = {"hidden_size": 64, "intermediate_size": 128, "eos_token_id": None}
    model = tiny_llama(**shape).cuda()
    model = caprese.apply(model, DRAFTS[name])
    if name not in ("hybrid", "pure, sparse"):
        caprese.fuse(recovered(model, 4, 0.02))
    return tiny_llama(**shape).cuda(), model


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("name", DRAFTS)
def test_lossless_is_dense(name: str, batch: int) -> None:
    plain, model = lossless_case(name)
    lossless = caprese.Lossless(tokens=4)
    for seed in (1, 2):
        ids = prompts(batch).roll(seed, 1)
        tokens = answer(plain, ids)[0]
        got = model.generate(ids, custom_generate=lossless, max_new_tokens=12, do_sample=False, pad_token_id=0)
        assert torch.equal(got, tokens)
    assert lossless.tally.drafted


@pytest.mark.parametrize("keep", [0.5, 0.0])
def test_the_text_of_a_hybrid_is_its_own(keep: float) -> None:
    """Verified on its recurrent states, by replay: batches accept their own numbers of tokens."""
    shape = {"num_hidden_layers": 2, "eos_token_id": None}
    plain = caprese.apply(tiny_llama(**shape).cuda(), caprese.Mamba(keep_attention=keep))
    model = tiny_llama(**shape).cuda()
    caprese.apply(model, [caprese.Mamba(keep_attention=keep), caprese.Griffin(sparsity=0.4)])
    lossless = caprese.Lossless(target="hybrid", tokens=4)
    ids = prompts(4)
    tokens = answer(plain, ids)[0]
    got = model.generate(ids, custom_generate=lossless, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert torch.equal(got, tokens) and lossless.tally.drafted


@pytest.mark.parametrize("name", ["griffin", "cats", "q8", "griffin + q4"])
def test_compiled_lossless_is_dense(name: str) -> None:
    """In CUDA graphs, one for each width of a pass: the KV cache of the first prompt serves the second."""
    torch.compiler.reset()
    plain, model = lossless_case(name)
    lossless = caprese.Lossless(tokens=3, compiled=True)
    with lossless.static_cache(model, 1, 40) as kept:
        pass
    for seed in (1, 2):
        ids = prompts(1).roll(seed, 1)
        tokens = answer(plain, ids)[0]
        got = model.generate(ids, custom_generate=lossless, max_new_tokens=12, do_sample=False, pad_token_id=0)
        assert torch.equal(got, tokens)
        assert int(kept.get_seq_length()) == 9 + 12 - 1
    assert lossless.tally.drafted
