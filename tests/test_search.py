"""The fastest of several compositions within a KL: what is measured, chosen, kept and refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import byte_tokenizer, tiny_llama

import caprese
from caprese.data_gen.shards import read_shard
from caprese.distill import HeldOut, make_batches
from caprese.errors import CapreseError
from caprese.recovery import search

LINES = ("q8:head=true", "griffin:0.5", "q8+griffin:0.9")


def given(small_recipe, target: float, lines=LINES, **more):
    return small_recipe.model_copy(update={"alternatives": lines, "target_kl": target, **more})


def test_the_fastest_within_the_target_is_recovered(small_recipe, monkeypatch):
    times = iter([4.0, 2.0, 1.0])

    def clock(model, prompt, new_tokens, names, label):
        assert names == ("dense", "efficient") and len(prompt)
        return {"dense": {"ttnt_ms": 8.0}, "efficient": {"ttnt_ms": next(times)}}

    monkeypatch.setattr(search, "time_to_next_token", clock)
    model = tiny_llama()
    kls = measured(model, small_recipe)
    assert kls["q8:head=true"] < kls["griffin:0.5"] < kls["q8+griffin:0.9"]
    recipe = given(small_recipe, (kls["griffin:0.5"] + kls["q8+griffin:0.9"]) / 2)
    report = caprese.recover(model, byte_tokenizer(), recipe)
    found = report["search"]
    assert found["chosen"] == "griffin:0.5" and report["method"] == "griffin" and report["sparsity"] == 0.5
    assert [each["ratio"] for each in found["alternatives"]] == [0.5, 0.25, 0.125]
    for each in found["alternatives"]:
        assert each["kl"] == pytest.approx(kls[each["method"]], rel=1e-4)
    out = Path(recipe.output)
    assert (out / "plots" / "search.png").is_file() and 'id="search"' in (out / "report.html").read_text()
    assert json.loads((out / "report.json").read_text())["recipe"]["alternatives"] == list(LINES)
    assert caprese.recover(model, byte_tokenizer(), recipe) == report  # nothing is measured again


def measured(model, recipe) -> dict[str, float]:
    """KL of each on the validation samples that a run of this recipe draws."""
    recipe = recipe.model_copy(update={"output": recipe.output + "-before", "method": "q8"})
    caprese.recover(model, byte_tokenizer(), recipe)
    shards = sorted((Path(recipe.output) / "samples").glob("validation-*.parquet"))
    rows = [sample for shard in shards for sample in read_shard(shard)]
    found = {}
    for line in LINES:
        methods = caprese.resolve_recipe(method=line).methods
        caprese.apply(model, methods)
        found["+".join(map(str, methods))] = HeldOut(model, make_batches(rows, 4), 1.0).kl()
        caprese.remove(model)
    return found


def test_what_was_measured_is_not_measured_again(small_recipe, monkeypatch):
    """A run that was stopped in its search goes on with the composition it was at."""
    asked = []

    def clock(model, prompt, new_tokens, names, label):
        asked.append(label)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return {"dense": {"ttnt_ms": 8.0}, "efficient": {"ttnt_ms": float(len(asked))}}

    monkeypatch.setattr(search, "time_to_next_token", clock)
    model, recipe = tiny_llama(), given(small_recipe, 100.0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(KeyboardInterrupt):
        caprese.recover(model, byte_tokenizer(), recipe)
    assert model.state_dict().keys() == before.keys()  # it came back as it was
    report = caprese.recover(model, byte_tokenizer(), recipe)
    assert asked == [f"search: {each}" for each in ("q8:head=true", "griffin:0.5", "griffin:0.5", "q8+griffin:0.9")]
    assert report["search"]["chosen"] == "q8:head=true"


def test_one_that_fails_is_left_out_and_says_why(small_recipe, monkeypatch):
    plain = search.apply

    def apply(model, methods, **how):
        if methods[0].name == "griffin":
            raise RuntimeError("no memory\n(at some line)")
        return plain(model, methods, **how)

    monkeypatch.setattr(search, "apply", apply)
    report = caprese.recover(tiny_llama(), byte_tokenizer(), given(small_recipe, 100.0, LINES[:2]))
    assert report["search"]["chosen"] == "q8:head=true"
    assert report["search"]["alternatives"][1] == {"method": "griffin:0.5", "refused": "no memory"}


def test_another_spelling_is_the_same_run(small_recipe):
    first = caprese.recover(tiny_llama(), byte_tokenizer(), given(small_recipe, 100.0, ("griffin:0.5", "q8:head=true")))
    again = given(small_recipe, 100.0, ("griffin", "q8:head=True"))
    assert caprese.recover(tiny_llama(), byte_tokenizer(), again) == first


def test_times_are_real(small_recipe):
    report = caprese.recover(tiny_llama(), byte_tokenizer(), given(small_recipe, 100.0))
    for each in report["search"]["alternatives"]:
        assert each["ratio"] == pytest.approx(each["ttnt_ms"] / each["dense_ms"]) and each["ttnt_ms"] > 0
    assert report["search"]["dtype"] in ("float32", "bfloat16")


def test_none_within_the_target_says_which_comes_nearest(small_recipe):
    with pytest.raises(CapreseError, match=r"no alternative is within `target_kl=1e-12`: q8:head=true comes nearest"):
        caprese.recover(tiny_llama(), byte_tokenizer(), given(small_recipe, 1e-12))


def test_what_this_model_cannot_be_given_is_left_out(small_recipe):
    recipe = given(small_recipe, 100.0, ("q4", "q8"))
    report = caprese.recover(tiny_llama(hidden_size=40, intermediate_size=100), byte_tokenizer(), recipe)
    refused, taken = report["search"]["alternatives"]
    assert "groups of 32" in refused["refused"] and taken["method"] == report["search"]["chosen"] == "q8"
    recipe = given(small_recipe, 100.0, ("q4",), output=small_recipe.output + "-none")
    with pytest.raises(CapreseError, match="none of the alternatives: q4 stores"):
        caprese.recover(tiny_llama(hidden_size=40, intermediate_size=100), byte_tokenizer(), recipe)


def test_of_a_recipe(tmp_path):
    recipe = caprese.resolve_recipe(model="smollm2-135m", alternatives="default", target_kl=0.2)
    assert len(recipe.compositions) == len(recipe.alternatives) > 5 and not recipe.allocates
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    assert caprese.resolve_recipe(str(file)) == recipe
    other = caprese.resolve_recipe(str(file), method="griffin:0.5")  # in its place: the target goes with them
    assert not other.alternatives and other.target_kl is None and other.methods == (caprese.Griffin(),)
    for wrong, said in [
        ({"alternatives": "default"}, "give it, and no other target"),
        ({"alternatives": "default", "target_kl": 0.2, "method": "q8"}, "leave out method"),
        (
            {"alternatives": "default", "target_kl": 0.2, "layers": "first-half"},
            "sparsity and layers",
        ),
        ({"alternatives": "default", "target_kl": 0.2, "prefill": "efficient"}, "griffin chooses from each prompt"),
        ({"alternatives": ["q9"], "target_kl": 0.2}, "q9"),
        ({"alternatives": "default", "target_kl": 0.2, "reselect_every": 4}, "leave out `reselect_every`"),
        ({"alternatives": "default", "target_kl": float("inf")}, "target_kl"),
        ({"alternatives": "default", "target_kl": float("nan")}, "target_kl"),
        ({"alternatives": "q8", "target_kl": 0.2}, "alternatives"),
    ]:
        with pytest.raises(CapreseError, match=said):
            caprese.resolve_recipe(model="smollm2-135m", **wrong)
