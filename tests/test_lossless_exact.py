"""Lossless text on real models: 200 prompts of 128 tokens, for every kind of draft and target, alone and in batches.

A text is greedy if one dense pass over it, in which each token sees those before it, finds each token the likeliest.
Two passes of different widths take sums in other orders, so that logits differ in their last bits: where the token
written is not the likeliest of that pass but misses it by less than such differences come to, it is a tie, counted
apart from errors. In float32 that is 2e-5 of the largest logit. In bfloat16 two passes of transformers itself disagree
by up to 0.0166 of it, so that texts are compared with a pass in float32 over the same weights, and only one of the two
rounds: by no more than one unit in the last place of either logit, 2^-7 of it.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

import caprese
from caprese.efficient_methods import needs_calibration
from caprese.studies.prompts import some_prompts

WITHIN = {torch.float32: 2e-5, torch.bfloat16: 2 * 2**-7}
TOKENS = 128
PROMPTS = int(os.environ.get("CAPRESE_TEST_PROMPTS", 200))
# of ties, at most: more would be errors in disguise
TIES = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
# of texts that were compared the ties, by target, prompt and text: most come again with the next draft
COMPARED: dict[tuple[Any, ...], int] = {}


def ties_of(target: Any, name: str, prompt: list[int], text: list[int], dtype: torch.dtype) -> int:
    """Tokens of a text that are not the likeliest, all of which have to miss it by rounding to `dtype` alone."""
    key = (name, tuple(prompt), tuple(text))
    if key not in COMPARED:
        missed = misses(target, prompt, text)
        assert missed.max() <= WITHIN[dtype], (prompt, text, missed.max())
        COMPARED[key] = int((missed > 0).sum())
    return COMPARED[key]


def misses(model: Any, prompt: list[int], text: list[int]) -> torch.Tensor:
    """By how much each token's logit is below the largest, over the largest absolute one, [n]."""
    ids = torch.tensor([prompt + text])
    logits = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    found = logits.gather(1, torch.tensor(text)[:, None])[:, 0]
    return (logits.amax(-1) - found) / logits.abs().amax(-1)


@torch.no_grad()
def check(
    target: Any, name: str, model: Any, lossless: caprese.Lossless, prompts: list[list[int]], batch: int
) -> tuple[int, int]:
    """Lossless texts of `model` are greedy ones of `target`, called `name`; the ties and the tokens."""
    ties = tokens = ended = 0
    ends = set(torch.as_tensor(target.generation_config.eos_token_id).flatten().tolist())
    for i in range(0, len(prompts), batch):
        group = prompts[i : i + batch]
        longest = max(map(len, group))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in group])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in group])
        out = model.generate(
            ids, attention_mask=mask, custom_generate=lossless, do_sample=False, max_new_tokens=TOKENS, pad_token_id=0
        )
        for prompt, row in zip(group, out[:, longest:].tolist(), strict=True):
            end = next((n + 1 for n, token in enumerate(row) if token in ends), len(row))
            assert end == len(row) or not any(row[end:])  # nothing behind an end but pads
            ties += ties_of(target, name, prompt, row[:end], model.dtype)
            tokens, ended = tokens + end, ended + (end < TOKENS)
    assert ended or len(prompts) < 100, "no text ended within a block"
    assert ties <= max(1, TIES[model.dtype] * tokens)
    return ties, tokens


def smollm2_prompts(tokenizer: Any, model: Any) -> list[list[int]]:
    found: list[list[int]] = []
    for source in ("gym:gsm_symbolic", "gym:word_sorting", None, "gym:simple_equations", "gym:family_relationships"):
        found += some_prompts(source, -(-PROMPTS // 4), model, tokenizer, TOKENS)
    return found[:PROMPTS]


def reasoner_prompts(tokenizer: Any, model: Any, count: int = PROMPTS) -> list[list[int]]:
    return some_prompts("chains:test", count, model, tokenizer, TOKENS)


@pytest.fixture(scope="module")
def smollm2() -> tuple[Any, Any]:
    return caprese.load_base("smollm2-135m", dtype="float32")


@pytest.fixture(scope="module")
def reasoner() -> tuple[Any, Any]:
    return caprese.load_base("reasoner-tiny", dtype="float32")


ROWS: dict[str, list[Any]] = {
    "griffin": [caprese.Griffin(sparsity=0.3)],
    "cats": [caprese.Cats(sparsity=0.5)],
    "static": [caprese.Static(sparsity=0.2)],
    "q8": [caprese.Q8(head=True)],
    "griffin-q4": [caprese.Griffin(sparsity=0.3), caprese.Q4(head=True)],
}


def put(model: Any, methods: list[Any], prompts: list[list[int]]) -> None:
    calibration = None
    if needs_calibration(methods):
        samples = [caprese.Tokens(torch.tensor([prompt]), [1]) for prompt in prompts[:16]]
        calibration = caprese.calibrate(model, methods, samples)
    caprese.apply(model, methods, calibration=calibration)
    if not any(method.trains for method in methods):
        caprese.fuse(model)


class _Dense:
    """The teacher of an applied model, as a model."""

    def __init__(self, model: Any) -> None:
        self.model, self.generation_config = model, model.generation_config

    def __call__(self, ids: torch.Tensor, **how: Any) -> Any:
        with caprese.dense(self.model):
            return self.model(ids, **how)


HYBRIDS = {"hybrid": 0.5, "pure": 0.0}
# by the model and the number of drafts a round, None for as many as pay
PAIRS: dict[str, Callable[[Any, int | None], tuple[list[Any], caprese.Lossless]]] = {
    **{
        name: (lambda _, tokens, methods=methods: (methods, caprese.Lossless(tokens=tokens)))
        for name, methods in ROWS.items()
    },
    **{
        f"{name} drafts": lambda _, tokens, keep=keep: (
            [caprese.Mamba(keep_attention=keep)],
            caprese.Lossless(tokens=tokens),
        )
        for name, keep in HYBRIDS.items()
    },
    **{
        f"{name} is the target": lambda _, tokens, keep=keep: (
            [caprese.Mamba(keep_attention=keep), caprese.Griffin(sparsity=0.5)],
            caprese.Lossless(target="hybrid", tokens=tokens),
        )
        for name, keep in HYBRIDS.items()
    },
    "lookup": lambda _, tokens: ([caprese.Griffin()], caprese.Lossless("lookup", tokens=tokens)),
    "pure, drafted by the dense": lambda model, tokens: (
        [caprese.Mamba(keep_attention=0)],
        caprese.Lossless(copy.deepcopy(model), target="hybrid", tokens=tokens),
    ),
}


def run(base: str, model: Any, name: str, batch: int, prompts: list[list[int]], drafts: int | None) -> None:
    methods, lossless = PAIRS[name](model, drafts)
    put(model, methods, prompts)
    target: Any = _Dense(model)
    other = None
    if lossless.target == "hybrid":  # by itself, FFNs dense
        other, _ = caprese.load_base(base, dtype="float32")
        target = caprese.apply(other, [method for method in methods if method.trains])
    try:
        ties, tokens = check(target, base if other is None else f"{base}, {name}", model, lossless, prompts, batch)
    finally:
        caprese.remove(model)
    print(f"{base}, {name}, batch {batch}: {ties} ties in {tokens} tokens")


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("name", PAIRS)
def test_smollm2(smollm2, name, batch):
    model, tokenizer = smollm2
    run("smollm2-135m", model, name, batch, smollm2_prompts(tokenizer, model), None if batch == 1 else 3)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("name", PAIRS)
def test_reasoner(reasoner, name, batch):
    model, tokenizer = reasoner
    run("reasoner-tiny", model, name, batch, reasoner_prompts(tokenizer, model), 4)


@pytest.mark.parametrize("name", ["griffin-q4", "hybrid drafts", "pure is the target"])
def test_a_part_of_it(reasoner, name):
    model, tokenizer = reasoner
    run("reasoner-tiny", model, name, 4, reasoner_prompts(tokenizer, model, 8), 4)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 4])
def test_bfloat16(smollm2, batch):
    model, tokenizer = caprese.load_base("smollm2-135m", dtype="bfloat16")
    prompts = smollm2_prompts(tokenizer, model)[:: max(1, PROMPTS // 32)]
    put(model, ROWS["q8"], prompts)
    ties, tokens = check(smollm2[0], "smollm2-135m", model, caprese.Lossless(), prompts, batch)
    print(f"bfloat16, batch {batch}: {ties} ties in {tokens} tokens")
