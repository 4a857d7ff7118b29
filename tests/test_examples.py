"""The examples run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("script", ["recover.py", "phases.py"])
def test_example(script, tiny_dir, tmp_path):
    args = ["--model", str(tiny_dir)]
    if script == "recover.py":
        args += ["--samples", "12", "--new-tokens", "8", "--rank", "4", "--output", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, ROOT / "examples" / script, *args], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "KL" in done.stdout or "agreement" in done.stdout
