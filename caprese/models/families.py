"""Where the FFNs of a transformers causal LM are, declared per family in one table.

To add a family: one line in `FAMILIES` with the paths that differ from Llama's, and its name in the test matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from caprese.errors import CapreseError


@dataclass(frozen=True)
class Family:
    """Names of the parts of one model family, as attribute paths.

    `layers` is relative to the causal LM, `ffn` to a decoder layer, the rest to the FFN.
    """

    layers: str = "model.layers"
    ffn: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    act: str = "act_fn"
    norm_after_ffn: bool = False


FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "gemma": Family(),
    "gemma2": Family(norm_after_ffn=True),
    "gemma3_text": Family(norm_after_ffn=True),
    "olmo2": Family(norm_after_ffn=True),
    "smollm3": Family(),
}


@dataclass(frozen=True)
class GatedFFN:
    """A view on a gated FFN module, `down(act(gate(x)) * up(x))`; it owns nothing.

    Shapes: x [..., D], neurons [..., F].
    """

    module: nn.Module
    family: Family

    @property
    def gate(self) -> nn.Linear:
        return getattr(self.module, self.family.gate)

    @property
    def up(self) -> nn.Linear:
        return getattr(self.module, self.family.up)

    @property
    def down(self) -> nn.Linear:
        return getattr(self.module, self.family.down)

    @property
    def hidden_size(self) -> int:
        return self.gate.in_features

    @property
    def width(self) -> int:
        return self.gate.out_features

    def act(self, x: torch.Tensor) -> torch.Tensor:
        return getattr(self.module, self.family.act)(x)

    def neurons(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [..., D] -> (act(gate(x)), act(gate(x)) * up(x)), both [..., F]."""
        a = self.act(self.gate(x))
        return a, a * self.up(x)


@dataclass(frozen=True)
class Site:
    """One FFN in a model: which layer it belongs to, where it hangs, and what it looks like."""

    layer: int
    name: str
    parent: nn.Module
    attribute: str
    ffn: GatedFFN


def family_of(config: PretrainedConfig) -> Family:
    """The family of a model by its config.

    Raises:
        CapreseError: for mixtures of experts, encoder-decoders, encoders and families not in the table.
    """
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise CapreseError(f"{kind!r} is an encoder-decoder; caprese works on decoder-only causal LMs")
    for key in ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"):
        if getattr(config, key, None):
            raise CapreseError(
                f"{kind!r} is a mixture of experts ({key}={getattr(config, key)}), whose routing is already sparse; "
                "caprese works on dense FFNs"
            )
    if kind not in FAMILIES:
        architecture = (getattr(config, "architectures", None) or [""])[0]
        if architecture and "CausalLM" not in architecture and "LMHead" not in architecture:
            raise CapreseError(f"{architecture} ({kind!r}) is not a causal LM; choose a decoder-only model")
        raise CapreseError(f"model family {kind!r} is not supported; supported: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[kind]


def unwrap(model: nn.Module) -> Any:
    """The transformers model inside a PeftModel, or the model itself."""
    base = getattr(model, "get_base_model", None)
    return base() if base is not None else model


def find_ffns(model: nn.Module) -> list[Site]:
    """Every FFN of a causal LM, in layer order.

    Raises:
        CapreseError: for an unsupported model (see `family_of`).
    """
    base = unwrap(model)
    family = family_of(base.config)
    sites = []
    for i, layer in enumerate(base.get_submodule(family.layers)):
        ffn = getattr(layer, family.ffn)
        if not all(isinstance(getattr(ffn, part, None), nn.Module) for part in (family.gate, family.up, family.down)):
            raise CapreseError(
                f"layer {i} of this {base.config.model_type!r} model has no "
                f"{family.gate}/{family.up}/{family.down}; is a transform already applied? caprese.remove(model) first"
            )
        sites.append(Site(i, f"{family.layers}.{i}.{family.ffn}", layer, family.ffn, GatedFFN(ffn, family)))
    return sites


def count_parameters(model: nn.Module) -> int:
    """Parameters of the base model, shared ones counted once, adapters not counted."""
    return sum(p.numel() for n, p in unwrap(model).named_parameters() if ".lora_" not in n)
