"""Saving and loading: PEFT's own files, and beside them what was done to which base."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from peft import PeftModel
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from torch import nn

from caprese import __version__
from caprese.adapters.fingerprint import fingerprint
from caprese.efficient_methods import METHODS, Method, applied_ffns, apply, remove
from caprese.errors import CapreseError
from caprese.files import check_writable, sha256, unwritable, write_json
from caprese.models import base_of, load_base, unwrap

SIDECAR = "caprese_config.json"
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


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
    method: dict[str, Any]
    base: BaseFacts
    weights_sha256: str

    def make_method(self) -> Method:
        facts = dict(self.method)
        name = facts.pop("name", None)
        if name not in METHODS:
            raise CapreseError(f"this adapter needs the method {name!r}, unknown here; upgrade caprese")
        try:
            return METHODS[name](**facts)
        except ValidationError as error:
            raise CapreseError(f"the method in {SIDECAR} is damaged; fetch or make the adapter again") from error


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
        if ".lora_" in name and not torch.isfinite(parameter).all():
            raise CapreseError(f"adapter weight {name} holds NaN or infinity; not saved. Lower the learning rate")
    check_writable(target)
    method = next(iter(ffns.values())).method
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
            facts = Sidecar(
                caprese_version=__version__,
                method={"name": method.name, **method.model_dump(mode="json")},
                base=BaseFacts(
                    name=public_id(base.name), id=id_, revision=base.revision, fingerprint=fingerprint(model)
                ),
                weights_sha256=sha256(scratch / WEIGHTS),
            )
            write_json(scratch / SIDECAR, facts.model_dump(mode="json"))
            # only when all three are on disk do they take the place of older ones
            for file in (WEIGHTS, CONFIG, SIDECAR):
                os.replace(scratch / file, target / file)
    except (OSError, SafetensorError) as error:
        raise unwritable(target, error) from error


def public_id(model_id: str) -> str:
    """A hub id as it is; of a local path only the last part, so that nobody's directories end in a file."""
    return Path(model_id).name if os.path.isabs(model_id) or model_id.startswith((".", "~")) else model_id


def _file(adapter: str, name: str, revision: str | None) -> Path:
    """One file of an adapter, from a directory or the hub."""
    local = Path(adapter).expanduser()
    if local.is_dir():
        if not (local / name).is_file():
            raise CapreseError(f"{adapter} holds no {name}: not a (finished) caprese adapter; run caprese recover")
        return local / name
    if adapter.count("/") != 1 or adapter.startswith((".", "/", "~")):
        raise CapreseError(f"no adapter at {adapter!r}: neither a directory nor a hub id like 'owner/name'")
    try:
        return Path(hf_hub_download(adapter, name, revision=revision))
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CapreseError(
            f"cannot get {name} of {adapter!r} from the hub ({first}); check name, access and network"
        ) from error


def read_sidecar(adapter: str | os.PathLike[str], revision: str | None = None) -> Sidecar:
    """What an adapter directory or repository says of itself.

    Raises:
        CapreseError: missing or unreadable.
    """
    path = _file(str(adapter), SIDECAR, revision)
    try:
        return Sidecar.model_validate_json(path.read_text())
    except (ValidationError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CapreseError(f"{SIDECAR} of {adapter} is damaged; fetch or make the adapter again") from error


def check_base(model: nn.Module, facts: BaseFacts) -> None:
    """Refuse a base with other weights than the adapter was made for.

    Raises:
        CapreseError: naming the part that differs.
    """
    found = fingerprint(model)
    wrong = [group for group, digest in facts.fingerprint.items() if found.get(group) != digest]
    if wrong:
        raise CapreseError(
            f"this adapter was made for {facts.id}{'@' + facts.revision if facts.revision else ''}, and the base given "
            f"({public_id(base_of(model).model_id)}) has other weights ({', '.join(wrong)}); "
            "load that base, or recover this one"
        )


def load(
    base: str | nn.Module,
    adapter: str | os.PathLike[str],
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str = "auto",
) -> PeftModel:
    """Base + method + recovery adapter, ready for `generate`.

    Args:
        base: a model, or the name of one (see `load_base`).
        adapter: a directory `save` or `recover` wrote, or a hub id.
        revision: of the adapter, on the hub.

    Raises:
        CapreseError: wrong base, damaged files, unknown method.
    """
    sidecar = read_sidecar(adapter, revision)
    config = _file(str(adapter), CONFIG, revision)
    weights = _file(str(adapter), WEIGHTS, revision)
    try:
        with safe_open(weights, framework="pt") as file:
            finite = all(torch.isfinite(file.get_tensor(name)).all() for name in file.keys())  # noqa: SIM118
    except SafetensorError as error:
        raise CapreseError(
            f"{WEIGHTS} of {adapter} is truncated or damaged ({error}); fetch or make it again"
        ) from error
    if not finite:
        raise CapreseError(f"{WEIGHTS} of {adapter} holds NaN or infinity; fetch or make it again")
    if sha256(weights) != sidecar.weights_sha256:
        raise CapreseError(
            f"{WEIGHTS} of {adapter} was altered after it was saved; fetch it again, or caprese.save it anew"
        )
    method = sidecar.make_method()
    if isinstance(base, str):
        base, _ = load_base(base, dtype=dtype, device=device)
    check_base(base, sidecar.base)
    applied = applied_ffns(base)
    if applied and next(iter(applied.values())).method != method:
        raise CapreseError("another method is applied to this model; caprese.remove(model) first")
    if not applied:
        apply(base, method)
    try:
        model = PeftModel.from_pretrained(base, str(config.parent))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        if not applied:  # the base goes back as it came
            for wrapper in applied_ffns(base).values():
                wrapper.recovery = getattr(wrapper.recovery, "base_layer", wrapper.recovery)
            remove(base)
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CapreseError(f"{CONFIG} of {adapter} is damaged ({first}); fetch or make the adapter again") from error
    unwrap(model).eval()
    return model
