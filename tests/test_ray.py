"""Samples from vLLM's engines on a Ray cluster (after `make vllm`, with ray and caprese's packages in its Python)."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from caprese.data_gen import read_shard

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
PYTHON = os.environ.get("CAPRESE_RAY_PYTHON") or str(ROOT / ".venv-vllm" / "bin" / "python")
WANTED = [PYTHON, "-c", "import caprese, ray.data.llm, vllm"]
if not Path(PYTHON).exists() or subprocess.run(WANTED, capture_output=True).returncode:
    pytest.skip("make vllm, and ray and caprese beside it", allow_module_level=True)

RECIPE = {
    "model": "smollm2-135m",
    "method": "griffin",
    "sparsity": 0.5,
    "rank": 8,
    "samples": {
        "prompts": "gym:simple_equations",
        "train": 48,
        "validation": 8,
        "test": 8,
        "elsewhere": 0,
        "max_new_tokens": 32,
        "shard_size": 16,
    },
    "layerwise": {"how": "none"},
    "end_to_end": {"epochs": 1, "batch_size": 8, "micro_batch": 4},
    "evaluation": {"latency_tokens": 0, "generate": False},
}


def drawn(where: Path, **engine: object) -> subprocess.CompletedProcess[str]:
    """The example, with two engines on this machine's CPUs."""
    (where / "small.yaml").write_text(yaml.safe_dump(RECIPE))
    given = json.dumps({"enforce_eager": True, "max_model_len": 512, **engine})
    options = ["--recipe", "small.yaml", "--output", "out", "--engines", "2", "--cpus", "1", "--engine", given]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONPATH": str(ROOT)}
    command = [PYTHON, str(ROOT / "examples" / "ray_samples.py"), *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=where, env=environment)


def test_another_model_is_refused(tmp_path):
    done = drawn(tmp_path, hf_overrides={"rope_theta": 100.0, "rms_norm_eps": 0.1})
    assert done.returncode and "is not the model that is loaded here: log-probabilities" in done.stderr
    assert not list((tmp_path / "out").glob("samples/*.parquet"))


def test_two_engines_draw_the_samples(tmp_path):
    """Every sample is there, begins with its prompt and is another than its neighbours; both engines drew."""
    done = drawn(tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    samples = [each for path in (tmp_path / "out" / "samples").iterdir() for each in read_shard(path)]
    assert len(samples) == 64 and all(0 < len(each.completion_ids) <= 32 for each in samples)
    assert len({tuple(each.completion_ids) for each in samples}) > 48
    assert yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())["samples"]["teacher"] == "endpoint"
    said = done.stdout + done.stderr
    (tmp_path / "log").write_text(said)
    assert "is the model that is loaded here" in said and "A worker died" not in said
    train = said[said.rindex("Execution plan of Dataset") :]
    assert len(set(re.findall(r"pid=(\d+).*Elapsed time for batch", train))) == 2
