"""Repeated sampling: estimators against enumeration, answers of one prompt drawn together, and the whole command."""

from __future__ import annotations

import itertools
import json
import random
import re
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, recovered, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification
from typer.testing import CliRunner

import caprese
from caprese.cli import app
from caprese.data_gen import Prompt, load_prompts
from caprese.data_gen.chains import SPLITS, chains, line_is_right, make_chain, soundness, split_of
from caprese.evaluation.accuracy import Marker, is_correct
from caprese.evaluation.estimators import interval, pass_at, vote
from caprese.evaluation.fidelity import variant
from caprese.evaluation.rewards import reward_scorer
from caprese.inference.generate import completions, generate
from caprese.inference.sampling import nucleus
from caprese.models.cache import roomy_cache
from caprese.studies.equal_time import Raw, at, comparison, first, time_of_dense
from caprese.studies.scaling import cache_bytes, sizes_of


@given(st.lists(st.booleans(), min_size=1, max_size=9), st.data())
def test_coverage_is_the_mean_over_all_subsets(right: list[bool], data: st.DataObject) -> None:
    n = data.draw(st.integers(1, len(right)))
    subsets = list(itertools.combinations(right, n))
    assert pass_at(n, right) == pytest.approx(sum(any(s) for s in subsets) / len(subsets))


@given(st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1, max_size=7), st.data())
def test_votes_are_the_mean_over_all_subsets(answers: list[str | None], data: st.DataObject) -> None:
    n = data.draw(st.integers(1, len(answers)))
    weights = data.draw(st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=len(answers), max_size=len(answers)))
    right = [a == "a" for a in answers]
    for used in (None, weights):
        expected = 0.0
        subsets = list(itertools.combinations(range(len(answers)), n))
        for subset in subsets:
            tally = {
                a: sum((used[i] if used else 1) for i in subset if answers[i] == a)
                for a in {answers[i] for i in subset} - {None}
            }
            winners = [a for a, w in tally.items() if w == max(tally.values())]
            expected += ("a" in winners) / len(winners) if winners else 0
        assert vote(n, answers, right, used) == pytest.approx(expected / len(subsets))


def test_votes_of_many_samples_are_close_to_all() -> None:
    answers = ["a"] * 9 + ["b"] * 7
    right = [a == "a" for a in answers]
    exact = sum(
        1.0 if s.count("a") > s.count("b") else 0.5 if s.count("a") == s.count("b") else 0.0
        for s in itertools.combinations(answers, 6)
    ) / len(list(itertools.combinations(answers, 6)))
    assert vote(6, answers, right) == pytest.approx(exact, abs=0.1)
    assert vote(6, answers, right) == vote(6, answers, right)


@pytest.mark.parametrize("n", [0, 4])
def test_more_samples_than_there_are(n: int) -> None:
    with pytest.raises(ValueError, match=f"{n} of 3 samples"):
        pass_at(n, [True, False, False])
    with pytest.raises(ValueError, match=f"{n} of 3 samples"):
        vote(n, ["a", "b", "c"], [True, False, False])


def test_intervals_hold_the_mean() -> None:
    values = [float(i % 3 == 0) for i in range(90)]
    low, high = interval(values)
    assert 0.2 < low < 1 / 3 < high < 0.5
    assert interval([1.0] * 10) == (1.0, 1.0)


def test_times_between_measurements() -> None:
    assert at([1, 2, 4], [0.1, 0.3, 0.5], 3) == pytest.approx(0.4)
    assert at([1, 2, 4], [0.1, 0.3, 0.5], 0.5) is None
    assert at([1, 2, 4], [0.1, 0.3, 0.5], 9) == 0.5
    assert first([1, 2, 4], [0.1, 0.3, 0.5], 0.4) == pytest.approx(3)
    assert first([1, 2, 4], [0.1, 0.3, 0.5], 0.6) is None
    assert first([1, 2, 4], [0.1, 0.3, 0.5], 0.05) == 1
    one = {"n": [1, 4], "seconds": [1.0, 4.0], "coverage": [0.5, 0.8], "majority": [0.5, 0.6]}
    fast = {"n": [1, 4], "seconds": [0.5, 2.0], "coverage": [0.4, 0.8], "majority": [0.4, 0.5]}
    assert at([1, 2, 2, 5], [0.1, 0.2, 0.3, 0.4], 2.0) == 0.3 and at([1, 1, 2], [0.1, 0.2, 0.3], 1) == 0.2
    wavering = {"n": [1, 2, 4], "seconds": [2.0, 1.9, 3.0], "coverage": [0.1, 0.2, 0.3], "majority": [0.1, 0.2, 0.3]}
    assert comparison({"dense": wavering})["at_equal_time"][0]["seconds"] == 1.9
    found = comparison({"dense": one, "recovered": fast})
    assert found["at_equal_time"][1]["coverage"] == {"dense": 0.8, "recovered": 0.8}
    assert found["seconds_to_reach_dense"]["coverage"] == {"dense": 4.0, "recovered": 2.0}
    assert found["seconds_to_reach_dense"]["majority"]["recovered"] is None


HEADS = {"keep_heads": ["0/0", "2/3"]}


def test_the_time_of_dense_with_its_interval() -> None:
    """Problems whose answers are alike: the ratio is that of the times, whichever problems are resampled."""
    problems = 16
    metrics = {"coverage": [[0.5, 0.75, 1.0]] * problems}
    dense = Raw([[1.0 + i, 2.0 + 2 * i, 4.0 + 4 * i] for i in range(problems)], metrics)
    half = Raw([[t / 2 for t in row] for row in dense.seconds], metrics)
    found = time_of_dense({"dense": dense, "half": half}, "half", "coverage")
    assert found["ratio"] == pytest.approx(0.5) and found["interval"] == pytest.approx([0.5, 0.5])
    assert found["reached"] == 1
    uneven = Raw([[t / (1 + i % 2) for t in row] for i, row in enumerate(dense.seconds)], metrics)
    low, high = time_of_dense({"dense": dense, "x": uneven}, "x", "coverage")["interval"]
    assert 0.5 < low < 0.75 < high < 1
    worse = Raw(half.seconds, {"coverage": [[0.5, 0.5, 0.5 + 0.5 * (i > 3)] for i in range(problems)]})
    found = time_of_dense({"dense": dense, "x": worse}, "x", "coverage")
    assert found["ratio"] is None and found["interval"] is None and found["reached"] < 0.1


@pytest.mark.parametrize(("keep", "more"), [(None, {}), (0.5, {}), (0.0, {}), (0.0, {"window": 4}), (0.0, HEADS)])
def test_bytes_of_a_cache(keep, more) -> None:
    """What is foreseen from a short text is what a long one takes."""
    model = tiny_llama()
    if keep is not None:
        model = caprese.apply(model, caprese.Mamba(keep_attention=keep, **more))
    caches = []
    for length in (5, 37):
        cache = roomy_cache(model)
        model(torch.full((1, length), 3), past_key_values=cache, use_cache=True)
        caches.append(cache)
    assert cache_bytes(caches[0], 37) == cache_bytes(caches[1], 37)
    assert (cache_bytes(caches[0], 74) == cache_bytes(caches[0], 37)) == (keep == 0.0 and more is not HEADS)
    if more is HEADS:  # two heads of 8, keys and values in float32
        grown = cache_bytes(caches[0], 74) - cache_bytes(caches[0], 37)
        assert grown == 37 * 2 * 2 * 8 * 4
    if keep is None:
        assert cache_bytes(caches[1], 37) == sum(layer.keys.nbytes + layer.values.nbytes for layer in caches[1].layers)


def test_sizes() -> None:
    assert sizes_of(1) == [1] and sizes_of(16) == [1, 2, 4, 8, 16] and sizes_of(20) == [1, 2, 4, 8, 16, 20]
    assert sizes_of([4, 16, 20]) == [4, 16, 20]
    for refused in (0, [], [0, 4], [4, 4], [16, 4]):
        with pytest.raises(caprese.CapreseError, match="ascending"):
            sizes_of(refused)


def sample(model, prompt: list[int], count: int, ends, temperature: float, tokens: int = 12) -> list[list[int]]:
    sampler = nucleus(count, temperature, 1.0, 1, torch.device("cpu"))
    return completions(generate(model, [prompt], tokens, sampler, ends=ends, copies=count), count)


def test_samples_together_are_samples_alone() -> None:
    """At almost no temperature every sequence is the greedy one, whenever its neighbours leave the batch."""
    model = tiny_llama()
    prompt = list(range(2, 12))
    greedy = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None)[0, 10:]
    end = int(greedy[6])
    cut = greedy.tolist()[: greedy.tolist().index(end) + 1]
    for ends, expected in (([], greedy.tolist()), ([end], cut)):
        assert sample(model, prompt, 3, ends, temperature=1e-4) == [expected] * 3
    several = sample(model, prompt, 8, range(0, 258, 9), temperature=1.5)
    assert several == sample(model, prompt, 8, range(0, 258, 9), temperature=1.5)
    assert len({len(s) for s in several}) > 1
    for answer in several:
        assert all(token % 9 for token in answer[:-1]) and (len(answer) == 12 or answer[-1] % 9 == 0)


@pytest.mark.parametrize("kind", ["fetching", "local"])
def test_long_chains(kind: str) -> None:
    """Every line is right, the answer is Python's, and what a line needs is where it is said to be."""
    rows = list(itertools.islice(chains("test", 0, kind=kind), 60))
    assert rows == list(itertools.islice(chains("test", 0, kind=kind), 60))
    assert {row.question for row in rows}.isdisjoint(
        row.question for row in itertools.islice(chains("train", 0, kind=kind), 300)
    )
    unsorted = 0
    for row in rows:
        lines = row.working.split("\n")
        assert 21 <= row.steps <= 40 and len(lines) == row.steps + 1 and lines[-1] == f"={row.answer}"
        assert soundness(row.working) == 1 and split_of(row.question) == "test"
        if kind == "fetching":
            [(count, first)] = re.findall(r"^\((\d\d)\)(\d{4})\(", row.question)
            given = re.findall(r"\((\d)([+-])(\d{4})\)", row.question)
            table = {digit: (sign, b) for digit, sign, b in given}
            assert int(count) == row.steps and 1 <= len(given) == len(table) <= 10
            unsorted += given != sorted(given)
            value = int(first)
            for left, line in zip(range(row.steps, 0, -1), lines, strict=False):
                sign, b = table[f"{value:04}"[1]]
                assert line.startswith(f"({left:02})({f'{value:04}'[1]}{sign}{b}){value:04}{sign}{b}:")
                value = (value + int(sign + b)) % 10_000
            assert value == int(row.answer)
        else:
            a, b = map(int, row.question[4:].split("+"))
            for left, line in zip(range(row.steps, 0, -1), lines, strict=False):
                assert line.startswith(f"({left:02}){a:04}+{b:04}:")
                a, b = b, (a + b) % 10_000
            assert b == int(row.answer) and int(row.question[1:3]) == row.steps
    assert unsorted > 50 or kind == "local"
    [asked] = load_prompts(f"{kind}:test", 1, 0)
    assert (asked.text, asked.answer) == (rows[0].question, rows[0].answer)


def test_retrieval() -> None:
    """What is asked for is in the question, once, beside its key; right answers are marked so, in any words."""
    for row in itertools.islice(chains("test", 0, kind="retrieval"), 40):
        known = dict(re.findall(r"^(\w+): (\d+)$", row.question, re.MULTILINE))
        [asked] = re.findall(r"\((.+)\)", row.question)
        assert row.answer == f"({', '.join(known[key] for key in asked.split(', '))})"
        assert 8 <= row.steps <= 32 and len(known) == len(set(known.values())) == row.steps
    [problem] = load_prompts("retrieval:test", 1, 0)
    assert problem.answer is not None
    marker = Marker(problem)
    assert marker(f"The values are {problem.answer}.")[1] and not marker("(1000, 1001, 1002, 1003)")[1]


def test_chains_are_right_and_disjoint() -> None:
    seen: dict[str, set[str]] = {}
    for split in SPLITS:
        rows = list(itertools.islice(chains(split, 0), 300))
        assert rows == list(itertools.islice(chains(split, 0), 300))
        seen[split] = {row.question for row in rows}
        for row in rows:
            assert eval(row.question) == int(row.answer) and split_of(row.question) == split
            assert row.working.endswith(f"={row.answer}") and 50 <= len(row.working) <= 200
            assert sum(row.question.count(sign) for sign in "+-*") == row.steps
            assert soundness(row.working) == 1
    for one, other in itertools.combinations(SPLITS, 2):
        assert not seen[one] & seen[other]
    assert {row.steps for row in itertools.islice(chains("test", 1), 100)} == {3, 4, 5, 6}
    assert {row.steps for row in itertools.islice(chains("test", 1, 5), 20)} == {5}


@settings(max_examples=50)
@given(st.integers(0, 10**6), st.data())
def test_a_wrong_digit_is_found(seed: int, data: st.DataObject) -> None:
    lines = make_chain(3, random.Random(seed)).working.split("\n")[:-1]
    line = data.draw(st.sampled_from(lines))
    assert not line_is_right("0001-0002:19191919>9999") and not line_is_right("(05+0009)0100+0007:07000100>0107")
    place = data.draw(st.integers(line.index(":") + 1, len(line) - 1))
    if line[place] == ">":
        return
    wrong = line[:place] + str((int(line[place]) + data.draw(st.integers(1, 9))) % 10) + line[place + 1 :]
    assert line_is_right(line) and not line_is_right(wrong)


def test_bad_chains() -> None:
    with pytest.raises(caprese.CapreseError, match="no split 'dev'; it has test"):
        next(chains("dev", 0))
    with pytest.raises(caprese.CapreseError, match="3 to 6 steps, not 9"):
        next(chains("test", 0, 9))


def test_marks() -> None:
    problem = next(chains("test", 3))
    mark = Marker(Prompt(problem.question, problem.answer))
    assert mark.able and mark(problem.working) == (problem.answer, True)
    assert mark(problem.working + "1")[1] is False and mark("") == (None, False)
    assert not Marker(Prompt("Which colour?", "red")).able
    [grid] = load_prompts("gym:rotate_matrix", 1, 0)  # no number: its task's own scorer marks it
    mark = Marker(grid)
    assert mark.able and mark(f"Turned:\n<answer>{grid.answer}</answer>") == (grid.answer, True)
    assert mark("<answer>1 2</answer>") == ("1 2", False) and mark("") == (None, False)
    assert mark("a\n 7 ") == ("7", False)
    mark = Marker(Prompt("7/14 = ?", "so\n#### 1/2"))
    assert mark("it is $\\frac{1}{2}$") == mark("1/2") == ("1/2", True)
    assert mark("1/2", ended=False) == (None, False)
    assert mark("so \\boxed{1/2} it is, as 3", ended=False) == ("1/2", True)
    for text in (
        "9**(99)**(99)",
        "9**(99*99*99*99)",
        "99999999!",
        "9**9**9**9",
        "$9^{9^{9^{9}}}$",
        "$123456789^{987654321}$",
    ):  # nothing waits for these
        assert mark(text) == (None, False) and is_correct(text, "4") is False


def test_reward_models(tmp_path: Path) -> None:
    """Real ones, tiny: a causal model's likelihood, and a classifier; a verifier; an oracle."""
    model = tiny_llama()
    model.save_pretrained(tmp_path / "causal")
    byte_tokenizer().save_pretrained(tmp_path / "causal")
    score = reward_scorer(f"causal:{tmp_path / 'causal'}", "cpu")
    words = byte_tokenizer()
    asked, said = words("1+1\n").input_ids, words("=2", add_special_tokens=False).input_ids
    with torch.no_grad():
        scores = model.float()(torch.tensor([asked + said])).logits[0, len(asked) - 1 : -1].log_softmax(-1)
    expected = scores.gather(1, torch.tensor(said)[:, None]).mean().exp()
    assert score(Prompt("1+1", "2"), "=2") == pytest.approx(float(expected), rel=1e-4)
    assert score(Prompt("1+1", "2"), "") == 0
    judge = AutoModelForSequenceClassification.from_config(model.config)
    judge.save_pretrained(tmp_path / "judge")
    byte_tokenizer().save_pretrained(tmp_path / "judge")
    score = reward_scorer(str(tmp_path / "judge"), "cpu")
    assert 0 < score(Prompt("1+1", "2"), "=2") < 1
    assert score(Prompt("1+1", "2"), "=2") != score(Prompt("1+1", "2"), "=9")
    with pytest.raises(caprese.CapreseError, match=r"is no sequence classifier.*give causal:"):
        reward_scorer(str(tmp_path / "causal"), "cpu")
    problem = next(chains("test", 3))
    prompt = Prompt(problem.question, problem.answer)
    assert reward_scorer("oracle")(prompt, problem.working) == 1 and reward_scorer("oracle")(prompt, "=0") == 0
    assert reward_scorer("chains")(prompt, problem.working) == 1 and reward_scorer("chains")(prompt, "=0") == 0


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and an adapter on disk."""
    path = tmp_path_factory.mktemp("scale")
    model = tiny_llama()
    model.save_pretrained(path / "model")
    byte_tokenizer().save_pretrained(path / "model")
    base, _ = caprese.load_base(str(path / "model"), dtype="float32")
    caprese.save(recovered(caprese.apply(base, caprese.Griffin(sparsity=0.5)), 2, 0.1), path / "adapter")
    return path


def run(made: Path, output: Path, *more: str) -> tuple[int, str]:
    args = ["scale", "--model", str(made / "model"), "--adapter", str(made / "adapter"), "--output", str(output)]
    args += ["--prompts", "chains:test", "--problems", "3", "--max-new-tokens", "8", "--dtype", "float32", *more]
    done = CliRunner().invoke(app, args)
    return done.exit_code, done.output


def test_the_command_and_going_on(made: Path, tmp_path: Path) -> None:
    how = ("--samples", "4", "--reward", "chains", "--reselect-every", "4")
    code, out = run(made, tmp_path / "out", *how, "--json")
    assert code == 0, out
    result = json.loads(out)
    assert result["problems"] == 3
    assert list(result["contenders"]) == ["dense", "efficient", "recovered", "recovered_reselect_4"]
    for found in result["contenders"].values():
        assert found["n"] == [1, 2, 4]
        for key in ("coverage", "majority", "best_of_n", "seconds", "tokens", "compute_units"):
            assert len(found[key]) == 3
        assert found["tokens"][2] == pytest.approx(4 * found["tokens"][0])
    assert result["contenders"]["dense"]["compute_units"] == [1, 2, 4]
    assert result["contenders"]["recovered"]["compute_units"][0] < 1
    assert (tmp_path / "out" / "scale.png").stat().st_size > 5000
    code, out = run(made, tmp_path / "dry", *how, "--dry-run", "--json")
    assert code == 0 and json.loads(out)["completions"] == 3 * 4 * 4 and not (tmp_path / "dry").exists()
    for name, found in result["contenders"].items():
        assert found["together"] == 64 and found["cache_bytes"] == result["contenders"]["dense"]["cache_bytes"], name
    assert set(result["time_of_dense"]) == {"coverage", "majority", "best_of_n"}
    files = sorted((tmp_path / "out" / "samples").iterdir())
    before = {path.name: path.stat().st_mtime_ns for path in files}
    assert len(files) == 3
    altered = files[0].read_text().replace('"count": 4', '"count": 5')
    for damage in ("{", "5", "{}", altered):  # drawn again
        files[0].write_text(damage)
        code, out = run(made, tmp_path / "out", *how)
        assert code == 0 and "majority at the time dense needs" in " ".join(out.split())
    after = {path.name: path.stat().st_mtime_ns for path in sorted((tmp_path / "out" / "samples").iterdir())}
    assert [name for name in before if before[name] != after[name]] == [files[0].name]
    code, out = run(made, tmp_path / "out", "--samples", "2")
    assert code == 1 and "holds samples of other settings" in " ".join(out.split())
    assert json.loads(files[1].read_text())["settings"]["count"] == 4
    assert run(made, tmp_path / "out", "--samples", "2", "--overwrite")[0] == 0
    code, out = run(made, tmp_path / "out", "--samples", "2,3", "--contenders", "dense", "--overwrite", "--json")
    assert code == 0 and json.loads(out)["contenders"]["dense"]["n"] == [2, 3]
    for refused in ("none", "3,2", "0"):
        code, out = run(made, tmp_path / "out", "--samples", refused)
        assert code == 1 and ("--samples N" in out or "ascending" in out), out


def test_other_adapters_and_memory(made: Path, tmp_path: Path) -> None:
    """A hybrid of the same base beside the adapter; samples that do not fit wait for their turn, and are the same."""
    base, _ = caprese.load_base(str(made / "model"), dtype="float32")
    hybrid = caprese.apply(base, caprese.Mamba(keep_attention=0.5))
    caprese.save(recovered(hybrid, 2, 0.1), tmp_path / "hybrid")
    names = ("--contenders", f"dense,recovered,{tmp_path / 'hybrid'}", "--samples", "4", "--temperature", "1e-3")
    code, out = run(made, tmp_path / "whole", *names, "--json")
    assert code == 0, out
    found = json.loads(out)["contenders"]
    assert list(found) == ["dense", "recovered", str(tmp_path / "hybrid")]
    dense, other = found["dense"]["cache_bytes"], found[str(tmp_path / "hybrid")]["cache_bytes"]
    assert other != dense
    code, out = run(made, tmp_path / "few", *names, "--json", "--memory", str(2.5 * dense / 1e9))
    assert code == 0, out
    few = json.loads(out)["contenders"]
    assert few["dense"]["together"] == 2 and few[str(tmp_path / "hybrid")]["together"] == int(2.5 * dense // other)
    for name in found:
        assert few[name]["coverage"] == found[name]["coverage"] and few[name]["tokens"] == found[name]["tokens"]
    code, out = run(made, tmp_path / "none", *names, "--memory", "1e-9")
    assert code == 1 and "lower max_new_tokens" in " ".join(out.split())
    code, out = run(made, tmp_path / "twice", "--contenders", "dense,dense")
    assert code == 1 and "contender dense is named twice" in " ".join(out.split())


def test_samples_of_a_recovered_model_are_those_drawn_alone(made: Path) -> None:
    """Greedy, fused, with reselection, each sequence leaving the batch at its own end; then other contenders."""
    base, _ = caprese.load_base(str(made / "model"), dtype="float32")
    model = caprese.load(base, made / "adapter", fused=True)
    prompt = list(range(2, 12))

    def drawn(name: str, count: int, every: int | None) -> list[list[int]]:
        with variant(model, name), caprese.reselection(model, every):
            return sample(model, prompt, count, [], 1e-4, 14)

    def alone(name: str, every: int | None) -> list[int]:
        with variant(model, name), caprese.reselection(model, every):
            out = model.generate(
                input_ids=torch.tensor([prompt]), max_new_tokens=14, do_sample=False, eos_token_id=None
            )
        return out[0, 10:].tolist()

    cases = [("dense", None), ("efficient", None), ("recovered", None), ("recovered", 4)]
    expected = {case: alone(*case) for case in cases}
    assert len({tuple(each) for each in expected.values()}) > 2
    for case in [*cases, *reversed(cases)]:
        assert drawn(case[0], 3, case[1]) == [expected[case]] * 3


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--contenders", "dense,fast"], "no contender fast"),
        (["--prompts", "chains:dev"], "no split 'dev'"),
        (["--reward", "nowhere"], "cannot load the reward model 'nowhere'"),
        (["--reward", "owner/nowhere"], "cannot load the reward model 'owner/nowhere'"),
        (["--temperature", "0"], "temperature: input should be greater than or equal to 0.0001"),
    ],
)
def test_bad_input(made: Path, tmp_path: Path, more: list[str], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # with which huggingface_hub waits for a hub, 40 s
    code, out = run(made, tmp_path / "out", *more)
    assert code == 1 and says in " ".join(out.split())
