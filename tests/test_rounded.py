"""q8 and q4: weights in few bits for generated tokens, beside the dense ones or without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import recovered, tiny_llama
from families import tiny as family

import caprese
from caprese.efficient_methods import (
    Tokens,
    applied_ffns,
    calibrate,
    cost,
    cost_of,
    make_method,
    parse_methods,
    phases_of,
    refusal,
)
from caprese.kernels import quantize
from caprese.models import find_ffns
from caprese.models.linear import linear_weights

IDS = torch.randint(2, 250, (2, 12), generator=torch.Generator().manual_seed(0))
LENGTHS = [5, 7]


def methods(text: str) -> list[Any]:
    return [make_method(facts) for facts in parse_methods(text)]


def rounded_copy(text: str, tied: bool = True) -> Any:
    """The same model with the weights that few bits stand for, by a plain loop over its linear layers."""
    (method,) = methods(text)
    model = tiny_llama(tie_word_embeddings=tied)
    linears = []
    for site in find_ffns(model):
        ffn, attention = list(site.ffn.linears().items()), site.attention_linears()
        linears += [(name, linear) for name, linear in ffn if method.where in ("all", "ffn")]
        linears += [("", linear) for linear in attention if method.where in ("all", "attention")]
    linears += [("", model.lm_head)] if method.head else []
    for name, linear in linears:
        weight = linear.weight.data
        weight = weight.T.contiguous() if name == "down" else weight
        wide = quantize(weight, method.bits).wide(torch.float32)
        linear.weight.data = wide.T.contiguous() if name == "down" else wide
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "text",
    ["q8", "q4", "q8:where=ffn", "q4:where=attention", "q8:head=true", "q4:head=true", "q8:where=none:head=true"],
)
def test_it_is_the_model_with_rounded_weights(text: str, tied: bool) -> None:
    model = caprese.apply(tiny_llama(tie_word_embeddings=tied), methods(text), prefill="efficient")
    with torch.no_grad():
        wanted = rounded_copy(text, tied)(IDS).logits
        assert torch.allclose(model(IDS).logits, wanted, atol=2e-5 * float(wanted.abs().max()))
        with caprese.phases(model, [0, 0]):
            assert torch.allclose(model(IDS).logits, wanted, atol=2e-5 * float(wanted.abs().max()))
    assert torch.equal(caprese.remove(model)(IDS).logits, tiny_llama(tie_word_embeddings=tied)(IDS).logits)


def test_prompts_run_dense() -> None:
    """In one pass as in two: the prompt's part of the KV cache is the dense model's."""
    dense, model = tiny_llama(), caprese.apply(tiny_llama(), methods("q4"))
    with torch.no_grad():
        ours, theirs = model(IDS, use_cache=True), dense(IDS, use_cache=True)
        for a, b in zip(ours.past_key_values.layers, theirs.past_key_values.layers, strict=True):
            assert torch.equal(a.keys, b.keys)
        with caprese.phases(model, LENGTHS):
            whole = model(IDS).logits
        for row, n in enumerate(LENGTHS):
            cache = model(IDS[row : row + 1, :n], use_cache=True).past_key_values
            for token in range(n, IDS.shape[1]):
                step = model(IDS[row : row + 1, token : token + 1], past_key_values=cache).logits
                assert torch.allclose(step[0, 0], whole[row, token], atol=1e-4)


@pytest.mark.parametrize("text", ["q8", "q4", "q8:where=ffn", "q4:where=attention", "q8:head=true", "q4:head=true"])
def test_prompts_run_as_stored(text: str) -> None:
    """What is computed and chosen is as on the model of the rounded weights, prompts dense; no dense copy is needed."""
    model = recovered(
        caprese.apply(tiny_llama(tie_word_embeddings=True), methods(f"griffin:0.5+{text}"), prefill="stored")
    )
    rounded = recovered(caprese.apply(rounded_copy(text), methods("griffin:0.5")))
    with torch.no_grad():
        with caprese.phases(model, LENGTHS), caprese.phases(rounded, LENGTHS):
            wanted = rounded(IDS).logits
            close = 5e-5 * float(wanted.abs().max())
            assert torch.allclose(model(IDS).logits, wanted, atol=close)
        caprese.drop_dense(model)
        for fused in (False, True):
            caprese.fuse(model) if fused else None
            cache, theirs = None, None
            for part in IDS.split([7, 1, 1, 1, 2], 1):  # the last two are the next turn's, and prompt again
                ours = model(input_ids=part, past_key_values=cache, use_cache=True)
                other = rounded(input_ids=part, past_key_values=theirs, use_cache=True)
                cache, theirs = ours.past_key_values, other.past_key_values
                assert torch.allclose(ours.logits, other.logits, atol=close)


@pytest.mark.parametrize("prefill", ["Dense", None, True, ["stored"], ""])
def test_prompts_run_in_one_of_three_ways(prefill: Any, tmp_path: Path) -> None:
    with pytest.raises(caprese.CapreseError, match="use dense, efficient, stored"):
        caprese.apply(tiny_llama(), methods("q8"), prefill=prefill)
    caprese.save(recovered(caprese.apply(tiny_llama(), methods("q8"))), tmp_path)
    with pytest.raises(caprese.CapreseError, match="use dense, efficient, stored"):
        caprese.load(base := tiny_llama(), tmp_path, prefill=prefill)
    assert not applied_ffns(base)


@pytest.mark.parametrize("text", ["q8", "q4", "q4:where=none:head=true"])
def test_a_weight_that_is_no_number_is_not_rounded_away(text: str) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    for weight in (model.lm_head.weight, model.model.layers[1].self_attn.q_proj.weight):
        weight.data[3, 5] = torch.nan
    with pytest.raises(caprese.CapreseError, match="a weight is NaN or infinite"):
        caprese.apply(model, methods(text))
    assert not applied_ffns(model)


def test_the_teacher_is_dense_whatever_prompts_run_through() -> None:
    model = caprese.apply(tiny_llama(), methods("griffin:0.5+q4:head=true"), prefill="stored")
    with torch.no_grad():
        with caprese.dense(model):
            assert torch.equal(model(IDS).logits, tiny_llama()(IDS).logits)
        with caprese.phases(model, LENGTHS, lambda *_: None):  # observed: all dense
            assert torch.equal(model(IDS).logits, tiny_llama()(IDS).logits)
    with pytest.raises(caprese.CapreseError, match="reselection runs tokens dense"):
        caprese.apply(tiny_llama(), methods("griffin:0.5+q4"), prefill="stored", reselect_every=4)


def test_what_goes_together() -> None:
    assert refusal(*methods("q4:where=ffn+q8:where=attention")) is None
    assert "same part" in str(refusal(*methods("q4+q8")))
    assert refusal(*methods("q4+q8:where=none:head=true")) is None
    with pytest.raises(caprese.CapreseError, match="leaves nothing to store in few bits; add head=true"):
        methods("q8:where=none")
    for other in ("griffin", "cats", "static:0.3", "teal:0.4"):
        assert refusal(*methods(f"q8+{other}")) is None
    assert "replaces the attention" in str(refusal(*methods("q8+mamba")))
    with pytest.raises(caprese.CapreseError, match="groups of 32 columns, and one here has 40; use q8"):
        caprese.apply(tiny_llama(hidden_size=40), methods("q4"))


def test_what_a_token_reads() -> None:
    model = tiny_llama()
    ffn, attention, head = 3 * 3 * 32 * 96, 3 * (2 * 32 * 32 + 2 * 32 * 16), 258 * 32
    for text, spared in {
        "q8": (ffn + attention) * (1 - 8 / 32),
        "q4:where=ffn": ffn * (1 - 4.5 / 32),
        "q4:where=attention": attention * (1 - 4.5 / 32),
        "griffin:0.5+q8:head=true": ffn * (1 - 0.5 * 8 / 32) + (attention + head) * (1 - 8 / 32),
    }.items():
        assert cost(model, methods(text)).spared == pytest.approx(spared, abs=4)
        caprese.apply(model, methods(text))
        assert cost_of(model).spared == pytest.approx(spared, abs=4)
        caprese.remove(model)


def held(model: torch.nn.Module) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("tied", [True, False])
def test_no_dense_copy_is_kept(tied: bool, tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=tied)
    whole = held(model)
    caprese.apply(model, methods("q8:head=true"), prefill="efficient")
    with torch.no_grad():
        before = model(IDS).logits
        caprese.drop_dense(model)
        assert torch.equal(model(IDS).logits, before)
    rounded = 3 * (3 * 32 * 96 + 2 * 32 * 32 + 2 * 32 * 16) + 258 * 32
    rows = 3 * (3 * 96 + 2 * 32 + 2 * 16) + 258
    embedding = 0 if tied else 258 * 32 * 4
    norms = (3 * 2 + 1) * 32 * 4
    assert held(model) - rounded - 4 * rows - embedding - norms < 200  # rotary frequencies, and what stands for none
    assert held(model) < 0.5 * whole
    for ask in (
        lambda: caprese.remove(model),
        lambda: caprese.dense(model).__enter__(),
        lambda: model.save_pretrained(tmp_path),
    ):
        with pytest.raises(caprese.CapreseError, match="dense weights of this model were let go"):
            ask()


def test_dense_prompts_keep_the_dense_copy() -> None:
    with pytest.raises(caprese.CapreseError, match="prompts run dense"):
        caprese.drop_dense(caprese.apply(tiny_llama(), methods("q8")))


def test_saved_and_loaded(tmp_path: Path) -> None:
    model = recovered(caprese.apply(tiny_llama(), methods("static:0.3+q4")[1:], prefill="efficient"))
    with torch.no_grad():
        wanted = model(IDS).logits
    caprese.save(model, tmp_path / "adapter")
    base = tiny_llama()
    again = caprese.load(base, tmp_path / "adapter", keep_dense=False)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, wanted)


def test_how_prompts_run_is_chosen_when_loaded(tmp_path: Path) -> None:
    caprese.save(recovered(caprese.apply(tiny_llama(), methods("griffin:0.5+q8"))), tmp_path / "adapter")
    with pytest.raises(caprese.CapreseError, match='apply with `prefill="stored"`'):
        caprese.load(tiny_llama(), tmp_path / "adapter", keep_dense=False)
    stored = caprese.load(tiny_llama(), tmp_path / "adapter", keep_dense=False, prefill="stored")
    wanted = recovered(caprese.apply(tiny_llama(), methods("griffin:0.5+q8"), prefill="stored"))
    with torch.no_grad(), caprese.phases(stored, LENGTHS), caprese.phases(wanted, LENGTHS):
        assert torch.equal(stored(IDS).logits, wanted(IDS).logits)
    with pytest.raises(caprese.CapreseError, match="griffin chooses from each prompt"):
        caprese.load(tiny_llama(), tmp_path / "adapter", prefill="efficient")
    with pytest.raises(caprese.CapreseError, match="dense weights of this model were let go"):
        caprese.save(stored, tmp_path / "again")  # nothing tells this base from others
    kept = caprese.load(tiny_llama(), tmp_path / "adapter", prefill="stored")
    caprese.save(kept, tmp_path / "again")  # as it runs now
    assert phases_of(caprese.load(tiny_llama(), tmp_path / "again")).prefill == "stored"


@pytest.mark.parametrize("kind", ["gpt2", "gemma", "phi3"])
def test_other_spellings(kind: str) -> None:
    """Conv1D, scaled embeddings, gate and up in one."""
    model = family(kind)
    with torch.no_grad():
        dense = model(IDS).logits
        caprese.apply(model, methods("q8:head=true"), prefill="efficient")
        rounded = model(IDS).logits
        assert 0 < (rounded - dense).norm() < 0.2 * dense.norm()
        caprese.drop_dense(model)
        assert torch.equal(model(IDS).logits, rounded)


@pytest.mark.parametrize("scales", ["plain", "calibrated"])
def test_a_small_run(scales: str, small_recipe: caprese.Recipe, tokenizer: Any) -> None:
    """One adapter gives back what both took: neurons and bits. Loaded, the weights are rounded as they were."""
    recipe = small_recipe.model_copy(update={"methods": tuple(methods(f"griffin:0.5+q4:scales={scales}"))})
    report = caprese.recover(model := tiny_llama(), tokenizer, recipe)
    kl = {name: report["quality"][name]["kl"] for name in ("efficient", "recovered")}
    assert kl["recovered"] < kl["efficient"]
    loaded = caprese.load(tiny_llama(), recipe.output)
    assert len(applied_ffns(loaded)) == 3
    plain = caprese.apply(model, methods("q4"))
    same = [
        torch.equal(one.rounded.codes, other.rounded.codes)
        for one, other in zip(_rounded_linears(loaded), _rounded_linears(plain), strict=True)
    ]
    assert len(same) == 12 and (all(same) if scales == "plain" else not any(same))


def _rounded_linears(model: Any) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "rounded")]


def test_scales_of_another_model_are_refused() -> None:
    """And where nothing is scaled by its inputs, nothing is learned."""
    for where in ("all", "ffn", "attention"):
        chosen = methods(f"q4:scales=calibrated:where={where}")
        for made, size in ((32, 64), (64, 32)):
            tokens = [Tokens(IDS, torch.tensor(LENGTHS))]
            calibration = calibrate(tiny_llama(hidden_size=made), chosen, tokens)
            model = tiny_llama(hidden_size=size)
            with pytest.raises(caprese.CapreseError, match="of q4 was made for another model; calibrate again"):
                caprese.apply(model, chosen, calibration=calibration)
            assert not applied_ffns(model)
    caprese.apply(tiny_llama(), methods("q4:scales=calibrated:where=none:head=true"))


@pytest.mark.parametrize("kind", ["llama", "phi3", "gpt2"])
@pytest.mark.parametrize("where", ["all", "ffn", "attention"])
def test_calibrated_scales_count_errors_by_what_samples_use(where: str, kind: str) -> None:
    """Against mean squares by plain hooks, on completion tokens alone; the error so counted is less than plain's."""
    chosen, model, reference = methods(f"q4:scales=calibrated:where={where}"), family(kind), family(kind)
    tokens = Tokens(IDS, torch.tensor(LENGTHS))
    seen: dict[Any, torch.Tensor] = {}
    after = torch.arange(12)[None] >= torch.tensor(LENGTHS)[:, None]
    linears = [
        linear
        for site in find_ffns(reference)
        for linear in [
            *(module for name, module in site.ffn.linears().items() if name != "down" and where != "attention"),
            *(site.attention_linears() if where != "ffn" else []),
        ]
    ]
    for linear in linears:
        linear.register_forward_pre_hook(lambda module, args: seen.__setitem__(module, args[0].view(2, 12, -1)[after]))
    with torch.no_grad():
        reference(IDS)
    calibration = calibrate(model, chosen, [tokens])
    caprese.apply(model, chosen, calibration=calibration)
    rows = []
    for site, wrapper in zip(find_ffns(model), applied_ffns(model).values(), strict=True):
        rows += [wrapper.transformed.first] if where != "attention" else []
        rows += [linear.rounded for linear in site.attention_linears()] if where != "ffn" else []
    stored = torch.cat([one.codes.flatten() for one in rows])
    wanted, error, plain_error = [], 0.0, 0.0
    for linear in linears:
        importance = seen[linear].square().mean(0)
        weight = linear_weights(linear)[0]
        calibrated, plain = quantize(weight, 4, importance), quantize(weight, 4)
        wanted.append(calibrated.codes.flatten())
        error += float(((calibrated.wide(torch.float32) - weight).square() * importance).sum())
        plain_error += float(((plain.wide(torch.float32) - weight).square() * importance).sum())
    assert error < 0.99 * plain_error
    assert (stored == torch.cat(wanted)).float().mean() > 0.999  # sums in another order now and then tip a scale
