"""Methods together, methods refused, methods of other packages."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import tiny_llama

import caprese
from caprese.efficient_methods import (
    METHODS,
    Cats,
    Griffin,
    Int8,
    Nf4,
    Nothing,
    Static,
    Teal,
    Tokens,
    applied_ffns,
    calibrate,
    compose,
    make_method,
    methods_by_layer,
    parse_methods,
    refusal,
)
from caprese.efficient_methods.memory import memory_of
from caprese.errors import CapreseError
from caprese.recipes import Recipe, resolve_recipe

DOCS = Path(__file__).parent.parent / "docs" / "methods.md"


def rows() -> list[Tokens]:
    generator = torch.Generator().manual_seed(1)
    return [Tokens(torch.randint(2, 258, (4, 24), generator=generator), torch.tensor([3, 6, 9, 12]))]


def test_a_line_names_methods_and_their_settings():
    assert parse_methods("griffin") == [{"name": "griffin"}]
    assert parse_methods("static:0.3 + cats:0.5:threshold=calibrated") == [
        {"name": "static", "sparsity": 0.3},
        {"name": "cats", "sparsity": 0.5, "threshold": "calibrated"},
    ]
    assert parse_methods("teal:[0.2, 0.4]:greedy=false")[0] == {"name": "teal", "sparsity": [0.2, 0.4], "greedy": False}


@pytest.mark.parametrize(
    "method",
    [
        Griffin(),
        Griffin(score="output", prior=32.5),
        Cats(threshold="calibrated"),
        Teal(where="attention"),
        Nf4(),
        Nothing(),
    ],
)
def test_a_method_reads_back_from_its_own_words(method):
    assert [make_method(facts) for facts in parse_methods(str(method))] == [method]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("magic", "unknown method 'magic'"),
        ("", "write NAME"),
        ("griffin:[0.1", "write NAME"),
        ("cats:speed=3", "no setting 'speed'"),
        ("griffin:1.5", "less than 1"),
        ("nf4:0.5", "no setting 'sparsity'"),
        ("griffin+griffin", "do not compose"),
        ("griffin:0.5:0.7", "sparsity is said twice"),
        ("griffin:0.5:sparsity=0.3", "sparsity is said twice"),
        ("teal:name=cats", "name is said twice"),
    ],
)
def test_a_bad_line_is_refused(text, message):
    with pytest.raises(CapreseError, match=message):
        Recipe(method=text)


def test_settings_of_the_recipe_go_to_the_methods_that_have_them():
    static, cats = Recipe(method="static:0.3+cats", sparsity=0.6, threshold="calibrated").methods
    assert (static.sparsity, cats.sparsity, cats.threshold) == (0.3, 0.6, "calibrated")
    with pytest.raises(CapreseError, match="no setting of griffin"):
        Recipe(method="griffin", threshold="calibrated")
    with pytest.raises(CapreseError, match="one of `target_kl`"):
        Recipe(sparsity="auto")
    with pytest.raises(CapreseError, match="no setting of nf4"):
        Recipe(sparsity="auto", target_kl=0.1, method="nf4")
    with pytest.raises(CapreseError, match="takes one method"):
        Recipe(target_kl=0.1, method="static+cats")
    with pytest.raises(CapreseError, match="goes with `sparsity=.auto.`"):
        Recipe(target_active=0.5, sparsity=0.5)


@pytest.mark.parametrize(
    ("method", "sparsity"), [("nf4", 0.9), ("griffin:0.5", 0.9), ("griffin:0.5", "auto"), ("static:0.3+cats:0.5", 0.5)]
)
def test_a_sparsity_that_no_method_takes_is_refused(method, sparsity):
    target = {"target_kl": 0.1} if sparsity == "auto" else {}
    with pytest.raises(CapreseError, match="`sparsity` is no setting of .*, or said there already"):
        Recipe(method=method, sparsity=sparsity, **target)


def test_another_method_leaves_the_settings_of_the_recipes_own(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("method: cats\nsparsity: 0.7\nthreshold: calibrated\n")
    for method, words in {"griffin": "griffin:0.7", "griffin:0.4": "griffin:0.4", "nf4": "nf4"}.items():
        recipe = resolve_recipe(str(file), method=method)
        assert [str(m) for m in recipe.methods] == [words]
        (tmp_path / "again.yaml").write_text(recipe.to_yaml())
        assert resolve_recipe(str(tmp_path / "again.yaml")).methods == recipe.methods
    with pytest.raises(CapreseError, match="`sparsity` is no setting of nf4"):
        resolve_recipe(str(file), method="nf4", sparsity=0.9)


def test_what_goes_together_and_what_does_not():
    packed = {"nf4", "int8"}
    for one, other in combinations(METHODS, 2):
        reason = refusal(METHODS[one](), METHODS[other]())
        if "none" in (one, other):
            assert reason and "takes nothing away" in reason
        elif "mamba" in (one, other) and {"teal", "q8", "q4"} & {one, other}:
            assert reason and "replaces the attention" in reason
        elif {one, other} <= packed | {"q8", "q4"}:
            assert reason and "same part" in reason
        elif packed & {one, other} and not {"static", "mamba"} & {one, other}:
            assert reason and "rows or columns" in reason
        else:
            assert reason is None, (one, other)
    assert refusal(Nf4(), Teal(where="attention")) is None
    with pytest.raises(CapreseError, match=r"nf4 and griffin do not compose: nf4 packs the FFN weights"):
        caprese.apply(tiny_llama(), [Nf4(), Griffin()])
    with pytest.raises(CapreseError, match="no efficient method"):
        caprese.apply(tiny_llama(), [])


def test_they_act_in_one_order_however_given():
    assert [m.name for m in compose([Cats(), Griffin(), Static()])] == ["static", "griffin", "cats"]
    assert [m.name for m in compose([Int8(), Static()])] == ["static", "int8"]


def test_a_method_chooses_among_what_the_one_before_it_left():
    model = tiny_llama()
    methods = [Static(sparsity=0.5), Griffin(sparsity=0.5)]
    ids = torch.randint(2, 258, (1, 9), generator=torch.Generator().manual_seed(2))
    caprese.apply(model, methods, calibration=calibrate(model, methods, rows()))
    out = model(ids, use_cache=True)
    model(ids[:, :1], past_key_values=out.past_key_values, use_cache=True)
    wrapper = next(iter(applied_ffns(model).values()))
    memory = memory_of(out.past_key_values).layers[0]
    assert wrapper.transformed.width == 48 and memory.packed.width == 24
    kept = memory.choices["griffin"]
    assert kept.shape == (1, 1, 48) and int(kept.sum()) == 24


def test_calibration_is_asked_for_and_must_fit():
    with pytest.raises(CapreseError, match="static chooses from samples and has none"):
        caprese.apply(tiny_llama(), Static())
    narrow = tiny_llama(intermediate_size=64)
    calibration = calibrate(tiny_llama(), Static(sparsity=0.1), rows())
    with pytest.raises(CapreseError, match="made for another model"):
        caprese.apply(narrow, Static(sparsity=0.1), calibration=calibration)
    assert not applied_ffns(narrow)
    with pytest.raises(CapreseError, match="no completion token"):
        calibrate(tiny_llama(), Static(), [Tokens(torch.ones(1, 3, dtype=torch.long), torch.tensor([3]))])


@pytest.mark.parametrize(
    ("made", "applied"),
    [
        (Static(sparsity=0.1), Static(sparsity=0.5)),
        (Teal(where="ffn"), Teal()),
        (Teal(), Teal(where="ffn")),
    ],
)
def test_a_calibration_with_other_settings_is_refused(made, applied):
    model = tiny_llama()
    with pytest.raises(CapreseError, match=r"(static|teal) was made .* with other settings; calibrate again"):
        caprese.apply(model, applied, calibration=calibrate(model, made, rows()))
    assert not applied_ffns(model)


def prior_choices(model: object, ids: torch.Tensor) -> list[torch.Tensor]:
    """What GRIFFIN chose for each layer after a prompt."""
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values  # type: ignore[operator]
        model(input_ids=ids[:, :1], past_key_values=cache)  # type: ignore[operator]
    layers = memory_of(cache).layers
    return [layers[i].choices["griffin"] for i in sorted(layers) if "griffin" in layers[i].choices]


@pytest.mark.parametrize("before", [[], [Static(sparsity=0.3, layers=[0, 2])]])
def test_griffin_with_a_prior_from_samples_to_disk_and_back(before, tmp_path):
    model = tiny_llama()
    methods = [*before, Griffin(score="output", prior=50)]
    known = calibrate(model, methods, rows())
    ids = rows()[0].ids[:2, :5]
    caprese.apply(model, methods, calibration=known)
    chosen = prior_choices(model, ids)
    adapted = caprese.adapters.attach_adapter(model, 4)
    caprese.save(adapted, tmp_path)
    fresh = caprese.load(tiny_llama(), tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(chosen, prior_choices(fresh, ids), strict=True))
    plain = caprese.apply(tiny_llama(), Griffin(score="output"))
    if not before:
        assert any(not torch.equal(a, b) for a, b in zip(chosen, prior_choices(plain, ids), strict=True))
    fused = caprese.load(tiny_llama(), tmp_path, fused=True)
    facts = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    assert torch.equal(fused.generate(input_ids=ids, **facts), fresh.generate(input_ids=ids, **facts))


def test_a_prior_with_a_choice_for_the_batch_is_refused():
    with pytest.raises(CapreseError, match="prior and shared_choice do not go together"):
        resolve_recipe(model="smollm2-135m", method="griffin:0.5:prior=8:shared_choice=true")


def test_a_prior_of_another_width_is_refused():
    both = [Static(sparsity=0.5), Griffin(prior=8)]
    model = tiny_llama()
    together, alone = calibrate(model, both, rows()), calibrate(model, both[1], rows())
    for methods, known in ((both[1], together), (both, {**together, **alone})):
        with pytest.raises(CapreseError, match=r"calibration of griffin was made for another model or with other"):
            caprese.apply(model, methods, calibration=known)
    caprese.apply(model, both, calibration=together)


def test_the_neurons_that_static_leaves_are_looked_up_not_copied(monkeypatch):
    model, methods = tiny_llama(), [Static(sparsity=0.5), Cats(threshold="calibrated")]
    built = []
    transform = Static.transform
    monkeypatch.setattr(Static, "transform", lambda *args: built.append(1) or transform(*args))
    once = calibrate(model, methods, rows())
    count = len(built)
    again = calibrate(model, methods, rows() * 4)
    assert len(built) == 2 * count == 6
    assert once.keys() == again.keys() and torch.equal(once["static.0"], again["static.0"])


def test_greedy_teal_above_its_cap():
    ids = torch.randint(2, 258, (4, 40), generator=torch.Generator().manual_seed(1))
    calibration = calibrate(tiny_llama(), Teal(sparsity=0.98), [Tokens(ids, [1, 1, 1, 1])])
    uniform = calibrate(tiny_llama(), Teal(sparsity=0.98, greedy=False), [Tokens(ids, [1, 1, 1, 1])])
    assert all(torch.allclose(calibration[name], choice, rtol=1e-3) for name, choice in uniform.items())


def test_greedy_teal_looks_at_the_first_batch_with_completions():
    model, (one,) = tiny_llama(), rows()
    none, long = Tokens(one.ids[:1, :4], [4]), Tokens(one.ids, [1, 2, 3, 4])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Teal, "fit", lambda self, statistic, ffn, block: block.completion)
        assert calibrate(model, Teal(), [none, one, long])["teal.0"].equal(one.completion())


def test_a_sparsity_for_each_layer():
    model = tiny_llama()
    caprese.apply(model, Griffin(sparsity=[0.25, 0.5], layers=[0, 2]))
    wrappers = list(applied_ffns(model).values())
    assert [(w.layer, w.methods[0].kept(96)) for w in wrappers] == [(0, 72), (2, 48)]
    caprese.remove(model)
    with pytest.raises(CapreseError, match="2 sparsities were given for 3 layers"):
        caprese.apply(model, Griffin(sparsity=[0.25, 0.5]))


def test_methods_on_different_layers(tiny):
    ids = torch.randint(2, 258, (1, 9), generator=torch.Generator().manual_seed(2))
    caprese.apply(tiny, [Griffin(layers=[0]), Cats(layers=[2])])
    assert {w.layer: [m.name for m in w.methods] for w in applied_ffns(tiny).values()} == {0: ["griffin"], 2: ["cats"]}
    assert tiny.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None).shape == (1, 13)


def test_a_missing_bitsandbytes_is_one_line(monkeypatch, tiny):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    before = list(tiny.state_dict())
    with pytest.raises(CapreseError, match=r"pip install 'caprese\[quantized\]'"):
        caprese.apply(tiny, Nf4())
    assert list(tiny.state_dict()) == before and not applied_ffns(tiny)


def test_greedy_teal_spends_its_sparsity_where_it_costs_least():
    model = tiny_llama()
    rates = {}
    for greedy in (False, True):
        method = Teal(sparsity=0.5, greedy=greedy)
        calibration = calibrate(model, method, rows())
        caprese.apply(model, method, calibration=calibration)
        wanted = rows()[0]
        with caprese.dense(model):
            target = model(wanted.ids).logits
        with caprese.phases(model, wanted.prompt_lengths):
            got = model(wanted.ids).logits
        rates[greedy] = float((got - target)[wanted.completion()].square().mean())
        assert calibration["teal.0"].shape == (1, 7)
        caprese.remove(model)
    assert rates[True] < rates[False]


@pytest.fixture(scope="module")
def third_party(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The package of docs/methods.md, installed by pip into a directory of its own."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    blocks = dict(re.findall(r"```(?:toml|python)\n# ([\w.]+)\n(.*?)```", DOCS.read_text(), re.DOTALL))
    assert blocks.keys() == {"pyproject.toml", "caprese_topk.py"}
    for name, text in blocks.items():
        (source / name).write_text(text)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*pip, "--target", target, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {**os.environ, "PYTHONPATH": str(target)}


@pytest.mark.slow
def test_the_example_of_the_docs_is_a_method(third_party, tiny_dir, tmp_path):
    caprese_ = [sys.executable, "-m", "caprese"]
    listed = subprocess.run([*caprese_, "methods", "--json"], capture_output=True, text=True, env=third_party)
    facts = json.loads(listed.stdout)
    assert facts["methods"]["topk"]["acts_on"] == ["neurons"]
    assert facts["composition"]["topk"]["topk"]["ffn_weights_read"] == {"gated": 0.833, "plain": 0.75}
    assert not facts["composition"]["topk"]["cats"]["composes"]
    command = "recover --method static:0.2+topk:0.5 --rank 2 --prompts gym:simple_equations --samples 8 --epochs 1"
    recipe = tmp_path / "small.yaml"
    recipe.write_text(
        "samples: {validation: 2, test: 2, elsewhere: 0, max_new_tokens: 8}\n"
        "end_to_end: {batch_size: 4, micro_batch: 4}\n"
        "evaluation: {latency_tokens: 2}\n"
    )
    out = tmp_path / "out"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "caprese",
            *command.split(),
            "--recipe",
            recipe,
            "--model",
            tiny_dir,
            "-o",
            out,
            "--json",
        ],
        capture_output=True,
        text=True,
        env=third_party,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["method"] == "static+topk"
    answer = [sys.executable, "-m", "caprese", "generate", "--model", tiny_dir, "--adapter", out, "--prompt", "1 + 1"]
    known = subprocess.run(
        [*answer, "--max-new-tokens", "3", "--json"], capture_output=True, text=True, env=third_party
    )
    assert known.returncode == 0 and json.loads(known.stdout)["new_tokens"] == 3
    # where the package is not installed, the adapter says what it needs
    unknown = subprocess.run(answer, capture_output=True, text=True)
    assert unknown.returncode == 1 and "needs the method 'topk'" in unknown.stderr and "Traceback" not in unknown.stderr


def spelled(**raw: Any) -> Recipe:
    return Recipe.model_validate(raw)


@pytest.mark.parametrize(
    "ways",
    [
        [
            {"method": "griffin:0.6"},
            {"method": "griffin", "sparsity": 0.6},
            {"methods": [{"name": "griffin", "sparsity": 0.6}]},
        ],
        [
            {"method": "static:0.3+cats:0.5"},
            {"method": "cats:0.5 + static:0.3"},
            {"method": "cats+static:0.3", "sparsity": 0.5},
        ],
        [{"method": "griffin", "layers": [0, 1]}, {"method": "griffin:layers=[0, 1]"}],
        [{}, {"method": "griffin"}, {"sparsity": 0.5}, {"method": "griffin:prior=0"}],
        [{"sparsity": "auto", "target_kl": 0.1}, {"target_kl": 0.1}],
        [
            {"method": "teal:0.4"},
            {"method": "teal", "sparsity": [0.4, 0.4, 0.4]},
            {"method": "teal:0.4:layers=[2, 0, 1]"},
        ],
    ],
)
def test_ways_to_spell_one_run_are_one_run(ways):
    from caprese.recovery.run import identity_of

    recipes = [spelled(**raw) for raw in ways]
    recipes += [Recipe.model_validate(yaml.safe_load(recipe.to_yaml())) for recipe in recipes]

    def identity(recipe: Recipe) -> str:
        return identity_of(recipe, [methods_by_layer(recipe.methods, 3)], {"ffn": "x"})

    assert len({identity(recipe) for recipe in recipes}) == 1
    for other in ("griffin:0.7", "teal:0.4:layers=[0, 1]"):
        assert identity(spelled(method=other)) != identity(recipes[0])


def test_a_copy_of_a_recipe_is_checked():
    recipe = Recipe(method="teal:0.4", seed=3)
    assert recipe.model_copy(update={"method": "cats", "sparsity": 0.3}).methods == (Cats(sparsity=0.3),)
    assert recipe.model_copy(update={"sparsity": 0.3}) == Recipe(method="teal:0.3", seed=3)
    for wrong in ({"methd": "cats"}, {"seed": -1}, {"threshold": "calibrated"}):
        with pytest.raises(CapreseError, match="unknown key 'methd'|seed: |no setting of teal"):
            recipe.model_copy(update=wrong)


def test_flags_on_top_of_a_written_recipe(tmp_path):
    """What a run wrote beside its result, and what is then asked for otherwise."""
    file = tmp_path / "recipe.yaml"
    file.write_text(spelled(method="static:0.3+cats:0.5", layers=[0, 2], reselect_every=8).to_yaml())

    def lines(**over: Any) -> list[str]:
        return [f"{m} {m.layers}" for m in resolve_recipe(str(file), **over).methods]

    assert lines() == ["static:0.3 [0, 2]", "cats:0.5 [0, 2]"]
    assert lines(sparsity=0.4, layers="all") == ["static:0.4 all", "cats:0.4 all"]
    assert lines(method="griffin") == ["griffin:0.5 [0, 2]"]
    assert lines(threshold="calibrated")[1] == "cats:0.5:threshold=calibrated [0, 2]"
    with pytest.raises(CapreseError, match="`keep_attention` is no setting of static.cats"):
        lines(keep_attention=0.5)
    for given in ({"method": "griffin:0.5"}, {"method": "griffin", "sparsity": 0.5}):
        with pytest.raises(CapreseError, match="`target_kl` goes with"):
            spelled(target_kl=0.1, **given)
    with pytest.raises(CapreseError, match="leave out `method`"):
        spelled(methods=[{"name": "griffin"}], method="cats")
    file.write_text(spelled(target_kl=0.2).to_yaml())
    assert resolve_recipe(str(file)).allocates and not resolve_recipe(str(file), sparsity=0.5).allocates
    assert (
        not resolve_recipe(str(file), method="cats:0.4").allocates
        and resolve_recipe(str(file), method="cats").allocates
    )


@pytest.mark.parametrize("value", ["9" * 5000, "[" * 3000, "layers=" + "9" * 5000])
def test_a_value_that_is_none_is_refused(value):
    with pytest.raises(CapreseError, match="write NAME, NAME:SPARSITY or NAME:key=value"):
        parse_methods(f"griffin:{value}")
