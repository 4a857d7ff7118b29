"""PEFT's configuration of a recovery adapter: as it is made, and what of it decides a result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from peft import LoraConfig

# PEFT writes them anew wherever it saves, and no result depends on them
_SILENT = frozenset({"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"})


def lora_config(branches: Mapping[str, int], bias: bool = False) -> LoraConfig:
    """What makes branches x L R of these ranks, unscaled.

    Args:
        branches: rank by the name of the slot, in the base model.
        bias: with a vector [D] each.
    """
    top = max(branches.values())
    pattern = {name: rank for name, rank in branches.items() if rank != top}
    return LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=["recovery"],
        r=top,
        lora_alpha=top,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        lora_bias=bias,
    )


def deciding(config: LoraConfig | Mapping[str, Any]) -> dict[str, Any]:
    """What of a configuration changes a result: all that this PEFT reads (the rest it ignores) and that is not as its
    defaults; so releases of PEFT that know more or fewer settings agree."""
    defaults = _plain(LoraConfig().to_dict())
    given = _plain(config.to_dict() if isinstance(config, LoraConfig) else config)
    names = sorted(defaults.keys() & given.keys() - _SILENT)
    return {name: given[name] for name in names if _same(given[name]) != _same(defaults[name])}


def digest_of(config: Mapping[str, Any]) -> str:
    """Of what decides a result in a configuration."""
    return hashlib.sha256(json.dumps(deciding(config), sort_keys=True).encode()).hexdigest()


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON has it; PEFT keeps names of modules as a set."""
    found: dict[str, Any] = json.loads(json.dumps(config, default=sorted))
    return {k: sorted(v) if isinstance(v, list) and all(isinstance(e, str) for e in v) else v for k, v in found.items()}


def _same(value: Any) -> Any:
    """Nothing, however it is written; 0 is a number of a layer."""
    return None if value is False or value in ("", [], {}) else value
