"""Saving and loading: PEFT's own files, and beside them what was done to which base."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedTokenizerBase

from caprese import __version__
from caprese.adapters.branch import empty_slots
from caprese.adapters.fingerprint import fingerprint
from caprese.adapters.hub import download, is_hub_id
from caprese.efficient_methods import (
    EfficientFFN,
    Method,
    applied_ffns,
    apply,
    check_reselect,
    compose,
    known_methods,
    make_method,
    phases_of,
    remove,
    replacements,
    settle_mixers,
)
from caprese.errors import CapreseError
from caprese.files import check_writable, put_in_place, sha256, unwritable, write_json
from caprese.models import base_of, load_base, resolve, unwrap

SIDECAR = "caprese_config.json"
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
CALIBRATION = "caprese_calibration.safetensors"
MIXERS = "caprese_mixers.safetensors"
#: all that makes an adapter
FILES = (WEIGHTS, CONFIG, CALIBRATION, MIXERS, SIDECAR)


class BaseFacts(BaseModel):
    """The base an adapter was made for."""

    name: str
    id: str
    revision: str | None
    fingerprint: dict[str, str]


class Sidecar(BaseModel):
    """caprese_config.json: what was done to which base."""

    model_config = ConfigDict(extra="allow")

    caprese_version: str
    methods: list[dict[str, Any]]
    reselect_every: int | None = None
    base: BaseFacts
    weights_sha256: str
    calibration_sha256: str | None = None
    """Of the file with what methods chose from samples, where one does."""
    mixers_sha256: str | None = None
    """Of the file with what stands in for attentions, where something does."""

    @property
    def digest(self) -> str:
        """Of all that an adapter is, with its base: what was measured with one is not another's."""
        files = [self.weights_sha256, self.calibration_sha256, self.mixers_sha256]
        facts = [self.base.fingerprint, self.methods, self.reselect_every, *files]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]

    def make_methods(self) -> tuple[Method, ...]:
        """The methods, in the order in which they act.

        Raises:
            CapreseError: unknown, damaged, or no longer composable.
        """
        for facts in self.methods:
            if (name := facts.get("name")) not in known_methods():
                raise CapreseError(
                    f"this adapter needs the method {name!r}, unknown here; install the package that brings it, or "
                    "upgrade caprese"
                )
        try:
            return compose([make_method(facts) for facts in self.methods])
        except CapreseError as error:
            raise CapreseError(f"{SIDECAR} is damaged ({error}); fetch or make the adapter again") from error


def save(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write adapter_config.json, adapter_model.safetensors and caprese_config.json, each atomically.

    Raises:
        CapreseError: no adapter or no method on the model, NaN in the adapter, or an unwritable directory.
    """
    target = Path(directory)
    if not isinstance(model, PeftModel):
        raise CapreseError("there is no recovery adapter on this model to save; run caprese.recover first")
    ffns = applied_ffns(model)
    if not ffns:
        raise CapreseError("no efficient method is applied to this model; nothing to save")
    for name, parameter in model.named_parameters():
        if (".lora_" in name or ".mixer." in name) and not torch.isfinite(parameter).all():
            raise CapreseError(f"adapter weight {name} holds NaN or infinity; not saved. Lower the learning rate")
    check_writable(target)
    phases = phases_of(model)
    calibration, mixers = _calibration(ffns), _mixers(model)
    base = base_of(model)
    id_ = public_id(base.model_id)
    for config in model.peft_config.values():
        config.base_model_name_or_path, config.revision = id_, base.revision
    try:
        for stale in target.glob(".saving-*"):  # a killed run's
            shutil.rmtree(stale, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=target, prefix=".saving-") as name:
            scratch = Path(name)
            # no look at the hub for embedding layers, which a recovery adapter never has
            model.save_pretrained(name, safe_serialization=True, save_embedding_layers=False)
            if calibration:
                save_file(calibration, scratch / CALIBRATION)
            if mixers:
                save_file(mixers, scratch / MIXERS)
            facts = Sidecar(
                caprese_version=__version__,
                methods=[{"name": m.name, **m.model_dump(mode="json")} for m in phases.methods],
                reselect_every=phases.reselect_every,
                base=BaseFacts(
                    name=public_id(base.name), id=id_, revision=base.revision, fingerprint=fingerprint(model)
                ),
                weights_sha256=sha256(scratch / WEIGHTS),
                calibration_sha256=sha256(scratch / CALIBRATION) if calibration else None,
                mixers_sha256=sha256(scratch / MIXERS) if mixers else None,
            )
            write_json(scratch / SIDECAR, facts.model_dump(mode="json"))
            # only when all are on disk do they take the place of older ones
            for file in FILES:
                if (scratch / file).exists():
                    put_in_place(scratch / file, target / file)
    except (OSError, SafetensorError) as error:
        raise unwritable(target, error) from error


def _calibration(ffns: Mapping[str, EfficientFFN]) -> dict[str, torch.Tensor]:
    """What `apply` was given."""
    return {
        f"{m.name}.{w.layer}": getattr(w, f"fixed_{m.name}").detach().cpu().contiguous()
        for w in ffns.values()
        for m in w.methods
        if "samples" in m.learns
    }


def _mixers(model: nn.Module) -> dict[str, torch.Tensor]:
    """What stands in for attentions: parameters by "layer.name"."""
    named = ((at.layer, n, p) for at in replacements(unwrap(model)) for n, p in at.mixer.named_parameters())
    return {f"{layer}.{name}": p.detach().cpu().contiguous() for layer, name, p in named}


def public_id(name: str) -> str:
    """A hub id as it is; of a local path only the last part, so that nobody's directories end in a file."""
    path = Path(name).expanduser()
    return path.resolve().name if name and (name.startswith(("/", ".", "~")) or path.exists()) else name


def locate(adapter: str | os.PathLike[str], revision: str | None, *files: str) -> Path:
    """The directory with an adapter's files: a local one, or `files` of a repository, all of one commit.

    Args:
        adapter: a directory, or a hub id: "owner/name", "owner/name@revision".

    Raises:
        CapreseError: neither a directory nor a hub id, or no access.
    """
    local = Path(adapter).expanduser()
    if local.is_dir():
        return local
    repo, _, at = str(adapter).partition("@")
    if not is_hub_id(repo):
        raise CapreseError(f"no adapter at {str(adapter)!r}: neither a directory nor a hub id like 'owner/name'")
    return download(repo, revision or at or None, files)


def _present(directory: Path, name: str, adapter: str | os.PathLike[str]) -> Path:
    if not (directory / name).is_file():
        raise CapreseError(f"{adapter} holds no {name}: not a (finished) caprese adapter; run caprese recover")
    return directory / name


def read_sidecar(adapter: str | os.PathLike[str], revision: str | None = None) -> Sidecar:
    """What an adapter directory or repository says of itself.

    Raises:
        CapreseError: missing or unreadable.
    """
    path = _present(locate(adapter, revision, SIDECAR), SIDECAR, adapter)
    try:
        return Sidecar.model_validate_json(path.read_text())
    except (ValidationError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CapreseError(f"{SIDECAR} of {adapter} is damaged; fetch or make the adapter again") from error


def _peft_config(directory: Path, adapter: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads(_present(directory, CONFIG, adapter).read_text())
        config["r"], config.get("rank_pattern")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CapreseError(f"{CONFIG} of {adapter} is damaged ({error!r}); fetch or make the adapter again") from error
    return config


def ranks_of(adapter: str | os.PathLike[str], revision: str | None = None) -> tuple[int, dict[int, int]]:
    """The rank of an adapter's branches, from its PEFT config, and that of layers with another.

    Raises:
        CapreseError: no such adapter, or it is damaged.
    """
    config = _peft_config(locate(adapter, revision, CONFIG), adapter)
    own = {
        int(re.findall(r"\.(\d+)\.", f".{key}.")[0]): rank for key, rank in (config.get("rank_pattern") or {}).items()
    }
    return config["r"], own


def has_branches(adapter: str | os.PathLike[str]) -> bool:
    """Whether a branch of an adapter gives anything; without FFN methods, they stay at zero.

    Raises:
        CapreseError: no such adapter, or it is damaged.
    """
    path = _present(locate(adapter, None, WEIGHTS), WEIGHTS, adapter)
    tensors = _check_tensors(path, adapter, read_sidecar(adapter).weights_sha256)
    return any(bool(tensor.any()) for name, tensor in tensors.items() if ".lora_B." in name)


def check_files(
    directory: Path, sidecar: Sidecar, adapter: str | os.PathLike[str]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Calibration and mixers of an adapter whose files are whole, finite, and as they were saved.

    Raises:
        CapreseError: naming the file that is not.
    """
    _present(directory, CONFIG, adapter)
    _check_tensors(_present(directory, WEIGHTS, adapter), adapter, sidecar.weights_sha256)
    more = ((CALIBRATION, sidecar.calibration_sha256), (MIXERS, sidecar.mixers_sha256))
    calibration, mixers = (
        {} if digest is None else _check_tensors(_present(directory, name, adapter), adapter, digest)
        for name, digest in more
    )
    return calibration, mixers


def check_base(model: nn.Module, facts: BaseFacts) -> None:
    """Refuse a base with other weights than the adapter was made for.

    Raises:
        CapreseError: naming the part that differs.
    """
    found = fingerprint(model)
    # of a base loaded in 4 or 8 bit, embeddings and norms are what they were
    groups = ("rest",) if getattr(unwrap(model), "is_quantized", False) else facts.fingerprint.keys()
    wrong = [group for group in groups if found.get(group) != facts.fingerprint.get(group)]
    half = unwrap(model).dtype == torch.float16
    if wrong:
        given = base_of(model)
        raise CapreseError(
            f"this adapter was made for {_at(facts.id, facts.revision)}, and the base given "
            f"({_at(public_id(given.model_id), given.revision)}) has other weights ({', '.join(wrong)}); "
            "load that base, or recover this one"
            + (" (in float16 weights of a float32 checkpoint differ: try bfloat16)" if half else "")
        )


def _at(name: str, revision: str | None) -> str:
    return f"{name}@{revision}" if revision else name


def base_revision(sidecar: Sidecar, base: str) -> str | None:
    """The revision the adapter was made for, if `base` is the hub's name of its base."""
    known = resolve(base)
    return sidecar.base.revision if known.model_id == known.source == sidecar.base.id else None


def load_base_for(
    sidecar: Sidecar, base: str, *, revision: str | None = None, **how: Any
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """`load_base`, of a hub id at the revision the adapter was made for, if no other is asked for.

    Raises:
        CapreseError: see `load_base`.
    """
    return load_base(base, revision=revision or base_revision(sidecar, base), **how)


def load(
    base: str | nn.Module,
    adapter: str | os.PathLike[str],
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str = "auto",
    reselect_every: int | Literal["saved"] | None = "saved",
) -> PeftModel:
    """Base + methods + recovery adapter, ready for `generate`.

    Args:
        base: a model, or the name of one (see `load_base`); of a hub id, the revision the adapter was made for.
        adapter: a directory `save` or `recover` wrote, or a hub id.
        revision: of the adapter, on the hub.
        reselect_every: generated tokens between two reselections; "saved" as the adapter was made, None never.

    Raises:
        CapreseError: wrong base, damaged files, unknown method.
    """
    directory = locate(adapter, revision, *FILES)
    sidecar = read_sidecar(directory)
    methods = sidecar.make_methods()
    calibration, mixers = check_files(directory, sidecar, adapter)
    if isinstance(base, str):
        base, _ = load_base_for(sidecar, base, dtype=dtype, device=device)
    check_base(base, sidecar.base)
    every = check_reselect(sidecar.reselect_every if reselect_every == "saved" else reselect_every)
    applied = applied_ffns(base)
    if applied and phases_of(base).methods != methods:
        raise CapreseError("another method is applied to this model; caprese.remove(model) first")
    known = _calibration(applied)
    if applied and not (
        known.keys() == calibration.keys()
        and all(torch.equal(choice, calibration[name].to(choice.dtype)) for name, choice in known.items())
    ):
        raise CapreseError("this method is applied with another calibration; caprese.remove(model) first")
    if applied and any(
        not torch.equal(value, mixers[name].to(value.dtype)) for name, value in _mixers(base).items() if name in mixers
    ):
        raise CapreseError("this model has the mixers of another adapter; caprese.remove(model) first")
    if applied:
        phases_of(base).reselect(every)
    else:
        apply(base, methods, calibration=calibration, reselect_every=every)
    try:
        _set_mixers(base, mixers, adapter)
        model = PeftModel.from_pretrained(base, str(directory))
    except CapreseError:
        if not applied:
            remove(base)
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        if not applied:  # the base goes back as it came
            empty_slots(base)
            remove(base)
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CapreseError(f"{CONFIG} of {adapter} is damaged ({first}); fetch or make the adapter again") from error
    settle_mixers(model)
    unwrap(model).eval()
    return model


def _set_mixers(model: nn.Module, mixers: Mapping[str, torch.Tensor], adapter: str | os.PathLike[str]) -> None:
    with torch.no_grad():
        own = {f"{at.layer}.{n}": p for at in replacements(unwrap(model)) for n, p in at.mixer.named_parameters()}
        if own.keys() != mixers.keys() or any(own[name].shape != t.shape for name, t in mixers.items()):
            raise CapreseError(f"{MIXERS} of {adapter} does not fit its methods; fetch or make the adapter again")
        for name, value in mixers.items():
            own[name].copy_(value)


def _check_tensors(path: Path, adapter: str | os.PathLike[str], digest: str) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, if it is whole, finite, and as it was saved."""
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise CapreseError(
            f"{path.name} of {adapter} is truncated or damaged ({error}); fetch or make it again"
        ) from error
    if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
        raise CapreseError(f"{path.name} of {adapter} holds NaN or infinity; fetch or make it again")
    if sha256(path) != digest:
        raise CapreseError(
            f"{path.name} of {adapter} was altered after it was saved; fetch it again, or caprese.save it anew"
        )
    return tensors
