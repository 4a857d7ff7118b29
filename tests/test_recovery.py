"""The whole job: what it leaves, and what a kill at any moment costs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from contextlib import suppress
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import byte_tokenizer, tiny_llama
from peft import PeftModel
from safetensors.torch import load_file

import caprese
from caprese.data_gen import Here, Sample, read_shard
from caprese.files import read_sealed
from caprese.models import Base, save_base
from caprese.recipes import Recipe, resolve_recipe
from caprese.recovery import stages
from caprese.recovery.run import Run
from caprese.recovery.stages import Calibrating

LEFT = {
    "adapter_config.json",
    "adapter_model.safetensors",
    "caprese_config.json",
    "recipe.yaml",
    "report.json",
    "report.html",
    "README.md",
    "plots",
    "samples",
}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.slow
def test_a_teacher_of_ones_own_draws_the_samples(small_recipe, tmp_path):
    """The model itself as one draws what it does without; an engine's are kept, and nobody is asked again."""
    model, tokenizer = tiny_llama(), byte_tokenizer()
    asked = []

    class Watched(Here):
        def complete(self, *args, **named):
            for shard in super().complete(*args, **named):
                asked.append(len(shard))
                yield shard

    def samples(where: str, teacher: Here | None, by: str) -> dict[str, list[Sample]]:
        settings = small_recipe.model_dump() | {
            "output": str(tmp_path / where),
            "samples": small_recipe.samples.model_dump() | {"teacher": by},
            "layerwise": {"how": "none"},
            "end_to_end": {"epochs": 0},
            "evaluation": {"latency_tokens": 0, "generate": False},
        }
        report = caprese.recover(model, tokenizer, Recipe(**settings), teacher=teacher)
        assert report["recipe"]["samples"]["teacher"] == by
        return {path.name: read_shard(path) for path in sorted((tmp_path / where / "samples").iterdir())}

    want = samples("without", None, "here")
    assert samples("with", Watched(model, tokenizer), "here") == want
    assert sum(asked) == sum(map(len, want.values()))
    assert samples("engine", Watched(model, tokenizer), "endpoint") == want
    for gone in ("report.json", ".state"):
        path = tmp_path / "engine" / gone
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    assert samples("engine", None, "endpoint") == want

    class Another:
        note = ""

        def __init__(self):
            self.model, self.tokenizer = model, tokenizer

    with pytest.raises(caprese.CapreseError, match=r"wants `samples\.teacher` to say so; set it to endpoint"):
        samples("another", Another(), "here")


@pytest.mark.parametrize("method", ["griffin", "cats"])
def test_the_whole_job(small_recipe, tmp_path, method):
    model, tokenizer = tiny_llama(), byte_tokenizer()
    ids = torch.tensor([[40, 41, 42, 43]])
    before = model(ids).logits
    recipe = small_recipe.model_copy(update={"method": method, "sparsity": 0.6})
    report = caprese.recover(model, tokenizer, recipe)
    out = Path(recipe.output)

    assert torch.equal(model(ids).logits, before)  # the model comes back as it was
    assert {p.name for p in out.iterdir()} == LEFT
    assert report == read_sealed(out / "report.json", "")
    for key in ("model", "method", "sparsity", "rank", "layers", "seed", "parameters", "quality", "recovered_fraction"):
        assert key in report
    q = report["quality"]
    assert q["dense"]["kl"] == 0 < q["recovered"]["kl"] < q["efficient"]["kl"]
    fraction = (q["recovered"]["kl"] - q["efficient"]["kl"]) / (0 - q["efficient"]["kl"])
    assert report["recovered_fraction"]["kl"] == pytest.approx(fraction)
    assert report["parameters"]["adapter"] == 3 * 2 * 32 * 4
    assert [s["name"] for s in report["stages"]] == ["samples", "layerwise", "end_to_end", "evaluation"]
    if sys.platform == "linux":
        assert all(stage["peak_bytes"] > 0 for stage in report["stages"])
    assert all(v["ttnt_ms"] > 0 for k, v in report["latency"].items() if isinstance(v, dict))
    assert len(report["layers_error"]) == 3
    assert Recipe.model_validate(report["recipe"]).rank == 4
    for row in report["layers_error"]:
        assert row["recovered"] <= row["efficient"] * 1.05

    loaded = caprese.load(model, out)
    tokens = loaded.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
    applied = caprese.apply(caprese.remove(loaded), recipe.methods)
    plain = PeftModel.from_pretrained(applied, str(out))  # PEFT alone, on an applied base
    assert torch.equal(plain.generate(input_ids=ids, max_new_tokens=6, do_sample=False), tokens)
    with pytest.raises(ValueError, match="recovery"):
        PeftModel.from_pretrained(tiny_llama(), str(out))  # and on a raw one

    again = caprese.recover(caprese.remove(plain), tokenizer, recipe)  # nothing left to do
    assert again == report
    with pytest.raises(caprese.CapreseError, match="another recipe"):
        caprese.recover(model, tokenizer, recipe.model_copy(update={"sparsity": 0.3}))
    assert read_sealed(out / "report.json", "") == report


def test_samples_are_the_teachers_and_reproducible(small_recipe, tmp_path):
    model, tokenizer = tiny_llama(), byte_tokenizer()
    recipe = small_recipe.model_copy(update={"end_to_end": small_recipe.end_to_end.model_copy(update={"epochs": 0})})
    caprese.recover(model, tokenizer, recipe)
    shards = sorted((Path(recipe.output) / "samples").glob("*.parquet"))
    other = recipe.model_copy(update={"output": str(tmp_path / "other")})
    caprese.recover(model, tokenizer, other)
    rows = [s for p in shards for s in read_shard(p)]
    assert rows == [s for p in sorted((tmp_path / "other" / "samples").glob("*.parquet")) for s in read_shard(p)]
    assert len({s.prompt for s in rows}) == len(rows) == 36  # no prompt in two splits
    for s in rows:
        assert "Please reason step by step. " + s.prompt + "\n" == tokenizer.decode(s.prompt_ids)
        assert s.completion == tokenizer.decode(s.completion_ids, skip_special_tokens=True)


def test_rank_auto_stays_in_its_budget(small_recipe):
    model = tiny_llama()
    report = caprese.recover(model, byte_tokenizer(), small_recipe.model_copy(update={"rank": "auto", "budget": 0.03}))
    assert 0 < report["parameters"]["fraction"] <= 0.03
    ranks = [row["rank"] for row in report["layers_error"]]
    assert sum(ranks) * 2 * 32 == report["parameters"]["adapter"]


@pytest.mark.parametrize("layers", ["first-half", [0, 2]])
def test_some_layers_only(small_recipe, layers):
    report = caprese.recover(tiny_llama(), byte_tokenizer(), small_recipe.model_copy(update={"layers": layers}))
    assert report["layers"] == ([0, 1] if layers == "first-half" else layers)


# A run that kills itself, with SIGKILL, in the middle of its n-th write of a file whose name starts as given.
KILLED = textwrap.dedent(
    """
    import os, signal, sys
    from pathlib import Path
    import torch
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's children inherit that it is ignored
    from caprese import files, progress
    progress.quiet = True
    name, count, how = sys.argv[1], int(sys.argv[2]), getattr(signal, sys.argv[3])
    replace = os.replace
    def dying(source, target):
        global count
        if name != "-" and Path(target).name.startswith(name):
            count -= 1
            if count == 0:
                os.kill(os.getpid(), how)
        replace(source, target)
    os.replace = dying
    from caprese.cli import run
    sys.argv = ["caprese", *sys.argv[4:]]
    run()
    """
)


@pytest.fixture(scope="module")
def command(tiny_dir, tmp_path_factory) -> list[str]:
    path = tmp_path_factory.mktemp("recipes") / "small.yaml"
    path.write_text(
        f"model: {tiny_dir}\nrank: 4\nsamples: {{prompts: 'gym:simple_equations', train: 24, validation: 6, test: 6, "
        "max_new_tokens: 16, batch_size: 8, shard_size: 8}\nlayerwise: {batch_size: 4, checkpoint_every: 8}\n"
        "end_to_end: {epochs: 2, batch_size: 4, micro_batch: 4, checkpoint_every: 2, learning_rate: 0.003}\n"
        "evaluation: {latency_tokens: 0, batch_size: 4}\n"
    )
    return ["recover", "--recipe", str(path), "--json"]


def run(command: list[str], out: Path, name: str = "-", count: int = 0, how: str = "SIGKILL"):
    return subprocess.run(
        [sys.executable, "-c", KILLED, name, str(count), how, *command, "--output", str(out)],
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )


@pytest.fixture(scope="module")
def unbroken(command, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("unbroken") / "out"
    done = run(command, out)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["method"] == "griffin"
    return out


@pytest.fixture(scope="module")
def hybrid(command, tmp_path_factory) -> list[str]:
    """The same with all that mixers are trained by: which layers, alone, by hidden states, and in rounds."""
    path = tmp_path_factory.mktemp("recipes") / "hybrid.yaml"
    steps = "batch_size: 4, micro_batch: 4, checkpoint_every: 2, learning_rate: 0.003"
    path.write_text(
        Path(command[2]).read_text().replace("{epochs: 2, ", "{epochs: 1, rounds: 2, ")
        + "method: mamba:keep_attention=0.34:selected=sensitivity+griffin\n"
        + f"alignment: {{epochs: 1, hidden_epochs: 1, matrices: 0.1, {steps}}}\n"
    )
    return ["recover", "--recipe", str(path), "--json"]


@pytest.fixture(scope="module")
def unbroken_hybrid(hybrid, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("unbroken") / "out"
    done = run(hybrid, out)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    names = ["samples", "calibration", "alignment", "hidden_states", "layerwise", "end_to_end", "evaluation"]
    assert [stage["name"] for stage in report["stages"]] == names
    (kept,) = report["methods"][0]["keep_attention"]
    assert report["methods"][0]["selected"] == "evenly" and kept in (0, 1, 2)
    return out


def slow(*some):
    return [pytest.param(*one, marks=pytest.mark.slow) for one in some]


@pytest.mark.parametrize(
    ("name", "count"), slow(("round-1", 2), ("sensitivity", 2), ("alignment", 1), ("hidden_states", 1))
)
def test_hybrids_go_on_too(hybrid, unbroken_hybrid, tmp_path, name, count):
    out = tmp_path / "out"
    assert run(hybrid, out, name, count).returncode == -signal.SIGKILL
    again = run(hybrid, out)
    assert again.returncode == 0, again.stderr
    assert {p.name for p in out.iterdir()} == LEFT | {"caprese_mixers.safetensors"}
    for file in ("adapter_model.safetensors", "caprese_mixers.safetensors"):
        assert digest(out / file) == digest(unbroken_hybrid / file)
    reports = [read_sealed(d / "report.json", "") for d in (out, unbroken_hybrid)]
    assert reports[0]["quality"] == reports[1]["quality"] and reports[0]["curves"] == reports[1]["curves"]


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("end_to_end", 3),
        *slow(("train-0000", 2), ("moments", 2), ("layerwise", 1), ("recovered-0", 1), ("report.json", 1)),
    ],
)
def test_kill_minus_nine_costs_nothing_but_time(command, unbroken, tmp_path, name, count):
    out = tmp_path / "out"
    killed = run(command, out, name, count)
    assert killed.returncode == -signal.SIGKILL
    finished = sorted(p for p in out.rglob("*.parquet"))
    stamps = {p: p.stat().st_mtime_ns for p in finished}
    again = run(command, out)
    assert again.returncode == 0, again.stderr
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in stamps.items() if p.exists())  # no finished shard anew
    assert {p.name for p in out.iterdir()} == LEFT
    mine, theirs = (load_file(d / "adapter_model.safetensors") for d in (out, unbroken))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)
    assert digest(out / "adapter_model.safetensors") == digest(unbroken / "adapter_model.safetensors")
    reports = [read_sealed(d / "report.json", "") for d in (out, unbroken)]
    assert reports[0]["quality"] == reports[1]["quality"]
    assert reports[0]["curves"] == reports[1]["curves"]


def vouched(out: Path) -> dict[str, str]:
    return {name: digest(out / name) for name in json.loads((out / "report.json").read_text())["files"]}


def test_a_rerun_stopped_in_its_samples_keeps_them_and_no_report(small_recipe, monkeypatch):
    model, tokenizer, out = tiny_llama(), byte_tokenizer(), Path(small_recipe.output)
    caprese.recover(model, tokenizer, small_recipe)
    other, replace = small_recipe.model_copy(update={"seed": 1}), os.replace

    def stopping(source, target):
        if Path(target).name.startswith("train-"):
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stopping)
        with pytest.raises(KeyboardInterrupt):
            caprese.recover(model, tokenizer, other, overwrite=True)
    assert not (out / "report.json").exists() and not (out / "recipe.yaml").exists()
    drawn = digest(out / "samples" / "test-00000.parquet")
    with pytest.raises(caprese.CapreseError, match="half way through another recipe"):
        caprese.recover(model, tokenizer, small_recipe)
    assert digest(out / "samples" / "test-00000.parquet") == drawn


def test_a_rerun_does_not_stand_under_anothers_report(small_recipe, monkeypatch):
    model, tokenizer, out = tiny_llama(), byte_tokenizer(), Path(small_recipe.output)
    caprese.recover(model, tokenizer, small_recipe)
    other, replace = small_recipe.model_copy(update={"seed": 1}), os.replace

    def stopping(source, target):
        if Path(target) == out / "caprese_config.json":  # the other's weights are in place, and this is not
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stopping)
        with pytest.raises(KeyboardInterrupt):
            caprese.recover(model, tokenizer, other, overwrite=True)
    with pytest.raises(caprese.CapreseError, match="half way through another recipe"):
        caprese.recover(model, tokenizer, small_recipe)
    with pytest.raises(caprese.CapreseError, match=r"adapter_model\.safetensors"):
        caprese.load(model, out)
    report = caprese.recover(model, tokenizer, other)
    assert report["seed"] == 1 and report["files"] == vouched(out)


def test_what_is_damaged_is_named_and_made_again(small_recipe, monkeypatch):
    model, tokenizer, out = tiny_llama(), byte_tokenizer(), Path(small_recipe.output)
    report, said = caprese.recover(model, tokenizer, small_recipe), []
    monkeypatch.setattr(
        "caprese.recovery.run.say",
        lambda *parts: said.append("".join(p if isinstance(p, str) else p[0] for p in parts)),
    )
    assert {path.relative_to(out).as_posix() for path in out.rglob("*.*")} == {*report["files"], "report.json"}
    before = vouched(out)
    (out / "README.md").write_text("mine")
    next(out.glob("plots/*.png")).unlink()
    with monkeypatch.context() as patch:
        patch.setattr("caprese.recovery.recover.fit", None)  # pages are written from the report
        assert caprese.recover(model, tokenizer, small_recipe) == report
    assert vouched(out) == before and "README.md" in said[0] and ".png" in said[0]
    weights, shard = out / "adapter_model.safetensors", out / "samples" / "train-00001.parquet"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    shard.write_bytes(shard.read_bytes()[:-9])
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("samples/*.parquet")}
    said.clear()
    caprese.recover(model, tokenizer, small_recipe)
    assert "adapter_model.safetensors" in said[0] and "samples/train-00001.parquet" in said[0]
    assert [path for path, stamp in stamps.items() if path.stat().st_mtime_ns != stamp] == [shard]
    made = [name for name in before if name.startswith(("adapter", "caprese", "samples"))]
    assert len(made) == 8 and all(digest(out / name) == before[name] for name in made)
    (out / "report.json").write_text("{")
    with pytest.raises(caprese.CapreseError, match=r"report\.json is damaged.*`overwrite=True`"):
        caprese.recover(model, tokenizer, small_recipe)
    caprese.recover(model, tokenizer, small_recipe, overwrite=True)
    assert digest(weights) == before["adapter_model.safetensors"]


@pytest.mark.parametrize("where", ["facts", "tensors"])
def test_one_altered_bit_of_the_state_is_found(tmp_path, where):
    run = Run(tmp_path, "id")
    run.save("layerwise", {"w": torch.arange(6).bfloat16(), "n": torch.tensor(3.0)}, {"ranks": [4, 4]})
    tensors, facts = run.load("layerwise")
    assert facts == {"ranks": [4, 4]} and torch.equal(tensors["w"], torch.arange(6).bfloat16())
    path = tmp_path / ".state" / "layerwise.safetensors"
    content = path.read_bytes()
    at = content.index(b"[4, 4]") + 1 if where == "facts" else len(content) - 1
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    with pytest.raises(caprese.CapreseError, match=r"layerwise\.safetensors is .*altered.*; delete it and run again"):
        run.load("layerwise")


def test_nothing_learned_is_no_success(small_recipe):
    model = tiny_llama()
    model.generation_config.eos_token_id = list(range(258))  # the first token ends every answer
    with pytest.raises(caprese.CapreseError, match="nothing can be learned: no .* longer than one token.*template"):
        caprese.recover(model, byte_tokenizer(), small_recipe)
    assert not (Path(small_recipe.output) / "adapter_model.safetensors").exists()

    def rows(*answers: list[int]) -> list[Sample]:
        return [Sample([5, 6 + i, *answer], 2, "", "") for i, answer in enumerate(answers)]

    fine = {"train": rows([7, 8], [9], [8, 1]), "validation": rows([7, 1]), "test": rows([9], [3, 4])}
    stages.check_samples(fine)
    with pytest.raises(caprese.CapreseError, match="no validation sample"):
        stages.check_samples({**fine, "validation": rows([7], [])})
    with pytest.raises(caprese.CapreseError, match="all 2 training samples say the same"):
        stages.check_samples({**fine, "train": rows([7, 8, 1], [7, 8, 1])})


@pytest.mark.slow
def test_full_keeps_the_base_too(command, unbroken, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(unbroken, out)
    done = run([*command, "--full"], out)  # of a finished run, too
    assert done.returncode == 0, done.stderr
    assert {p.name for p in out.iterdir()} == LEFT | {"base"}
    base, tokenizer = caprese.load_base(str(out / "base"))
    assert tokenizer("a b").input_ids == byte_tokenizer()("a b").input_ids
    ids = torch.tensor([[40, 41, 42]])
    tokens = caprese.load(base, out).generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    own = caprese.load(tiny_llama(), out).generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(tokens, own)
    (out / "base" / "config.json").write_text("{}")  # of somebody else, now
    done = run([*command, "--full"], out)
    assert done.returncode == 1 and "holds something else" in done.stderr and (out / "base" / "config.json").exists()
    save_base(tiny_llama(seed=1), tokenizer, out / "base")  # another one takes its place
    with pytest.raises(caprese.CapreseError, match="has other weights"):
        caprese.load(caprese.load_base(str(out / "base"))[0], out)


def test_a_base_is_kept_in_its_checkpoints_type_or_not_at_all(tmp_path, monkeypatch):
    tiny_llama(tie_word_embeddings=True).to(torch.bfloat16).save_pretrained(tmp_path / "given")
    byte_tokenizer().save_pretrained(tmp_path / "given")
    model, tokenizer = caprese.load_base(str(tmp_path / "given"))
    assert model.dtype == torch.float32  # on a CPU
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(caprese.CapreseError, match="No space left"):
            save_base(model, tokenizer, tmp_path / "kept")
        assert [p.name for p in tmp_path.iterdir()] == ["given"]
    save_base(model, tokenizer, tmp_path / "kept")
    given, kept = (load_file(tmp_path / name / "model.safetensors") for name in ("given", "kept"))
    assert given.keys() == kept.keys() and all(torch.equal(given[n], kept[n]) for n in given)  # type and all
    again, _ = caprese.load_base(str(tmp_path / "kept"), dtype="bfloat16")
    assert again.dtype == torch.bfloat16 and caprese.models.base_of(again).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("kind", "count", "residency"),
    [
        ("sparse", 2, "sharded"),
        *(
            pytest.param(kind, count, residency, marks=pytest.mark.slow)
            for kind, count, residency in product(("sparse", "hybrid"), (2, 4), ("whole", "sharded"))
            if (kind, count, residency) != ("sparse", 2, "sharded")
        ),
    ],
)
def test_several_processes_do_the_work_of_one(request, kind, count, residency, tmp_path):
    names = ("command", "unbroken") if kind == "sparse" else ("hybrid", "unbroken_hybrid")
    command, unbroken = map(request.getfixturevalue, names)
    out = tmp_path / "out"
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(count), "--master-port", "29571", "-m", "caprese"]
    done = subprocess.run(
        [sys.executable, *launch, *command, "--residency", residency, "--output", str(out)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert {p.name for p in out.iterdir()} >= LEFT
    several, one = (read_sealed(d / "report.json", "") for d in (out, unbroken))
    assert json.loads(done.stdout) == several
    assert several["quality"]["recovered"]["kl"] == pytest.approx(one["quality"]["recovered"]["kl"], rel=0.02)
    assert several["samples"] == one["samples"]


# Two processes that disagree wherever they can: rank 1 looks late, calibrates otherwise, fits other branches and finds
# others best.
DIVIDED = textwrap.dedent(
    """
    import hashlib, importlib, json, os, sys, time
    from pathlib import Path
    import torch
    torch.set_num_threads(1)
    from caprese import cli
    from caprese.recovery import recover as page, stages
    from caprese.adapters import get_branches
    from caprese.distill import HeldOut

    report = importlib.import_module("caprese.evaluation.evaluate")
    fits = importlib.import_module("caprese.distill.fit")

    rank, notes = int(os.environ["RANK"]), {}
    choose, calibrate, layers, together, kl, adam, timed = (
        page.choose, stages.calibrate, fits.fit_layers, fits.fit_end_to_end, HeldOut.kl, fits.fit_adam,
        report.time_to_next_token
    )

    def digest(model):
        parts = [value.numpy().tobytes() for _, value in sorted(get_branches(model).items())]
        return hashlib.sha256(b"".join(parts)).hexdigest()

    def chosen(*args):
        time.sleep(2 * rank)
        methods, calibration = choose(*args)
        notes.update(methods=str(methods), calibration={k: float(v) for k, v in calibration.items()})
        return methods, calibration

    def late(*args):
        time.sleep(2 * rank)
        model, facts = layers(*args)
        notes.update(layerwise=digest(model), facts=facts)
        return model, facts

    def after(model, *args):
        course = together(model, *args)
        notes.update(end_to_end=digest(model), best=course.best, checks=course.checks)
        return course

    def latency(*args):
        notes.update(timed=True)
        return timed(*args)

    page.choose = chosen
    stages.calibrate = lambda *args: {k: v * (1 + 0.01 * rank) for k, v in calibrate(*args).items()}
    fits.fit_layers, fits.fit_end_to_end, report.time_to_next_token = late, after, latency
    fits.fit_adam = lambda model, batches, config, seed, advance: adam(model, batches, config, seed + rank, advance)
    HeldOut.kl = lambda self: kl(self) + (rank and 0.1 * time.monotonic() % 1)
    out = Path(sys.argv[sys.argv.index("--output") + 1])
    assert not cli.app(standalone_mode=False)
    (out.parent / f"notes-{rank}.json").write_text(json.dumps(notes))
    """
)


@pytest.mark.slow
def test_processes_go_on_from_the_first_ones_branches(command, tmp_path):
    out, script = tmp_path / "out", tmp_path / "divided.py"
    script.write_text(DIVIDED)
    stale = out / ".state" / "layerwise.safetensors"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"another recipe's")
    (out / ".state" / "identity.json").write_text('{"identity": "other"}')
    recipe = yaml.safe_load(Path(command[2]).read_text()) | {"evaluation": {"latency_tokens": 3, "batch_size": 4}}
    recipe["layerwise"] |= {"how": "adam", "epochs": 2}
    recipe |= {"method": "cats", "threshold": "calibrated", "sparsity": "auto", "target_active": 0.9}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29573", str(script)]
    flags = ["recover", "--recipe", str(tmp_path / "recipe.yaml"), "--overwrite", "--json", "--output", str(out)]
    done = subprocess.run(
        [sys.executable, *launch, *flags],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (json.loads((tmp_path / f"notes-{rank}.json").read_text()) for rank in (0, 1))
    assert first.pop("timed") and "timed" not in second
    assert first == second
    assert json.loads((out / "report.json").read_text())["latency"]["dense"]["ttnt_ms"] > 0


@pytest.mark.parametrize("sparsity", ["auto", 0.5])
def test_what_was_learned_is_read_back(small_recipe, tmp_path, monkeypatch, sparsity):
    target = {"target_active": 0.9} if sparsity == "auto" else {}
    recipe = small_recipe.model_copy(update={"method": "static", "sparsity": sparsity, **target})
    generator = torch.Generator().manual_seed(3)
    rows = [Sample(torch.randint(2, 258, (20,), generator=generator).tolist(), 8, "", "") for _ in range(8)]
    config = Calibrating(64, 4, 1.0, **target)
    arguments = tiny_llama(), recipe.methods, {"train": rows, "validation": rows[:4]}, config, recipe.alignment
    methods, calibration = stages.choose(*arguments, Run(tmp_path, "id"))
    for name in ("calibrate", "allocate_sparsity"):
        monkeypatch.setattr(stages, name, None)
    again, known = stages.choose(*arguments, Run(tmp_path, "id"))
    assert again == methods and known.keys() == calibration.keys() and len(known) == len(methods[0].by_layer(3))
    assert all(torch.equal(known[name], choice) for name, choice in calibration.items())
    assert [stage["note"] for stage in Run(tmp_path, "id").stages()] == [str(methods[0])]
    with pytest.raises(caprese.CapreseError, match="belongs to another recipe"):
        stages.choose(*arguments, Run(tmp_path, "other"))


def test_a_stage_takes_as_long_as_all_its_attempts(tmp_path, monkeypatch):
    state, now = tmp_path / ".state", [1000.0]
    monkeypatch.setattr("caprese.recovery.run.time", SimpleNamespace(time=lambda: now[0], perf_counter=lambda: now[0]))

    def attempt(seconds: float, stopped: bool = False) -> float:
        with Run(tmp_path, "id").stage("samples") as stage:
            now[0] += seconds
            if stopped:
                raise KeyboardInterrupt
        return stage["seconds"]

    with pytest.raises(KeyboardInterrupt):
        attempt(5, stopped=True)
    # as a kill would leave it: 40 seconds in, the last shard 30 seconds after the start
    killed = Run(tmp_path, "id").stage("samples")
    killed.__enter__()
    shard = tmp_path / "samples" / "train-00000.parquet"
    shard.parent.mkdir()
    shard.touch()
    for path in (shard, state / "stages.json"):
        os.utime(path, (now[0] + 30 * (path == shard),) * 2)
    left = (state / "stages.json").read_text()
    now[0] += 40
    with pytest.raises(SystemExit):
        killed.gen.throw(SystemExit)
    (state / "stages.json").write_text(left)
    os.utime(state / "stages.json", (now[0] - 40,) * 2)
    assert attempt(7) == 5 + 30 + 7
    assert attempt(9) == 42  # done before: reading it back is no work
    (stage,) = json.loads((state / "stages.json").read_text())["stages"]
    assert stage["done"] and "begun" not in stage


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone counts a process's peak anew")
def test_a_stage_notes_its_own_peak_and_keeps_the_highest_of_its_attempts(tmp_path):
    def attempt(name: str, held: int, stopped: bool = False) -> int:
        with suppress(KeyboardInterrupt), Run(tmp_path, "id").stage(name) as stage:
            torch.ones(held, dtype=torch.uint8)
            if stopped:
                raise KeyboardInterrupt
        return stage["peak_bytes"]

    large = 200_000_000
    low = attempt("samples", 1)
    high = attempt("layerwise", large, stopped=True)
    assert high > low + 0.9 * large
    assert attempt("layerwise", 1) == high
    assert attempt("end_to_end", 1) < high - 0.9 * large  # what a stage before it held is not its own
    assert attempt("samples", large) == low  # done before: reading it back is no work
    assert [stage["peak_bytes"] for stage in Run(tmp_path, "id").stages()][-1] == low


def test_a_recipe_without_a_model_takes_the_shipped_one_for_the_rest(small_recipe):
    model = tiny_llama()
    model.caprese_base = Base("smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct", "", None)
    report = caprese.recover(model, byte_tokenizer(), small_recipe)
    assert report["recipe"]["rank"] == 4  # said
    assert report["recipe"]["end_to_end"]["epochs"] == 2
    assert report["recipe"]["methods"][0]["layers"] == "all" and report["recipe"]["model"] == "smollm2-135m"
    shipped = json.loads(json.dumps(resolve_recipe("smollm2-135m").model_dump(mode="json")))
    assert report["recipe"]["evaluation"]["examples"] == shipped["evaluation"]["examples"]


def test_control_c_says_how_to_go_on(command, tmp_path):
    stopped = run(command, tmp_path / "out", "moments", 1, "SIGINT")
    assert stopped.returncode == 130
    assert "run the same command again" in stopped.stderr and "Traceback" not in stopped.stderr
    assert list((tmp_path / "out" / "samples").glob("train-*.parquet"))
