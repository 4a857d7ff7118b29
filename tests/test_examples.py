"""The examples run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("script", ["recover.py", "phases.py"])
def test_example(script, tiny_dir, tmp_path):
    args = ["--model", str(tiny_dir)]
    if script == "recover.py":
        args += ["--samples", "24", "--new-tokens", "8", "--rank", "4", "--output", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, ROOT / "examples" / script, *args], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if script == "recover.py":
        before, after = map(float, re.search(r"KL ([\d.]+) -> ([\d.]+)\n", done.stdout).groups())
        assert 0 < after < before and "\nTwo and two is" in done.stdout
    else:
        agreement = dict(re.findall(r"(\w+): top-1 agreement on the completion (\d+)%", done.stdout))
        # of a random model, half of the neurons decide about some tokens and not about all
        assert agreement.keys() == {"griffin", "cats"} and all(0 < int(each) < 100 for each in agreement.values())
