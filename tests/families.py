"""A tiny random model of the real class of every supported family."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from caprese.models import FAMILIES

COMMON: dict[str, object] = {
    "vocab_size": 258,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "eos_token_id": None,
    "bos_token_id": None,
    "tie_word_embeddings": False,
}
LLAMA_LIKE: dict[str, object] = {
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
}
OWN: dict[str, dict[str, object]] = {
    "llama": {**LLAMA_LIKE, "mlp_bias": True, "attention_bias": True},
    "mistral": {**LLAMA_LIKE, "sliding_window": 8},
    "qwen2": LLAMA_LIKE,
    "qwen3": LLAMA_LIKE,
    "gemma": LLAMA_LIKE,
    "gemma2": {**LLAMA_LIKE, "query_pre_attn_scalar": 8, "sliding_window": 8},
    "gemma3_text": {**LLAMA_LIKE, "query_pre_attn_scalar": 8, "sliding_window": 8, "sliding_window_pattern": 2},
    "olmo2": LLAMA_LIKE,
    "smollm3": {**LLAMA_LIKE, "no_rope_layer_interval": 2},
    "phi3": LLAMA_LIKE,
    "gpt2": {"n_embd": 32, "n_inner": 96, "n_layer": 2, "n_head": 4, "n_positions": 512},
    "gpt_neox": {k: v for k, v in LLAMA_LIKE.items() if k not in ("num_key_value_heads", "head_dim")},
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 32,
        "max_position_embeddings": 512,
        "init_std": 0.3,
    },
}
assert OWN.keys() == FAMILIES.keys()


def tiny(kind: str, dtype: torch.dtype = torch.float32, seed: int = 3, **more: object) -> PreTrainedModel:
    """Random weights large enough that removing neurons shows; biases too, where the family has them."""
    try:
        CONFIG_MAPPING[kind]()
    except StrictDataclassError:  # OLMo 2 in 5.4
        pytest.skip(f"this transformers cannot make its own configuration of {kind}")
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**{**COMMON, **OWN[kind], **more}))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(0, 0.1)
    return model.to(dtype).eval().requires_grad_(False)


BUILDERS: dict[str, Callable[[], PreTrainedModel]] = {kind: (lambda kind=kind: tiny(kind)) for kind in FAMILIES}
