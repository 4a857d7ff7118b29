"""A model in which something was trained in attention's place, as transformers' GraniteMoeHybrid without experts.

That is a Llama but for what stands in for attention, which says itself how it lies there. Its FFN has no biases, and so
no place for a branch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from transformers import GraniteMoeHybridConfig, PretrainedConfig

from caprese.efficient_methods import Method, StandIn
from caprese.errors import CapreseError

#: families whose attention, norms and FFN it has
FAMILIES = ("llama", "mistral", "qwen2")


def check(config: PretrainedConfig, methods: Sequence[Method], branch: bool) -> None:
    """Whether a model of this config, with what `methods` train, fits in.

    Raises:
        CapreseError: with the reason.
    """
    if config.model_type not in FAMILIES or getattr(config, "mlp_bias", False):
        raise CapreseError(
            f"transformers' GraniteMoeHybrid, which holds hybrids, has no place for what {config.model_type!r} has "
            f"beside Llama; {', '.join(FAMILIES)} without FFN biases fit"
        )
    if branch:
        hybrid = "+".join(method.name for method in methods if method.trains)
        raise CapreseError(
            "the FFN of transformers' GraniteMoeHybrid, which holds hybrids, has no biases and so no place for a "
            f"recovery branch; a hybrid by `method={hybrid}` alone, or with static but without an adapter, is exported"
        )


def make_config(config: PretrainedConfig, width: int, stand_ins: Mapping[int, StandIn]) -> GraniteMoeHybridConfig:
    """The config of the checkpoint, with FFNs of `width` neurons.

    Raises:
        CapreseError: no attention is left, or stand-ins have a size that it does not.
    """
    facts = config.to_dict()
    count = facts["num_hidden_layers"]
    if len(stand_ins) == count:
        raise CapreseError(
            "transformers' GraniteMoeHybrid does not generate without an attention layer; keep one (keep_attention)"
        )
    known = {key: facts[key] for key in GraniteMoeHybridConfig().to_dict() if key in facts and key != "model_type"}
    head_dim = facts.get("head_dim") or facts["hidden_size"] // facts["num_attention_heads"]
    own = {
        "head_dim": head_dim,
        "attention_multiplier": head_dim**-0.5,
        "attention_bias": bool(facts.get("attention_bias")) or facts["model_type"] == "qwen2",
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "shared_intermediate_size": width,
        "position_embedding_type": "rope",
        "layer_types": ["linear_attention" if i in stand_ins else "full_attention" for i in range(count)],
        **next(iter(stand_ins.values())).checkpoint_settings(config),
    }
    return GraniteMoeHybridConfig(**{**known, **own})


def name_ffn(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A Llama's FFN weights under their names in a GraniteMoeHybrid's layer."""
    gate, up, down = (weights[f"{part}_proj.weight"] for part in ("gate", "up", "down"))
    return {"shared_mlp.input_linear.weight": torch.cat([gate, up]), "shared_mlp.output_linear.weight": down}
