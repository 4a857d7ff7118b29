"""Products in bfloat16 where the machine is faster at them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, tiny_llama
from test_prefill import samples

import caprese
from caprese.data_gen import Samples, complete
from caprese.distill import Branches, Distillation, EndToEnd, HeldOut, Layerwise, fit, make_batches
from caprese.distill.precision import is_quicker, kept_casts, quick_products
from caprese.models import quickest as room
from caprese.models.loading import pick_dtype


def learned(on: bool) -> dict[str, float]:
    model = caprese.apply(tiny_llama(), caprese.Griffin())
    config = Distillation(
        Branches(6),
        layerwise=Layerwise(how="none"),
        end_to_end=EndToEnd(epochs=8, learning_rate=1e-2, batch_size=4, micro_batch=4),
    )
    with quick_products(model, on):
        rows = samples(8)
        return fit(model, rows, rows, config).kl  # of what it was shown: how well it learns


def test_training_learns_as_much():
    """A cast that were kept would be that of the weights before the first step."""
    exact, quick = learned(False), learned(True)
    gained = exact["efficient"] - exact["end_to_end"]
    assert gained > 0.05 * exact["efficient"]
    assert quick["efficient"] == exact["efficient"]  # what is measured is exact
    assert quick["efficient"] - quick["end_to_end"] == pytest.approx(gained, rel=0.15)


def test_what_is_measured_inside_is_exact():
    model = caprese.apply(tiny_llama(), caprese.Griffin())
    batches = make_batches(samples(6), 3)
    outside = HeldOut(model, batches, 1).kl()
    with quick_products(model, True):
        assert HeldOut(model, batches, 1).kl() == outside


def test_samples_are_the_models_and_weights_stay_frozen():
    model, tokenizer = tiny_llama(), byte_tokenizer()
    config = Samples(temperature=0.001, max_new_tokens=8)
    prompts = [s.prompt_ids for s in samples(4)]
    exact = complete(model, tokenizer, prompts, config, 0)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with kept_casts(model, True):
        quick = complete(model, tokenizer, prompts, config, 0)
    same = sum(a[:4] == b[:4] for a, b in zip(exact, quick, strict=True))
    assert same >= 2  # rounding may turn one that is close
    assert not any(p.requires_grad for p in model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not torch.is_autocast_enabled("cpu")


def test_it_is_used_where_it_is_measured_to_be_faster(small_recipe, monkeypatch):
    assert not is_quicker(tiny_llama().bfloat16())
    asked = []

    def measured(model):
        asked.append(model)
        return True

    monkeypatch.setattr("caprese.recovery.recover.is_quicker", measured)
    recipe = small_recipe.model_copy(update={"autocast": True})
    report = caprese.recover(tiny_llama(), byte_tokenizer(), recipe)
    assert len(asked) == 1 and report["recipe"]["autocast"] and report["products"] == "bfloat16"
    # made again from the samples that are there: as they were drawn, whatever is faster now
    (Path(recipe.output) / "adapter_model.safetensors").unlink()
    monkeypatch.setattr("caprese.recovery.recover.is_quicker", lambda _: False)
    assert caprese.recover(tiny_llama(), byte_tokenizer(), recipe)["products"] == "bfloat16"
    plain = small_recipe.model_copy(update={"output": small_recipe.output + "-plain"})
    assert caprese.recover(tiny_llama(), byte_tokenizer(), plain)["products"] == "float32" and len(asked) == 1


@pytest.mark.parametrize(("times", "faster"), [([3.0, 1.0], True), ([1.0, 1.0], False), ([1.0, 3.0], False)])
def test_the_clock_decides(monkeypatch, times, faster):
    now = [0.0]
    monkeypatch.setattr(room.time, "perf_counter", lambda: now[0])

    def linear(x, weight):
        now[0] += times[x.dtype == torch.bfloat16]

    monkeypatch.setattr(room.nn.functional, "linear", linear)
    assert is_quicker(tiny_llama()) is faster
    picked = pick_dtype("quickest", "cpu", tiny_llama().config)
    assert picked == (torch.bfloat16 if faster else torch.float32)


def test_decoding_counts_as_much_as_its_prompt(monkeypatch):
    """A CPU that multiplies few tokens sooner in bfloat16 and many far later takes float32."""
    seconds = {(1, torch.float32): 2.0, (1, torch.bfloat16): 1.0, (64, torch.float32): 10.0}
    for slow, best in ((20.0, torch.bfloat16), (200.0, torch.float32)):
        known = {**seconds, (64, torch.bfloat16): slow}
        monkeypatch.setattr(room, "product_seconds", lambda dtype, tokens, *_, known=known, **__: known[tokens, dtype])
        assert pick_dtype("quickest", "cpu", tiny_llama().config) == best
    assert pick_dtype("quickest", "cuda", tiny_llama().config) is None  # the checkpoint's own
    assert pick_dtype("auto", "cpu") == torch.float32
