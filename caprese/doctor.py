"""What `caprese doctor` finds: of this machine, and of an adapter directory."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from caprese import __version__
from caprese.adapters import Adapter
from caprese.errors import CapreseError
from caprese.files import cache_dir, check_writable, free_bytes, path_of, sha256
from caprese.kernels import native
from caprese.kernels.scan import in_use


class Extra(NamedTuple):
    """A package that some things want."""

    module: str
    package: str
    what_for: str
    remedy: str


OPTIONAL = (
    Extra("bitsandbytes", "bitsandbytes", "nf4, int8", 'pip install "caprese[quantized]"'),
    Extra("lm_eval", "lm-eval", "caprese eval --tasks", 'pip install "caprese[eval]"'),
    Extra("compressed_tensors", "compressed-tensors", "export for vLLM", 'pip install "caprese[compressed]"'),
    Extra("openai", "openai", "recover --teacher", 'pip install "caprese[endpoint]"'),
    Extra("mamba_ssm", "mamba-ssm", "mixers' kernels on a GPU", 'pip install "caprese[mamba]" --no-build-isolation'),
    Extra("causal_conv1d", "causal-conv1d", "the same", 'pip install "caprese[mamba]" --no-build-isolation'),
    Extra("triton", "triton", "fused kernels on a GPU", "it comes with torch for CUDA"),
    Extra("vllm", "vllm", "caprese bench --engine vllm", "pip install vllm, in an environment of its own"),
    Extra("llama_cpp", "llama-cpp-python", "caprese bench --engine llama.cpp", "pip install llama-cpp-python"),
)
_NEEDED = ("torch", "transformers", "peft", "accelerate", "safetensors", "huggingface_hub", "pyarrow", "pydantic")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """Returns: {"versions", "devices", "kernels", "optional", "places", "wrong": one line each}."""
    wrong: list[str] = []
    versions: dict[str, str] = {"caprese": __version__, "python": platform.python_version()}
    for package in _NEEDED:
        found = _version(package)
        versions[package] = found or "missing"
        if found is None:
            wrong.append(f"{package} is missing; pip install {package}")
    devices = {"cpu": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"}
    for i in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(i)
        devices[f"cuda:{i}"] = f"{facts.name}, {facts.total_memory / 1e9:.0f} GB"
    compiled = native.library() is not None
    if not compiled:
        wrong.append("no C compiler that works: on a CPU everything runs in torch, more slowly; install gcc or clang")
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    kernels = {
        "C on a CPU": "compiled" if compiled else "none",
        "Triton": "on the GPU" if kind == "cuda" and importlib.util.find_spec("triton") else "not used",
        **{f"mixers' {part}": f"{whose} on {kind}" for part, whose in in_use(kind).items()},
    }
    optional = {}
    for each in OPTIONAL:
        there = importlib.util.find_spec(each.module) is not None
        missing = f"missing ({each.what_for}): {each.remedy}"
        optional[each.package] = _version(each.package) or "there" if there else missing
    places = {}
    for name, path in {"cache": cache_dir(), "models": _hub_cache()}.items():
        try:
            check_writable(path)
            places[name] = f"{path}, {free_bytes(path) / 1e9:.0f} GB free"
        except CapreseError as error:
            places[name] = "not to be written"
            wrong.append(str(error))
    parts = {"versions": versions, "devices": devices, "kernels": kernels, "optional": optional, "places": places}
    return {**parts, "wrong": wrong}


def _hub_cache() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def directory(name: str) -> dict[str, Any]:
    """An adapter directory, every file of it.

    Returns: {"adapter", "checked": files that are as they were written, "wrong": one line each}.

    Raises:
        CapreseError: there is no such directory.
    """
    place = path_of(name)
    if not place.is_dir():
        raise CapreseError(f"no directory {name!r}; give one that caprese recover or save wrote")
    checked: list[str] = []
    wrong = list(_wrong(place, checked))
    return {"adapter": name, "checked": sorted(checked), "wrong": wrong}


def _wrong(place: Path, checked: list[str]) -> Iterator[str]:
    if (place / ".state").is_dir():
        yield f"{place} is half way through a run: the same `caprese recover` again goes on with it"
    try:
        adapter = Adapter.open(place)
    except CapreseError as error:
        yield str(error)
        return
    checked += [name for name in adapter.files if name.endswith(".json")]
    parts = {"adapter_model": adapter.weights, "calibration": adapter.calibration, "mixers": adapter.stand_ins}
    for part, read in parts.items():
        try:
            read()
            checked += [name for name in adapter.files if part in name]
        except CapreseError as error:
            yield str(error)
    try:
        report = adapter.report()
    except CapreseError as error:
        yield str(error)
        return
    if report is None:
        return
    checked.append("report.json")
    for name, digest in report.get("files", {}).items():
        path = place / name
        # of a hub's copy, the card is another and samples stayed with who made it
        if name == "README.md" or (name.startswith("samples/") and not path.parent.is_dir()):
            continue
        if not path.is_file():
            yield f"{path} is missing; run caprese recover again, which makes it anew"
        elif sha256(path) != digest:
            yield f"{path} was altered; run caprese recover again, which makes it anew"
        elif name not in checked:
            checked.append(name)
