"""A hub that lies: one line, nothing written outside of the cache, nothing used."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import HUB_SOCKET, REAL_HUB, byte_tokenizer, recovered, tiny_llama
from hub import Hub, Lie, Repo, Sent
from huggingface_hub import close_session
from huggingface_hub.utils import get_session
from huggingface_hub.utils._http import default_client_factory
from typer.testing import CliRunner

import caprese
from caprese.cli import app
from caprese.models.answers import checked_answers

pytestmark = pytest.mark.skipif(REAL_HUB, reason="needs a hub that can be made to lie")
RESOLVE, INFO = r"(HEAD|GET) /.*/resolve/", r"GET /api/models/[^/]+/[^/]+(/revision/.*)?$"
OUT = '"../../../../escaped"'
HUGE = 10**13
ADAPTER, CACHE = "alice/adapter", "a/b/c/d/hub"


def headed(**more: str) -> Lie:
    return lambda status, body, headers: (status, body, {**headers, **more})


def told(change: Callable[[Any], Any]) -> Lie:
    """A JSON body with a change."""

    def lie(status: int, body: bytes, headers: dict[str, str]) -> Sent:
        changed = json.dumps(change(json.loads(body))).encode()
        return status, changed, {**headers, "Content_Length": str(len(changed))}

    return lie


def instead(body: bytes, kind: str = "text/html") -> Lie:
    return lambda *_: (200, body, {"Content_Length": str(len(body)), "Content_Type": kind})


def elsewhere(place: str) -> Lie:
    return lambda status, body, headers: (302, b"", {**headers, "Content_Length": "0", "Location": place})


def huge(status: int, body: bytes, headers: dict[str, str]) -> Sent:
    name = "X_Linked_Size" if "X_Linked_Size" in headers else "Content_Length"
    return status, body, {**headers, name: str(HUGE)}


def listing(*names: str) -> Lie:
    """Of what a repository holds, in both of the ways that the hub's client asks for it."""
    entries = [{"type": "file", "oid": "0" * 40, "size": 3, "path": name} for name in names]
    return told(
        lambda said: (
            entries if isinstance(said, list) else {**said, "siblings": [{"rfilename": name} for name in names]}
        )
    )


SELF = f"http://localhost:{HUB_SOCKET.getsockname()[1] if not REAL_HUB else 0}/lfs/{'0' * 64}"
LIES: dict[str, tuple[str, Lie, str]] = {
    "an etag that is a path": (RESOLVE, headed(ETag=OUT), "a path in place of etag"),
    "a linked etag that is one": (RESOLVE, headed(X_Linked_Etag=OUT), "a path in place of x-linked-etag"),
    "a commit that is one": (RESOLVE, headed(X_Repo_Commit=OUT.strip('"')), "a path in place of x-repo-commit"),
    "a revision that is one": (INFO, told(lambda facts: {**facts, "sha": OUT.strip('"')}), "a path in place of sha"),
    "no revision": (INFO, told(lambda facts: {"id": 3}), "the hub failed for"),
    "a list of what is there that is none": (r"GET /api/models/", told(lambda facts: None), ""),
    "none of an adapter's files": (r"GET /api/models/", listing("a.txt"), "holds none of"),
    "a page": (r".", instead(b"<html>Please log in</html>"), "the hub failed for"),
    "other weights": (r"GET /lfs/", lambda status, body, headers: (status, body[::-1], headers), "damaged"),
    "another size": (RESOLVE + ".*safetensors", headed(X_Linked_Size="17"), "should be of size 17"),
    "ten terabytes": (
        RESOLVE + ".*safetensors",
        huge,
        f"announces {HUGE:,} bytes of adapter_model.s",
    ),
    "terabytes of JSON": (
        RESOLVE + ".*adapter_config.json",
        huge,
        f"announces {HUGE:,} bytes of adapter_config",
    ),
    "a size that is none": (RESOLVE + ".*safetensors", headed(X_Linked_Size="9" * 99), "announces"),
    "a circle": (r"(HEAD|GET) /lfs/", elsewhere(SELF), "cannot reach the hub"),
    "nowhere": (RESOLVE, elsewhere("http://127.0.0.1:9/x"), "cannot reach the hub"),
    "a file of this machine": (RESOLVE, elsewhere("file:///etc/passwd"), "cannot reach the hub"),
}


@pytest.fixture
def around(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An adapter on a hub, a cache of its own deep in a directory, and no waiting."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    cache = tmp_path / CACHE
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", str(cache), raising=False)
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(cache))
    caprese.save(recovered(caprese.apply(tiny_llama(), caprese.Griffin())), tmp_path / "adapter")
    caprese.push(tmp_path / "adapter", ADAPTER)
    return tmp_path


def outside(room: Path) -> list[Path]:
    """Files of the cache's neighbourhood that are not its own."""
    found = [p for p in room.rglob("*") if p.is_file() and "hub" not in p.relative_to(room).parts]
    return [p for p in found if p.relative_to(room).parts[0] != "adapter"]


@pytest.mark.parametrize("name", LIES)
def test_a_lie_is_one_line(hub: Hub, around: Path, name: str) -> None:
    path, lie, says = LIES[name]
    hub.lie(path, lie)
    begin = time.monotonic()
    found = CliRunner().invoke(app, ["info", ADAPTER])
    assert isinstance(found.exception, SystemExit) and found.exit_code == 1, found.output
    lines = [line for line in found.output.splitlines() if line.startswith("error:")]
    said = " ".join(found.output.split())
    assert len(lines) == 1 and says in said and ADAPTER in said, found.output
    assert time.monotonic() - begin < 30
    assert outside(around) == []
    model = tiny_llama()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(caprese.CapreseError):
        caprese.load(model, ADAPTER)
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())
    hub.lies.clear()
    if f"hf cache rm model/{ADAPTER}" in said:
        shutil.rmtree(around / CACHE)
        with contextlib.suppress(ImportError):  # as in another process
            from huggingface_hub import _tree_cache

            _tree_cache._IN_MEMORY_TREE_CACHE.clear()
    honest = CliRunner().invoke(app, ["info", ADAPTER])
    assert honest.exit_code == 0, (honest.output, hub.log[-12:])


def test_a_refused_connection_does_not_end_the_checks(hub: Hub, around: Path) -> None:
    """huggingface_hub then makes a client anew."""
    turns = iter([elsewhere("http://127.0.0.1:9/x")])
    hub.lie(r"GET /lfs/", lambda *sent: next(turns, lambda *same: same)(*sent))
    hub.lie(RESOLVE + ".*caprese_config", headed(ETag=OUT))
    found = CliRunner().invoke(app, ["info", ADAPTER])
    assert found.exit_code == 1 and "a path in place of etag" in " ".join(found.output.split()), found.output
    hub.lies.pop()
    with checked_answers():
        get_session().close()
        close_session()
        assert len(get_session().event_hooks["response"]) == 1 + before()
    assert len(get_session().event_hooks["response"]) == before()
    assert outside(around) == []


def before() -> int:
    """Hooks that huggingface_hub has of its own."""
    return len(default_client_factory().event_hooks["response"])


def test_what_is_in_the_cache_needs_no_room(hub: Hub, around: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert CliRunner().invoke(app, ["info", ADAPTER]).exit_code == 0
    hub.repos[ADAPTER].commit("a note", {**hub.repos[ADAPTER].commits[-1].files, "README.md": b"changed"})
    usage = shutil.disk_usage(around)._replace(free=100)
    monkeypatch.setattr("caprese.models.answers.shutil.disk_usage", lambda path: usage)
    shutil.rmtree(around / CACHE / "models--alice--adapter" / "snapshots")
    found = CliRunner().invoke(app, ["info", ADAPTER])
    assert found.exit_code in (0, 1) and "adapter_model.safetensors" not in found.output


def test_names_that_lead_elsewhere_are_not_asked_for(hub: Hub, around: Path) -> None:
    names = sorted(hub.repos[ADAPTER].commits[-1].files)
    hub.lie(r"GET /api/models/", listing(*names, "../../../../escaped", "/tmp/escaped", "plots/../../escaped.json"))
    assert CliRunner().invoke(app, ["info", ADAPTER]).exit_code == 0
    assert outside(around) == [] and not any("escaped" in line for line in hub.log)


def test_a_base_is_not_believed_either(hub: Hub, around: Path) -> None:
    tiny_llama().save_pretrained(around / "adapter" / "base")
    byte_tokenizer().save_pretrained(around / "adapter" / "base")
    hub.repos["alice/base"] = Repo(False)
    files = {p.name: p.read_bytes() for p in (around / "adapter" / "base").iterdir()}
    hub.repos["alice/base"].commit("first", files)
    assert caprese.load_base("alice/base")[0].config.hidden_size == 32
    hub.repos["alice/base"].commit("second", {**files, "README.md": b"changed"})
    for lie, says in ((headed(X_Repo_Commit=OUT.strip('"')), "a path in place of"), (huge, "announces")):
        hub.lies[:] = [(RESOLVE, lie)]
        with pytest.raises(caprese.CapreseError, match=f"alice/base: .*{says}"):
            caprese.load_base("alice/base")
    assert outside(around) == []
