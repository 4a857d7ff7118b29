"""What a run is planned to hold, against what it holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from conftest import byte_tokenizer
from transformers import LlamaConfig
from typer.testing import CliRunner

from caprese.cli import app
from caprese.commands.options import parse_bytes
from caprese.errors import CapreseError
from caprese.models import SHAPES, load_config, random_model


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    """What is known by name is planned by the shape that caprese knows."""

    def load(name, revision):
        if name in SHAPES:
            raise CapreseError(f"no {name} here")
        return load_config(name, revision)

    monkeypatch.setattr("caprese.plan.job.load_config", load)


def planned(*flags: str) -> dict:
    done = CliRunner().invoke(app, ["recover", *flags, "--dry-run", "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_a_70b_base_is_recovered_on_one_gpu_layer_by_layer_alone():
    found = planned("--model", "llama-3.1-70b", "--gpus", "1", "--gpu-memory", "80GB")["gpu_layouts"]
    assert not found["whole"]["fits"] and "GB that are usable" in found["whole"]["why_not"]
    assert found["streamed"]["fits"] and "end_to_end" not in found["streamed"]["bytes"]
    assert "sharded" not in found  # over one


@pytest.mark.parametrize(
    ("flags", "streamed", "sharded"),
    [
        (("--method", "mamba"), "makes weights of the base's", None),
        (("--method", "q4"), "makes weights of the base's", None),
        (("--rank", "auto"), "rank auto", "rank auto"),
        (("--reselect-every", "8"), "reselect_every", "reselect_every"),
    ],
)
def test_what_a_residency_refuses_does_not_fit(tiny_dir, flags, streamed, sharded):
    flags = ("--model", str(tiny_dir), "--rank", "4", *flags)
    found = planned(*flags, "--gpus", "2")["gpu_layouts"]
    assert found["whole"]["fits"]
    for layout, why in (("streamed", streamed), ("sharded", sharded)):
        assert found[layout]["fits"] is (why is None) and (why or "") in found[layout].get("why_not", "")
    done = CliRunner().invoke(app, ["recover", *flags, "--residency", "streamed", "--epochs", "0", "--dry-run"])
    assert done.exit_code == 1 and streamed in " ".join(done.output.split())


@pytest.mark.parametrize("change", [{"hidden_act": "nonsense"}, {"num_hidden_layers": 0}, {"hidden_size": -4}])
def test_a_config_that_makes_no_model_is_one_line(tiny_dir, tmp_path, change):
    config = json.loads((tiny_dir / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    done = CliRunner().invoke(app, ["recover", "--model", str(tmp_path), "--dry-run"])
    assert done.exit_code == 1 and "get the model again" in " ".join(done.output.split())


def test_more_gpus_hold_less_each():
    flags = ("--model", "llama-3.1-70b", "--epochs", "0", "--gpus")
    two, eight = (planned(*flags, n)["gpu_layouts"]["sharded"] for n in ("2", "8"))
    assert not two["fits"] and eight["fits"]
    assert all(eight["bytes"][stage] < size for stage, size in two["bytes"].items())


def test_a_stage_that_is_left_out_takes_no_time(tiny_dir):
    found = planned("--model", str(tiny_dir), "--rank", "4", "--epochs", "0", "--gpus", "2")
    assert all("end_to_end" not in found[key] for key in ("flops", "estimated_seconds", "gpu_hours", "peak_bytes"))


def test_bytes_without_a_unit_are_no_gpu(tiny_dir):
    done = CliRunner().invoke(app, ["recover", "--model", str(tiny_dir), "--dry-run", "--gpu-memory", "80"])
    assert done.exit_code == 1 and "no GPU has 80 bytes; give it like 80GB" in " ".join(done.output.split())


def test_hours_go_down_with_gpus(tiny_dir):
    one, four = (planned("--model", str(tiny_dir), "--rank", "4", "--gpus", n)["gpu_hours"] for n in ("1", "4"))
    assert one.pop("kind") == four.pop("kind")
    for stage, hours in one.items():
        assert four[stage] == pytest.approx(hours / 4, rel=0.01)


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GB", 80 * 10**9), ("80 GiB", 80 << 30), ("0.5g", 5 * 10**8), ("123", 123), ("2MB", 2 * 10**6)],
)
def test_memory_is_read(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "80 apples", "1e9", "0", "80GB\n80GB"])
def test_what_is_no_memory_is_refused(text):
    with pytest.raises(CapreseError, match="give it like 80GB"):
        parse_bytes(text)


# a recovery in a process of its own: what each stage held, beside what the process held before
RUN = textwrap.dedent(
    """
    import ctypes, gc, json, re, sys
    from pathlib import Path
    import torch, caprese
    from caprese.models import unwrap
    from caprese.plan.memory import Shape, peaks
    torch.set_num_threads(1)
    base, small, prompts, out, kind, prefill, residency, epochs, cache = sys.argv[1:]

    def recipe(model, to, **sizes):
        return caprese.resolve_recipe(
            model=model, method=kind, rank=16, output=f"{out}/{to}", prefill=prefill, autocast=False, dtype="float32",
            samples=dict(prompts=prompts, elsewhere=0, instruction="", **sizes),
            layerwise=dict(batch_size=16),
            end_to_end=dict(epochs=int(epochs), micro_batch=16, batch_size=16, cache_gigabytes=float(cache)),
            evaluation=dict(latency_tokens=0, batch_size=16, generate=False),
        )

    def run(model, to, **sizes):
        asked = recipe(model, to, **sizes)
        loaded, tokenizer = caprese.load_base(model, dtype="float32", residency=residency)
        return loaded, asked, caprese.recover(loaded, tokenizer, asked)

    run(small, "warm", train=4, validation=2, test=2, max_new_tokens=4, batch_size=2)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = 1024 * int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
    model, asked, report = run(base, "out", train=64, validation=16, test=16, max_new_tokens=48, batch_size=32)
    shape = Shape.of(unwrap(model), model.config, len(report["layers"]))
    told = peaks(shape, asked, torch.float32, report["parameters"]["adapter"], residency, prompt=118)
    held = {stage["name"]: stage["peak_bytes"] for stage in report["stages"]}
    print(json.dumps({"told": {name: size + before for name, size in told.items()}, "held": held}))
    """
)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("method", "prefill", "residency", "epochs", "cache"),
    [
        ("griffin:0.5", "dense", "whole", 1, 0.0),
        ("static:0.5", "efficient", "whole", 1, 0.0),
        ("griffin:0.5", "dense", "streamed", 0, 0.0),
    ],
)
def test_it_holds_what_is_planned(method, prefill, residency, epochs, cache, tmp_path):
    for name, hidden, layers in (("base", 512, 8), ("small", 64, 2)):
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers, num_attention_heads=8,
            num_key_value_heads=4, vocab_size=8192, max_position_embeddings=1024, eos_token_id=None, bos_token_id=None,
        )  # fmt: skip
        random_model(config).save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{i:03} says " + "x" * 109}) + "\n" for i in range(200))
    )
    words = [tmp_path / "base", tmp_path / "small", tmp_path / "prompts.jsonl", tmp_path, method, prefill, residency]
    done = subprocess.run(
        [sys.executable, "-c", RUN, *map(str, [*words, epochs, cache])],
        capture_output=True,
        text=True,
        # what is freed goes back: an allocator's own losses are not planned
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1048576"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for stage, told in found["told"].items():
        assert told == pytest.approx(found["held"][stage], rel=0.15), (stage, found)
