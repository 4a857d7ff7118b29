"""Where the FFNs and attentions of a transformers causal LM are, declared per family in one table.

To add a family: one entry in `FAMILIES` with the names that differ from Llama's, and a tiny config of it in
tests/families.py, which puts it through the whole test matrix (docs/methods.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from caprese.errors import CapreseError
from caprese.models.family import Family
from caprese.models.ffn import FFN, Passed, Spread

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
    "phi3": Family(
        gate="gate_up_proj",
        up="gate_up_proj",
        act="activation_fn",
        attention=("self_attn.qkv_proj", "self_attn.o_proj"),
    ),
    "gpt2": Family(
        layers="transformer.h",
        gate="",
        up="c_fc",
        down="c_proj",
        act="act",
        attention=("attn.c_attn", "attn.c_proj"),
        width="n_inner",
    ),
    "gpt_neox": Family(
        layers="gpt_neox.layers",
        gate="",
        up="dense_h_to_4h",
        down="dense_4h_to_h",
        act="act",
        attention=("attention.query_key_value", "attention.dense"),
    ),
    "opt": Family(
        layers="model.decoder.layers",
        ffn="",
        gate="",
        up="fc1",
        down="fc2",
        act="activation_fn",
        attention=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"),
        width="ffn_dim",
        norm_after_ffn=True,  # in the 350m alone, but one family has one answer
    ),
}


@dataclass(frozen=True)
class Site:
    """One FFN in a model: its layer, the decoder layer module, and what it looks like."""

    index: int
    layer: nn.Module
    ffn: FFN
    family: Family

    @property
    def entry(self) -> str:
        """The attribute of the decoder layer that is called with x."""
        return self.family.ffn or self.family.up

    @property
    def attention_name(self) -> str:
        """The attribute of the decoder layer that holds its attention."""
        return self.family.attention[0].split(".")[0]

    def attention(self) -> nn.Module:
        found: nn.Module = getattr(self.layer, self.attention_name)
        return found

    def attention_linears(self) -> list[nn.Module]:
        """The attention's linear layers, the output projection last."""
        return [self.layer.get_submodule(path) for path in self.family.attention]

    def path(self, part: str) -> str:
        """The name in its decoder layer of the FFN's gate, up or down."""
        return ".".join(name for name in (self.family.ffn, getattr(self.family, part)) if name)

    def gather(self) -> None:
        """Where an FFN's parts sit on the decoder layer itself, have the layer call them as one; else nothing."""
        if not self.family.ffn:
            setattr(self.layer, self.family.up, self.ffn.module)
            for name in (self.family.act, self.family.down):
                setattr(self.layer, name, Passed())

    def scatter(self) -> None:
        """Undo `gather`."""
        if not self.family.ffn:
            for name in self.ffn.module.names:
                setattr(self.layer, name, getattr(self.ffn.module, name))


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


def device_of(model: nn.Module) -> torch.device:
    """Where a model's inputs go."""
    return unwrap(model).get_input_embeddings().weight.device


def find_ffns(model: nn.Module) -> list[Site]:
    """Every FFN of a causal LM, in layer order.

    Raises:
        CapreseError: for an unsupported model (see `family_of`).
    """
    base = unwrap(model)
    family = family_of(base.config)
    names = [name for name in (family.gate, family.up, family.down) if name]
    sites = []
    for i, layer in enumerate(base.get_submodule(family.layers)):
        owner: Any = getattr(layer, family.ffn or family.up, None)
        if not family.ffn and not isinstance(owner, Spread):
            owner = layer
        if not all(hasattr(owner, name) for name in names):
            raise CapreseError(
                f"layer {i} of this {base.config.model_type!r} model has no {'/'.join(dict.fromkeys(names))}, so it is "
                "not as transformers builds it; load it anew"
            )
        sites.append(Site(i, layer, FFN(Spread(layer, family) if owner is layer else owner, family), family))
    return sites
