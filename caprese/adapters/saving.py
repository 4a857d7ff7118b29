"""Saving: PEFT's own files, and beside them what was done to which base."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import nn

from caprese import __version__
from caprese.adapters.branch import ADAPTER
from caprese.adapters.fingerprint import fingerprint
from caprese.adapters.lora import digest_of
from caprese.adapters.sidecar import (
    CALIBRATION,
    CONFIG,
    FILES,
    SIDECAR,
    STAND_INS,
    WEIGHTS,
    BaseFacts,
    Sidecar,
    public_id,
)
from caprese.efficient_methods import EfficientFFN, applied_ffns, facts_of, phases_of, stand_in_parameters
from caprese.errors import CapreseError
from caprese.files import check_writable, put_in_place, sha256, write_json, writing
from caprese.models import base_of
from caprese.models.linear import adapter_names


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
    names = adapter_names(at.recovery for at in ffns.values() if hasattr(at.recovery, "adapter_layer_names"))
    if ADAPTER not in names:
        found = f"; the branches here are called {', '.join(map(repr, sorted(names)))}" if names else ""
        raise CapreseError(f"there is no recovery adapter called {ADAPTER!r} on this model to save{found}")
    own = {id(p) for p in stand_in_parameters(model).values()}
    for name, parameter in model.named_parameters():
        if (".lora_" in name or id(parameter) in own) and not torch.isfinite(parameter).all():
            raise CapreseError(f"adapter weight {name} holds NaN or infinity; not saved. Lower the learning rate")
    check_writable(target)
    phases = phases_of(model)
    calibration, stand_ins = calibration_of(ffns), stand_ins_of(model)
    base = base_of(model)
    id_ = public_id(base.model_id)
    for config in model.peft_config.values():
        config.base_model_name_or_path, config.revision = id_, base.revision
    with writing(target):
        for stale in target.glob(".saving-*"):  # a killed run's
            shutil.rmtree(stale, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=target, prefix=".saving-") as name:
            scratch = Path(name)
            # no look at the hub for embedding layers, which a recovery adapter never has
            model.save_pretrained(name, safe_serialization=True, save_embedding_layers=False)
            if calibration:
                save_file(calibration, scratch / CALIBRATION)
            if stand_ins:
                save_file(stand_ins, scratch / STAND_INS)
            facts = Sidecar(
                caprese_version=__version__,
                methods=[facts_of(method) for method in phases.methods],
                reselect_every=phases.reselect_every,
                prefill=phases.prefill,
                base=BaseFacts(
                    name=public_id(base.name), id=id_, revision=base.revision, fingerprint=fingerprint(model)
                ),
                config_sha256=digest_of(json.loads((scratch / CONFIG).read_bytes())),
                weights_sha256=sha256(scratch / WEIGHTS),
                calibration_sha256=sha256(scratch / CALIBRATION) if calibration else None,
                mixers_sha256=sha256(scratch / STAND_INS) if stand_ins else None,
            )
            write_json(scratch / SIDECAR, facts.model_dump(mode="json") | {"digest": facts.make_digest()})
            # only when all are on disk do they take the place of older ones
            for file in FILES:
                if (scratch / file).exists():
                    put_in_place(scratch / file, target / file)


def calibration_of(ffns: Mapping[str, EfficientFFN]) -> dict[str, torch.Tensor]:
    """What `apply` was given."""
    return {
        f"{m.name}.{w.layer}": getattr(w, f"fixed_{m.name}").detach().cpu().contiguous()
        for w in ffns.values()
        for m in w.methods
        if "samples" in m.learns
    }


def stand_ins_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """What was trained in the place of parts of the model, by "layer.name"."""
    return {name: p.detach().cpu().contiguous() for name, p in stand_in_parameters(model).items()}
