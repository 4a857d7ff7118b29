"""Writing so that a crash at any point leaves either the old file or the new one."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from caprese.errors import CapreseError
from caprese.progress import say


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """`write(temporary)` beside `path`, flush to disk, then rename over it.

    Raises:
        CapreseError: the directory cannot be written or the disk is full; `path` is as it was.
    """
    tmp = path.with_name(f".{path.name}.tmp")  # always the same, so that a rerun clears what a killed run left
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write(tmp)
            put_in_place(tmp, path)
    finally:
        with contextlib.suppress(OSError):
            tmp.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the disk refuses inside, of what becomes `path`, is said in one line.

    Raises:
        CapreseError: it did.
    """
    try:
        yield
    except CapreseError:
        raise
    except Exception as error:  # safetensors and tokenizers have kinds of their own for a full disk
        if _number(error) not in errno.errorcode:
            raise
        raise unwritable(path, error) from error


@contextlib.contextmanager
def whole_directory(target: Path) -> Iterator[Path]:
    """A directory to fill, which takes the place of `target` when all of it is on disk; until then that is as it was.

    Where `target` is a link, what it points to is replaced. What a killed run left is cleared, or put back.

    Raises:
        CapreseError: the disk refuses, or another run is at this.
    """
    target = target.resolve()
    made, before = (target.with_name(f".{target.name}.{end}") for end in ("tmp", "before"))
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with alone(made.with_suffix(".lock"), target):
            if before.exists() and not target.exists():  # killed between the two steps below
                os.replace(before, target)
            for left in (made, before):
                shutil.rmtree(left, ignore_errors=True)
            try:
                made.mkdir()
                yield made
                for file in made.rglob("*"):
                    if file.is_file():
                        put_in_place(file, file)
                if target.exists():
                    os.replace(target, before)
                os.replace(made, target)
            finally:
                if before.exists() and not target.exists():
                    os.replace(before, target)
                for left in (made, before):
                    shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def alone(lock: Path, at: Path, wait: float = 0) -> Iterator[None]:
    """Inside, no other process is at work `at` a place, as far as those go that ask for the same `lock`.

    A process that dies lets go of it.

    Args:
        wait: seconds for another one to be done.

    Raises:
        CapreseError: another one is.
    """
    who = lock.with_name(f"{lock.name}.json")
    held = FileLock(lock)
    with writing(at):
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            held.acquire(timeout=wait)
        except Timeout as error:
            raise CapreseError(f"another run is at work in {at}{_said(who)}; wait for it, or stop it") from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            say((f"{at}: no locks on this file system, so that nobody notices two runs at once", "yellow"))
    try:
        with contextlib.suppress(OSError):  # a courtesy
            who.write_text(json.dumps({"process": os.getpid(), "host": socket.gethostname(), "since": _now()}))
        yield
    finally:
        if held.is_locked:  # what is unlinked while it is held is nobody else's
            for left in (who, lock):
                with contextlib.suppress(OSError):
                    left.unlink(missing_ok=True)
            held.release()


#: what says that a file system has none
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


def _now() -> str:
    return datetime.now().astimezone().isoformat(" ", "seconds")


def _said(who: Path) -> str:
    try:
        found = json.loads(who.read_text())
        return f" (process {found['process']} on {found['host']}, since {found['since']})"
    except (OSError, ValueError, LookupError, TypeError):
        return ""  # it has just come or gone


def put_in_place(tmp: Path, path: Path) -> None:
    """A finished file to disk and over another, with the rights a new file gets (safetensors gives it fewer)."""
    with open(tmp, "rb+") as file:
        os.fsync(file.fileno())
    os.chmod(tmp, 0o666 & ~_umask())
    os.replace(tmp, path)


_REMEDIES = {
    errno.ENOSPC: "free space",
    errno.EDQUOT: "free space within your quota",
    errno.EFBIG: "allow larger files (ulimit -f)",
}


def unwritable(path: Path, error: Exception) -> CapreseError:
    number = _number(error)
    remedy = "free space" if number is None else _REMEDIES.get(number)
    why = os.strerror(number) if number else str(error)
    remedy = "choose another directory" if remedy is None else f"{remedy} or choose another directory"
    return CapreseError(f"cannot write {path}: {why}; {remedy}, then run again (finished work is kept)")


def _number(error: Exception) -> int | None:
    """Of an error of the operating system, as whoever wrote the file says it."""
    said = re.search(r"(?:os error|code:) (\d+)", str(error))
    return int(said[1]) if said else getattr(error, "errno", None)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_bytes(path: Path, data: bytes) -> None:
    """A file as `write_atomic` writes one."""
    write_atomic(path, lambda tmp: tmp.write_bytes(data))


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
    """Tensors with JSON-able facts and a digest of both in the header, as safetensors."""
    flat = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    said = json.dumps(facts)
    header = {"caprese": said, "sha256": _content(flat, said)}
    write_atomic(path, lambda tmp: save_file(flat, tmp, metadata=header))


def read_tensors(path: Path, remedy: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What `write_tensors` wrote.

    Raises:
        CapreseError: truncated, altered or not ours; `remedy` says what to do.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if header["sha256"] != _content(tensors, header["caprese"]):
            raise ValueError("its content was altered")
        return tensors, json.loads(header["caprese"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise CapreseError(f"{path} is truncated or damaged ({error}); {remedy}") from error


def _content(tensors: Mapping[str, torch.Tensor], said: str) -> str:
    digest = hashlib.sha256(said.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_json(path: Path, remedy: str, named: str | None = None) -> dict[str, Any]:
    """A JSON object, whoever wrote it.

    Args:
        named: what the file is to whoever reads the line, where its path says little.

    Raises:
        CapreseError: it is none; `remedy` says what to do.
    """
    try:
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict):
            raise ValueError(f"not an object but {type(found).__name__}")
        json.dumps(found, ensure_ascii=False).encode()  # half a letter, written as \ud800, can be written nowhere
    except (OSError, ValueError, RecursionError) as error:
        raise CapreseError(f"{named or path} is damaged ({error}); {remedy}") from error
    return found


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """A JSON object with a digest of itself."""
    write_json(path, {**value, "sha256": _seal(value)})


def read_sealed(path: Path, remedy: str, named: str | None = None) -> dict[str, Any]:
    """What `write_sealed` wrote, without the digest.

    Raises:
        CapreseError: truncated, altered, or no JSON object; `remedy` and `named` as of `read_json`.
    """
    found = read_json(path, remedy, named)
    if found.pop("sha256", None) != _seal(found):
        raise CapreseError(f"{named or path} is damaged (its content was altered); {remedy}")
    return found


def _seal(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_writable(directory: Path) -> None:
    """Fail before the work, not after it.

    Raises:
        CapreseError: the directory cannot be made or written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        raise unwritable(directory, error) from error


@contextlib.contextmanager
def at_work(directory: Path) -> Iterator[None]:
    """Inside, this process alone writes a result into `directory`.

    Raises:
        CapreseError: the directory cannot be made or written, or another run is at work in it.
    """
    check_writable(directory)
    with alone(directory / ".lock", directory):
        yield


def path_of(text: str | os.PathLike[str]) -> Path:
    """A path as it was typed, ~ and ~user written out.

    Raises:
        CapreseError: no path of any file system.
    """
    said = os.fspath(text)
    try:
        said.encode("utf-8")  # half of a character is in no name
        path = Path(said).expanduser()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.stat(path)
    except (ValueError, RuntimeError, OSError) as error:
        why = getattr(error, "strerror", None) or error
        raise CapreseError(f"{said[:80]!a} is no path ({why}); give another one") from error
    return path


def existing(directory: Path) -> Path:
    """The directory, or the nearest one above that is there."""
    directory = directory.absolute()
    while not directory.exists():
        directory = directory.parent
    return directory


def free_bytes(directory: Path) -> int:
    """Of the disk that a directory is on, or will be."""
    return shutil.disk_usage(existing(directory)).free


def cache_dir() -> Path:
    """Where caprese keeps what it converted or compiled: $CAPRESE_CACHE, or ~/.cache/caprese."""
    return Path(os.environ.get("CAPRESE_CACHE") or Path.home() / ".cache" / "caprese")
