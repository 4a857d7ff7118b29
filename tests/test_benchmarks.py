"""The runner of experiments: what is measured once stays, what is asked otherwise is measured anew."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml
from conftest import tiny_llama

from caprese.data_gen import Sample

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
EXPERIMENTS = sorted((BENCHMARKS / "experiments").glob("*.yaml"))


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """run.py with an experiment `squares`, whose measure notes its cells."""
    spec = importlib.util.spec_from_file_location("benchmarks_run", BENCHMARKS / "run.py")
    assert spec is not None and spec.loader is not None
    run: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run)
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "squares.yaml").write_text(
        yaml.safe_dump(
            {
                "about": "Squares",
                "measure": "squares",
                "settings": {"x": 0, "plus": 0},
                "tables": {"small": [{"x": 1}, {"x": 2}], "large": [{"x": 10}, {"x": 2}]},
                "columns": {"x": "cell.x", "square": "found.square:.1f found.none"},
                "plot": [{"x": "x", "y": "square", "lines": {"squares": "small found.square"}}],
            },
            sort_keys=False,
        )
    )
    run.HERE, run.asked = tmp_path, []

    class Measure:
        def environment(self) -> dict[str, Any]:
            return {"cpu": "any"}

        def __call__(self, cell: dict[str, Any]) -> dict[str, Any]:
            run.asked.append(cell["x"])
            if cell["x"] == run.fails:
                raise KeyboardInterrupt
            return {"found": {"square": float(cell["x"] ** 2 + cell["plus"])}}

    run.fails = None
    monkeypatch.setitem(sys.modules, "measures.squares", SimpleNamespace(Measure=Measure))
    return run


def call(run: Any, monkeypatch: pytest.MonkeyPatch, *args: str) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", *args])
    run.main()


def test_an_interrupted_run_goes_on(runner, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out.json"
    runner.fails = 2
    with pytest.raises(KeyboardInterrupt):
        call(runner, monkeypatch, "squares", "--output", str(out))
    runner.fails = None
    call(runner, monkeypatch, "squares", "--output", str(out))
    assert runner.asked == [1, 2, 2, 10]  # 1 is there already, and 2 stands in both tables
    rows = json.loads(out.read_text())["rows"]
    assert [row["found"]["square"] for row in rows] == [1, 4, 100] and out.with_suffix(".png").stat().st_size > 1000
    assert "| 10 | 100.0 - |" in capsys.readouterr().out


def test_other_settings_are_measured_anew(runner, tmp_path, monkeypatch):
    for args in (["small"], ["small", "--set", "plus=1"]):
        call(runner, monkeypatch, "squares", *args, "--output", str(tmp_path / "out.json"))
    assert runner.asked == [1, 2, 1, 2]


@pytest.mark.parametrize("args", [["cubes"], ["squares", "huge"], ["squares", "--set", "y=1"]])
def test_what_there_is_not(runner, monkeypatch, args):
    with pytest.raises(SystemExit, match="squares|small, large|x, plus"):
        call(runner, monkeypatch, *args)
    assert not runner.asked


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_experiments_say_what_their_measure_asks(path):
    experiment = yaml.safe_load(path.read_text())
    measure = (BENCHMARKS / "measures" / f"{experiment['measure']}.py").read_text()
    asked = {part.split('"')[0] for part in measure.split('cell["')[1:]}
    assert asked <= experiment["settings"].keys()
    for cells in experiment["tables"].values():
        assert all(set(cell or {}) <= experiment["settings"].keys() for cell in cells)


@pytest.mark.parametrize("adapter", ["branch", "lora"])
def test_a_cell_of_recovery(adapter, monkeypatch, tokenizer):
    """The measure itself, on a tiny model: what is trained is closer to the dense model than what is not."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    recovery = importlib.import_module("measures.recovery")
    rows = [Sample(list(range(i, i + 14)), 6, "p", "c") for i in range(5, 29)]
    parts = {"train": rows[:12], "validation": rows[12:18], "test": rows[18:]}
    monkeypatch.setattr(recovery.caprese, "load_base", lambda name: (tiny_llama(), tokenizer))
    monkeypatch.setattr(recovery, "read_samples", lambda directory, split: parts[split])
    cell = yaml.safe_load((BENCHMARKS / "experiments" / "methods.yaml").read_text())["settings"]
    row = recovery.Measure()(
        {**cell, "method": "griffin:0.5", "adapter": adapter, "rank": 4, "epochs": 2, "then_reselect": 2}
    )
    assert row["end_to_end"]["kl"] < row["efficient"]["kl"] and row["reselection"]["kl"] > 0
    assert row["kl"]["end_to_end"] < row["kl"]["efficient"] and 0 < row["added"] < 1


def test_parts_of_a_step_are_those_of_the_kernels(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    step = importlib.import_module("measures.step")
    header = (Path(step.native.__file__).parent / "codes.h").read_text()
    named = header.split("enum { NORM", 1)[1].split("PARTS }", 1)[0]
    assert tuple(f"norm{named}".replace(",", " ").lower().split()) == step.PARTS


@pytest.mark.slow  # it compiles the kernels once more
def test_a_cell_of_a_step(monkeypatch, tokenizer):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    step = importlib.import_module("measures.step")
    monkeypatch.setenv("CC", os.environ.get("CC", "cc"))
    monkeypatch.setattr(step.caprese, "load_base", lambda name, dtype: (tiny_llama().bfloat16(), tokenizer))
    cell = yaml.safe_load((BENCHMARKS / "experiments" / "step.yaml").read_text())["settings"]
    try:
        row = step.Measure()({**cell, "rank": 4, "prompt_tokens": 9, "new_tokens": 12})
    finally:
        step.native.library.cache_clear()
    ms = {name: part["ms"] for name, part in row["parts"].items()}
    assert {*ms} == {*step.PARTS, "head", "outside"} and all(time > 0 for name, time in ms.items() if name != "branch")
    assert 0.5 < sum(ms.values()) / row["step_ms"] < 1.5
    assert row["parts"]["qkv"]["bytes"] == 3 * (32 + 2 * 16) * (32 + 4)


def test_what_another_wrote_is_not_replaced(runner, tmp_path, monkeypatch):
    (tmp_path / "out.json").write_text(json.dumps({"rows": {"dense": {}}}))
    with pytest.raises(SystemExit, match="holds something else"):
        call(runner, monkeypatch, "squares", "--output", str(tmp_path / "out.json"))


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_lists_stand_for_each_of_their_values():
    experiment = {"settings": {"x": 0, "y": 5, "z": 1}, "tables": {"t": [{"x": [1, 2], "z": [3, 4]}, {}]}}
    cells = script("run").cells_of(experiment, "t")
    assert [tuple(c.values()) for c in cells] == [(1, 5, 3), (1, 5, 4), (2, 5, 3), (2, 5, 4), (0, 5, 1)]


@pytest.mark.slow
def test_parts_of_gpu_in_small(tmp_path):
    """A part that is done is not done again; one that fails leaves the others."""
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--small", "--output", str(tmp_path)]
    done = subprocess.run([*command, "layerwise", "mamba"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for part in ("layerwise", "mamba"):
        found = json.loads((tmp_path / f"{part}.json").read_text())
        assert found["rows"] and "--output" in found["command"]
    parts = json.loads((tmp_path / "parts.json").read_text())
    assert {name: facts["done"] for name, facts in parts.items()} == {"layerwise": True, "mamba": True}
    (tmp_path / "end-to-end.json").write_text(json.dumps({"rows": {}}))  # something else, which is not replaced
    again = subprocess.run([*command, "--minutes", "0.4", "end-to-end"], capture_output=True, text=True)
    assert again.returncode == 1 and "holds something else" in again.stderr
    assert json.loads((tmp_path / "parts.json").read_text())["layerwise"]["done"]
    assert subprocess.run([*command, "sweeps"], capture_output=True).returncode == 1
    (tmp_path / "parts.json").write_text("{")
    broken = subprocess.run(command, capture_output=True, text=True)
    assert broken.returncode == 1 and "parts.json is damaged" in broken.stderr.splitlines()[-1]


def test_the_sweep_becomes_the_kernels_own(tmp_path):
    gpu = script("gpu")
    tuned, sweep = tmp_path / "tuned.json", tmp_path / "sweep.json"
    tuned.write_text(gpu.TUNED.read_text())
    best = {"microseconds": 1.0, "config": {"BLOCK_ROWS": 8, "DOT": 1}}
    rows = [{"cell": {"batch": b}, "key": "sums_q4", "best": best if b == 4 else None} for b in (1, 4)]
    sweep.write_text(json.dumps({"command": "c", "environment": {"device": "d"}, "rows": rows}))
    gpu.tune(sweep, tuned)
    before, after = json.loads(gpu.TUNED.read_text()), json.loads(tuned.read_text())
    assert after["configs"].pop("sums_q4") == {"4": best["config"]} and after["measured"]["operations"] == ["sums_q4"]
    assert after["configs"].items() <= before["configs"].items()


def test_what_pytest_found_is_counted(tmp_path):
    (tmp_path / "test_x.py").write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert 0\n@pytest.mark.skip\ndef test_c(): pass\n"
    )
    subprocess.run([sys.executable, "-m", "pytest", "-q", "--junitxml=x.xml"], cwd=tmp_path, capture_output=True)
    assert script("gpu").count_tests(tmp_path / "x.xml") == {"passed": 1, "skipped": 1, "failed": ["test_x.test_b"]}


@pytest.mark.slow
def test_every_part_of_gpu_in_small(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--small", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert {path.stem for path in tmp_path.glob("*.json")} == {"parts", *script("gpu").PARTS}


def test_the_pareto_plot(tmp_path):
    pareto = script("pareto")
    kl = {"test": {"kl": 0.5}, "elsewhere": {"kl": 0.7}}
    less = {"test": {"kl": 0.1}, "elsewhere": {"kl": 0.2}}
    none = {"test": {"kl": 0.0}, "elsewhere": {"kl": 0.0}}
    times = {"fused": {"ttnt_ms": 5.0}, "dense": {"ttnt_ms": 9.0}}
    rows = [
        {"cell": {"method": "q4"}, "efficient": kl, **times},
        {"cell": {"method": "none"}, "efficient": none, **times},
        {"cell": {"method": "q4"}, "efficient": kl, "recovered": less},
        {"cell": {"method": "untimed"}, "efficient": kl, "recovered": less},
    ]
    assert pareto.points(rows).keys() == {"q4", "none"}
    assert pareto.points(rows)["q4"]["recovered"] == {"test": 0.1, "elsewhere": 0.2}
    pareto.draw(rows, tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 5000
