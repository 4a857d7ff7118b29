"""`caprese doctor`: of a machine, and of an adapter directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import tiny_llama
from typer.testing import CliRunner

import caprese
from caprese.adapters import attach_adapter
from caprese.cli import app
from caprese.kernels import native


def looked(*arguments: object) -> tuple[int, dict]:
    result = CliRunner().invoke(app, ["doctor", *map(str, arguments), "--json"])
    return result.exit_code, json.loads(result.stdout)


def test_a_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code, facts = looked()
    assert facts["versions"]["caprese"] == caprese.__version__ and "cpu" in facts["devices"]
    assert code == (native.library() is None)
    monkeypatch.setattr(native, "library", lambda: None)
    (tmp_path / "file").touch()
    monkeypatch.setenv("CAPRESE_CACHE", str(tmp_path / "file"))
    code, facts = looked()
    assert code == 1 and ["C compiler" in line or "cannot write" in line for line in facts["wrong"]] == [True, True]
    assert "nothing is wrong" not in CliRunner().invoke(app, ["doctor"]).stdout


def test_a_directory(tmp_path: Path) -> None:
    out = tmp_path / "out"
    caprese.save(attach_adapter(caprese.apply(tiny_llama(), caprese.Griffin()), 4), out)
    code, facts = looked(out)
    assert code == 0 and facts["wrong"] == []
    assert facts["checked"] == ["adapter_config.json", "adapter_model.safetensors", "caprese_config.json"]
    weights = bytearray((out / "adapter_model.safetensors").read_bytes())
    weights[-1] ^= 1
    (out / "adapter_model.safetensors").write_bytes(weights)
    (out / ".state").mkdir()
    code, facts = looked(out)
    assert code == 1 and len(facts["wrong"]) == 2
    assert "half way" in facts["wrong"][0] and "adapter_model.safetensors" in facts["wrong"][1]
    (out / "adapter_config.json").write_text("[]")
    code, facts = looked(out)
    assert code == 1 and "adapter_config.json" in facts["wrong"][1] and facts["checked"] == []
    assert CliRunner().invoke(app, ["doctor", str(tmp_path / "none")]).exit_code == 1


def test_a_report_that_is_gone_is_missed(tmp_path: Path) -> None:
    """A run leaves recipe and report; an adapter that was saved has neither."""
    out = tmp_path / "out"
    caprese.save(attach_adapter(caprese.apply(tiny_llama(), caprese.Griffin()), 4), out)
    assert looked(out)[0] == 0
    (out / "recipe.yaml").write_text("model: reasoner-tiny\n")
    code, facts = looked(out)
    assert code == 1 and "report.json" in facts["wrong"][0] and "missing beside recipe.yaml" in facts["wrong"][0]
    for verb in (["info", str(out)], ["push", str(out), "alice/x", "--dry-run"]):
        result = CliRunner().invoke(app, verb)
        assert result.exit_code == 1 and "missing beside recipe.yaml" in " ".join(result.output.split())
