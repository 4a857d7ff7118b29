"""What is written is whole or not there, and says in one line what kept it from being."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from caprese.errors import CapreseError
from caprese.files import alone, read_json, read_sealed, whole_directory, write_sealed

# files of this process end at 20,000 bytes
LIMITED = """
import resource, sys, torch
from pathlib import Path
import numpy, pyarrow, pyarrow.parquet
from caprese.errors import CapreseError
from caprese.files import whole_directory, write_atomic, write_json, write_tensors
from transformers import LlamaConfig, LlamaForCausalLM
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
model = LlamaForCausalLM(LlamaConfig(vocab_size=999, hidden_size=64, num_hidden_layers=1, intermediate_size=64))
table = pyarrow.table({"a": numpy.random.rand(99_999)})
at = Path(sys.argv[1])
def checkpoint():
    with whole_directory(at) as made:
        model.save_pretrained(made)
for write in (
    lambda: write_json(at, list(range(99_999))),
    lambda: write_tensors(at, {"a": torch.zeros(99_999)}, {}),
    lambda: write_atomic(at, lambda tmp: pyarrow.parquet.write_table(table, tmp)),
    checkpoint,
):
    try:
        write()
        print("written")
    except CapreseError as error:
        print(error)
"""


def test_files_that_may_not_be_so_large(tmp_path: Path) -> None:
    run = [sys.executable, "-c", LIMITED, str(tmp_path / "x")]
    lines = subprocess.run(run, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(lines) == 4
    for line in lines:
        assert line.startswith(f"cannot write {tmp_path / 'x'}: File too large; allow larger files (ulimit -f) or")
    assert not any(tmp_path.iterdir())


def full(target: Path, text: str) -> None:
    with whole_directory(target) as made:
        (made / "text").write_text(text)


def test_a_directory_is_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "out"
    full(target, "one")
    with pytest.raises(ZeroDivisionError), whole_directory(target) as made:
        (made / "text").write_text("two")
        1 / 0  # noqa: B018
    assert (target / "text").read_text() == "one"
    full(target, "two")
    assert (target / "text").read_text() == "two" and os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("taken", [False, True])
def test_what_a_killed_run_left_is_put_right(taken: bool, tmp_path: Path) -> None:
    """Killed while it filled its directory, or when it had taken away what was there and not put its own in place."""
    target = tmp_path / "out"
    full(target, "one")
    (tmp_path / ".out.tmp").mkdir()
    (tmp_path / ".out.tmp" / "half").touch()
    if taken:
        target.rename(tmp_path / ".out.before")
    with pytest.raises(ZeroDivisionError), whole_directory(target):
        assert (target / "text").read_text() == "one"
        1 / 0  # noqa: B018
    assert (target / "text").read_text() == "one" and os.listdir(tmp_path) == ["out"]


def test_what_a_link_points_to_is_replaced(tmp_path: Path) -> None:
    full(tmp_path / "real" / "out", "one")
    (tmp_path / "link").symlink_to(tmp_path / "real" / "out")
    full(tmp_path / "link", "two")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "out" / "text").read_text() == "two"
    (tmp_path / "ahead").symlink_to(tmp_path / "real" / "later")
    full(tmp_path / "ahead", "three")
    assert (tmp_path / "real" / "later" / "text").read_text() == "three"


HOLD = """
import sys, time
from pathlib import Path
from caprese.files import alone
with alone(Path(sys.argv[1]), Path("out")):
    print("held", flush=True)
    time.sleep(60)
"""


def test_two_are_not_at_work_in_one_place(tmp_path: Path) -> None:
    """The second is told who the first is; a first that was killed holds nobody up."""
    lock = tmp_path / ".lock"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        says = rf"another run is at work in out \(process {other.pid} on .*, since 20"
        with pytest.raises(CapreseError, match=says), alone(lock, Path("out")):
            pass
        other.kill()
    assert json.loads((tmp_path / ".lock.json").read_text())["process"] == other.pid
    with alone(lock, Path("out")):
        assert json.loads((tmp_path / ".lock.json").read_text())["process"] == os.getpid()
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("stop", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["disk", "ctrl-c"])
def test_what_was_there_comes_back_between_the_two_steps(stop: BaseException, tmp_path: Path, monkeypatch) -> None:
    target = tmp_path / "out"
    full(target, "one")
    real = os.replace

    def fails(source: Path, goal: Path) -> None:
        if str(source).endswith("/.out.tmp"):
            raise stop
        real(source, goal)

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises((CapreseError, KeyboardInterrupt)):
        full(target, "two")
    assert (target / "text").read_text() == "one" and os.listdir(tmp_path) == ["out"]


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object, **__: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    said: list[str] = []
    monkeypatch.setattr(FileLock, "acquire", none)
    monkeypatch.setattr("caprese.files.say", lambda part: said.append(part[0]))
    full(tmp_path / "out", "one")
    assert (tmp_path / "out" / "text").read_text() == "one" and ["no locks" in line for line in said] == [True]


def test_what_is_no_matter_of_the_disk_is_not_said_to_be(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="404"), whole_directory(tmp_path / "out"):
        raise RuntimeError("Error code: 404")
    with pytest.raises(OSError, match="Can't load"), whole_directory(tmp_path / "out"):
        raise OSError("Can't load the model")


@pytest.mark.parametrize("text", ['{"a": "\\ud800"}', '{"\\udfff": 1}', "[]", "{", "[" * 99_999])
def test_json_that_could_be_written_nowhere_is_refused(text: str, tmp_path: Path) -> None:
    """Half a letter, which JSON can say and no file can hold."""
    path = tmp_path / "file.json"
    path.write_text(text)
    with pytest.raises(CapreseError, match="is damaged"):
        read_json(path, "make it again")
    path.write_bytes(b'{"a": "\xed\xa0\x80"}')
    with pytest.raises(CapreseError, match="is damaged"):
        read_json(path, "make it again")
    write_sealed(path, {"a": "\ud800"})  # it vouches for itself
    with pytest.raises(CapreseError, match="is damaged"):
        read_sealed(path, "make it again")
