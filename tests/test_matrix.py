"""Every family by every method, in float32 and bfloat16; then every way in which `generate` can search."""

from __future__ import annotations

import copy
import functools
import warnings

import pytest
import torch
from conftest import recovered
from families import tiny
from transformers import (
    BertConfig,
    BertModel,
    DynamicCache,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

import caprese
from caprese.adapters import attach_adapter, set_branch
from caprese.data_gen import Sample
from caprese.distill import Teacher, accumulate, fit_layer, make_batches, new_moments
from caprese.efficient_methods import (
    Cats,
    Griffin,
    Method,
    Nothing,
    Sparse,
    Tokens,
    applied_ffns,
    calibrate,
    make_method,
    needs_calibration,
    parse_methods,
)
from caprese.evaluation import layer_errors
from caprese.models import FAMILIES, find_ffns

METHODS = [
    "griffin:0.5",
    "cats:0.5",
    "cats:0.5:threshold=calibrated",
    "teal:0.4:step=0.2",
    "static:0.3",
    "nf4",
    "int8",
    "q8",
    "q4:head=true",
    "none",
    "static:0.3+cats:0.5",
    "griffin:0.5+q8:head=true",
    "griffin:0.5+teal:0.4:where=attention:greedy=false",
]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# How far two ways to the same logits may lie apart, relative to the largest logit. A bfloat16 has 8 bits; what two
# layers make of a last bit, and of a neuron that it puts on the other side of a threshold, is some percent.
SAME = {torch.float32: 2e-5, torch.bfloat16: 0.06}


@functools.cache
def model_of(kind: str, dtype: torch.dtype) -> PreTrainedModel:
    return tiny(kind, dtype)


def methods_of(text: str) -> list[Method]:
    return [make_method(facts) for facts in parse_methods(text)]


def random_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, 258, shape, generator=torch.Generator().manual_seed(seed))


def calibrated(model: PreTrainedModel, methods: list[Method]) -> dict[str, torch.Tensor] | None:
    if not needs_calibration(methods):
        return None
    return calibrate(model, methods, [Tokens(random_ids(4, 12, seed=9), torch.tensor([1, 3, 5, 7]))])


def left_padded(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    width = max(len(row) for row in rows)
    ids = torch.stack([torch.cat([torch.zeros(width - len(row), dtype=torch.long), row]) for row in rows])
    mask = torch.stack([(torch.arange(width) >= width - len(row)).long() for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def greedy(model: torch.nn.Module, rows: list[torch.Tensor], **more: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [B, n] and the logits [B, n, V] that chose them."""
    settings = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    out = model.generate(**left_padded(rows), **settings, **more)
    return out.sequences[:, max(map(len, rows)) :], torch.stack(out.logits, 1)


def rounding_decides(methods: list[Method], dtype: torch.dtype) -> bool:
    """Whether two ways to the same activations may drop different ones: a threshold lies between their last bits."""
    return dtype == torch.bfloat16 and any(m.acts_on & {"neurons", "inputs", "attention"} for m in methods)


def distance(one: torch.Tensor, other: torch.Tensor, decides: bool) -> float:
    """The largest difference; the mean where rounding decides about single neurons, each of which moves some logits."""
    apart = (one - other).abs()
    return float(apart.mean() if decides else apart.max())


def same_generation(
    one: tuple[torch.Tensor, torch.Tensor], other: tuple[torch.Tensor, torch.Tensor], dtype, decides: bool = False
) -> None:
    """Token for token, step by step. Where rounding decides between two logits that are equal up to it, the tokens
    part, and from there on the sequences have nothing to do with each other."""
    for own, theirs, a, b in zip(one[0], other[0], one[1], other[1], strict=True):
        for step in range(len(own)):
            limit = SAME[dtype] * float(a[step].abs().max())
            assert distance(a[step], b[step], decides) <= limit, step
            if own[step] != theirs[step]:
                assert decides or a[step, own[step]] - a[step, theirs[step]] <= 2 * limit
                break


def close(one: torch.Tensor, other: torch.Tensor, dtype: torch.dtype, decides: bool = False) -> bool:
    return distance(one, other, decides) <= SAME[dtype] * float(one.abs().max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("text", METHODS)
@pytest.mark.parametrize("kind", sorted(FAMILIES))
@torch.no_grad()
def test_a_cell(kind, text, dtype, tmp_path, request):
    dtype = DTYPES[dtype]
    model, methods = model_of(kind, dtype), methods_of(text)
    names, attributes = list(model.state_dict()), set(vars(model))
    hooks = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]
    rows = [random_ids(n, seed=n) for n in (7, 1, 4)]
    ids = rows[0][None]
    before = model(ids).logits
    choices, decides = calibrated(model, methods), rounding_decides(methods, dtype)
    adapted = recovered(caprese.apply(model, methods, calibration=choices), 3, 0.1)
    request.addfinalizer(lambda: applied_ffns(model) and caprese.remove(adapted))  # the next cell has the same model

    # dense is the base, and so is a prompt
    with caprese.dense(adapted):
        assert torch.equal(adapted(input_ids=ids).logits, before)
    assert torch.equal(adapted(input_ids=ids).logits, before)

    # a batch is its sequences, a chunked prompt is a prompt
    batch = greedy(adapted, rows)
    for i, row in enumerate(rows):
        same_generation(greedy(adapted, [row]), (batch[0][i : i + 1], batch[1][i : i + 1]), dtype, decides)
    same_generation(greedy(adapted, rows, prefill_chunk_size=3), batch, dtype, decides)
    steps = []
    for chunks in ((7,), (3, 2, 2)):
        cache = DynamicCache(config=model.config)
        for part in ids.split(chunks, 1):
            adapted(input_ids=part, past_key_values=cache, use_cache=True)
        steps.append(adapted(input_ids=torch.tensor([[9]]), past_key_values=cache, use_cache=True).logits)
    assert close(*steps, dtype, decides)

    # saved and loaded is what it was
    with caprese.phases(adapted, [3]):
        efficient = adapted(input_ids=ids).logits
    assert not torch.equal(efficient, before)
    caprese.save(adapted, tmp_path)

    # removed, nothing is left
    assert caprese.remove(adapted) is model
    assert list(model.state_dict()) == names and set(vars(model)) == attributes and not applied_ffns(model)
    assert [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()] == hooks
    assert torch.equal(model(ids).logits, before)

    loaded = caprese.load(copy.deepcopy(model), tmp_path)
    with caprese.phases(loaded, [3]):
        assert torch.equal(loaded(input_ids=ids).logits, efficient)

    # all of it kept is all of it
    if all(isinstance(m, Sparse | Nothing) for m in methods):
        all_of_it = [m.model_copy(update={"sparsity": 1e-9}) if isinstance(m, Sparse) else m for m in methods]
        caprese.apply(model, all_of_it, calibration=calibrated(model, all_of_it))
        with caprese.phases(model, [3]):
            kept = model(ids).logits
        caprese.remove(model)
        assert close(before, kept, dtype)


@pytest.mark.parametrize("text", [m for m in METHODS if m != "none"])
@pytest.mark.parametrize("kind", sorted(FAMILIES))
@torch.no_grad()
def test_the_closed_form_lowers_every_layers_error(kind, text):
    model, methods = model_of(kind, torch.float32), methods_of(text.replace("cats:0.5", "cats:0.8"))  # a ReLU is sparse
    caprese.apply(model, methods, calibration=calibrated(model, methods))
    batches = make_batches([Sample(random_ids(n + 14, seed=n).tolist(), n, "p", "c") for n in (1, 3, 4, 8)], 4)
    moments = new_moments(model)
    accumulate(model, batches, moments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = attach_adapter(model, 6)
    for wrapper, m in zip(applied_ffns(model).values(), moments, strict=True):
        set_branch(wrapper.recovery, *fit_layer(m, m, 6).at(6))
    errors = layer_errors(adapted, Teacher(adapted, batches, 0))
    caprese.remove(adapted)
    assert len(errors) == 2
    assert all(0 < row["recovered"] < row["efficient"] for row in errors)


# --- Ways to search --------------------------------------------------------------------------------------------------

SEARCHED = ["llama", "gemma2", "gpt2", "opt"]
SEARCHERS = {"griffin": Griffin(sparsity=0.5), "cats": Cats(sparsity=0.8)}


def next_logits(model: torch.nn.Module, sequence: torch.Tensor, prompt: int) -> torch.Tensor:
    """What follows `sequence`, without a KV cache."""
    with caprese.phases(model, [prompt]):
        return model(input_ids=sequence[None], use_cache=False).logits[0, -1].double()


@pytest.fixture(params=[f"{kind}-{name}" for kind in SEARCHED for name in SEARCHERS])
def searched(request):
    kind, name = request.param.split("-")
    model = tiny(kind)
    dense = copy.deepcopy(model)
    yield recovered(caprese.apply(model, SEARCHERS[name]), 3, 0.1), dense


@torch.no_grad()
def test_beam_search(searched):
    model, _ = searched
    prompt = random_ids(5, seed=2)
    beams = [(0.0, prompt)]
    for _ in range(6):
        further = []
        for score, sequence in beams:
            best = next_logits(model, sequence, 5).log_softmax(-1).topk(3)
            further += [
                (score + float(p), torch.cat([sequence, token[None]]))
                for p, token in zip(best.values, best.indices, strict=True)
            ]
        beams = sorted(further, key=lambda b: -b[0])[:3]
    out = model.generate(input_ids=prompt[None], num_beams=3, num_return_sequences=3, max_new_tokens=6, do_sample=False)
    assert torch.equal(out, torch.stack([sequence for _, sequence in beams]))


@torch.no_grad()
def test_several_samples_of_one_prompt(searched):
    model, _ = searched
    torch.manual_seed(0)
    out = model.generate(
        **left_padded([random_ids(5, seed=2), random_ids(2, seed=3)]),
        num_return_sequences=3,
        max_new_tokens=5,
        do_sample=True,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert out.sequences.shape == (6, 10) and len({tuple(row.tolist()) for row in out.sequences}) > 2
    logits = torch.stack(out.logits, 1).double()
    for row, (sequence, mine) in enumerate(zip(out.sequences, logits, strict=True)):
        n = 5 if row < 3 else 2
        for step in range(5):
            right = next_logits(model, sequence[5 - n : 5 + step], n)
            assert (mine[step] - right).abs().max() < 1e-4 * right.abs().max()


@torch.no_grad()
def test_assisted_decoding_is_dense(searched):
    """Its passes verify what is proposed, which is dense also where that is nothing; so the tokens are the dense
    model's."""
    model, dense = searched
    prompt = random_ids(1, 5, seed=2)
    for assistant in (dense, tiny("llama", seed=8)):
        for count in range(2, 12):
            settings = {"max_new_tokens": count, "do_sample": False}
            right = dense.generate(prompt, **settings)
            assistant.generation_config.num_assistant_tokens = 3
            assert torch.equal(model.generate(input_ids=prompt, assistant_model=assistant, **settings), right), count
    assert not torch.equal(model.generate(input_ids=prompt, **settings), right)


def test_contrastive_search_does_not_run(searched):
    """transformers 5 has it as code to be downloaded, and says so; nothing runs in its place."""
    model, _ = searched
    with pytest.raises(Exception, match="(?i)contrastive"):
        model.generate(input_ids=random_ids(1, 5), penalty_alpha=0.6, top_k=4, max_new_tokens=3)


# --- Refusals --------------------------------------------------------------------------------------------------------

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
REFUSED = {
    "a mixture of experts": (
        lambda: MixtralForCausalLM(MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=2)),
        "'mixtral' is a mixture of experts.*routing is already sparse",
    ),
    "an encoder-decoder": (
        lambda: T5ForConditionalGeneration(
            T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=64)
        ),
        "'t5' is an encoder-decoder.*decoder-only",
    ),
    "an encoder": (lambda: BertModel(BertConfig(**SMALL)), "'bert'"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_has_no_place_for_it_is_refused_by_name(what):
    build, reason = REFUSED[what]
    model = build()
    for use in (find_ffns, lambda m: caprese.apply(m, Griffin())):
        with pytest.raises(caprese.CapreseError, match=reason):
            use(model)
