"""The examples run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

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


CONFIGS = {path.stem: path for path in sorted((ROOT / "examples" / "accelerate").glob("*.yaml"))}


@pytest.mark.parametrize("name", CONFIGS)
def test_accelerate_reads_its_files(name):
    found = load_config_from_file(str(CONFIGS[name]))
    kind = "NO" if name == "single" else "MULTI_GPU"
    assert found.distributed_type.value == kind and found.num_processes % found.num_machines == 0
    assert (found.num_machines > 1) == (name == "multi-node") and not found.fsdp_config  # caprese shards bases itself


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count"), [("single", 1), ("multi-gpu", 2), ("fsdp2", 2)])
def test_accelerate_launches_a_recovery(name, count, tiny_dir, tmp_path):
    """Two processes where a file says eight; without GPUs they meet over gloo."""
    (tmp_path / "recipe.yaml").write_text(
        f"model: {tiny_dir}\nrank: 4\nsamples: {{prompts: 'gym:simple_equations', train: 12, validation: 4, test: 4, "
        "elsewhere: 0, max_new_tokens: 16, shard_size: 4}\nlayerwise: {batch_size: 4}\n"
        "end_to_end: {epochs: 1, batch_size: 4, micro_batch: 4}\nevaluation: {latency_tokens: 0}\n"
    )
    launch = ["accelerate.commands.launch", "--config_file", str(CONFIGS[name]), "--num_processes", str(count)]
    residency = "sharded" if name == "fsdp2" else "whole"
    words = ["-m", "caprese", "recover", "--recipe", str(tmp_path / "recipe.yaml"), "--residency", residency]
    done = subprocess.run(
        [sys.executable, "-m", *launch, *words, "--output", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "out" / "report.json").is_file()
