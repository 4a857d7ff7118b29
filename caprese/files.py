"""Writing so that a crash at any point leaves either the old file or the new one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from caprese.errors import CapreseError


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """`write(temporary)` beside `path`, flush to disk, then rename over it.

    Raises:
        CapreseError: the directory cannot be written or the disk is full; `path` is as it was.
    """
    tmp = path.with_name(f".{path.name}.tmp")  # always the same, so that a rerun clears what a killed run left
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(tmp)
        put_in_place(tmp, path)
    except (OSError, SafetensorError) as error:
        if isinstance(error, SafetensorError) and "No space" not in str(error):
            raise
        raise unwritable(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            tmp.unlink(missing_ok=True)


def put_in_place(tmp: Path, path: Path) -> None:
    """A finished file to disk and over another, with the rights a new file gets (safetensors gives it fewer)."""
    with open(tmp, "rb+") as file:
        os.fsync(file.fileno())
    os.chmod(tmp, 0o666 & ~_umask())
    os.replace(tmp, path)


def unwritable(path: Path, error: Exception) -> CapreseError:
    return CapreseError(
        f"cannot write {path}: {getattr(error, 'strerror', None) or error}; free space or choose another `output`, "
        "then run again (finished work is kept)"
    )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: Path, text: str) -> None:
    write_atomic(path, lambda tmp: _write_text(tmp, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


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


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """A JSON object with a digest of itself."""
    write_json(path, {**value, "sha256": _seal(value)})


def read_sealed(path: Path) -> dict[str, Any]:
    """What `write_sealed` wrote, without the digest.

    Raises:
        CapreseError: truncated, altered, or no JSON object; the line says no remedy.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or found.pop("sha256", None) != _seal(found):
            raise ValueError("its content was altered")
    except (OSError, ValueError) as error:
        raise CapreseError(f"{path} is damaged ({error})") from error
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


def free_bytes(directory: Path) -> int:
    while not directory.exists():
        directory = directory.parent
    return shutil.disk_usage(directory).free


def cache_dir() -> Path:
    """Where caprese keeps what it converted or compiled: $CAPRESE_CACHE, or ~/.cache/caprese."""
    return Path(os.environ.get("CAPRESE_CACHE") or Path.home() / ".cache" / "caprese")
