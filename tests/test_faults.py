"""A few of each of the faults that `make test-faults` tries in numbers; and that what it counts can go wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from faults.jobs import Job
from faults.processes import Ended
from faults.table import Table

FEW = {
    "damages": ["--damages", "4", "--of", "finished static"],
}
SLOW = {
    "fuzz": ["--minutes", "0", "--examples", "12"],
    "kills": ["--kills", "3", "--of", "recover griffin", "push"],
    "disks": ["--disks", "1"],
    "moments": ["--moments", "1"],
    "ranks": ["--ranks", "1"],
}


@pytest.mark.parametrize("part", [*FEW, *(pytest.param(part, marks=pytest.mark.slow) for part in SLOW)])
def test_a_few(part: str, tmp_path: Path) -> None:
    out = tmp_path / "table.json"
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])}
    run = [sys.executable, "-m", "faults", part, *{**FEW, **SLOW}[part], "--output", str(out)]
    done = subprocess.run(run, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(out.read_text())
    assert told["wrong"] == []
    if part == "fuzz":
        assert all(each["examples"] > 10 for each in told["fuzz"].values())
        assert sum(each["refused"] for each in told["fuzz"].values()) > 50
    else:
        good = told["all"]["survived"] + told["all"]["detected"]
        assert good == told["all"]["tried"] > 0
    assert told["kills"] >= 3 or part != "kills"


def result(out: Path, ended: Ended) -> dict[str, str]:
    return {"said": ended.said}


@pytest.mark.parametrize(
    ("ended", "lost", "how"),
    [
        (Ended(0, "4", "", 1), [], "survived"),
        (Ended(1, "", "a note\nerror: x.json is damaged; run again\n", 1), [], "detected"),
        (Ended(1, "", "error: x.json is damaged\n", 1), [], "unclear"),
        (Ended(0, "5", "", 1), [], "silent"),
        (Ended(1, "", "Traceback (most recent call last):\nKeyError: 'a'\n", 1), [], "unclear"),
        (Ended(1, "", "", 1), [], "unclear"),
        (Ended(-11, "", "", 1), [], "unclear"),
        (Ended(None, "", "", 1), [], "unclear"),
        (Ended(0, "4", "", 1), ["train-00000.parquet"], "lost"),
    ],
)
def test_what_is_counted(ended: Ended, lost: list[str], how: str, tmp_path: Path) -> None:
    table = Table()
    table.note("kill", "job", ended, Job("job", [], result), tmp_path, {"said": "4"}, tries=3, lost=lost)
    assert table.total()["tried"] == table.total()[how] == 3
    assert bool(table.wrong) == (how not in ("survived", "detected"))
