"""Configs of known models, so that their speed can be measured and their runs planned without a download."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from caprese.errors import CapreseError


def _shape(
    kind: str, hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, vocab: int, tied: bool, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": kind,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 131072,
        **more,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": _shape("llama", 576, 1536, 30, 9, 3, 49152, True),
    "llama-3.2-1b": _shape("llama", 2048, 8192, 16, 32, 8, 128256, True, head_dim=64),
    "llama-3.2-3b": _shape("llama", 3072, 8192, 28, 24, 8, 128256, True, head_dim=128),
    "llama-3.1-8b": _shape("llama", 4096, 14336, 32, 32, 8, 128256, False, head_dim=128),
    "llama-3.1-70b": _shape("llama", 8192, 28672, 80, 64, 8, 128256, False, head_dim=128),
    "llama-3.1-405b": _shape("llama", 16384, 53248, 126, 128, 8, 128256, False, head_dim=128),
    "gemma-2-2b": _shape("gemma2", 2304, 9216, 26, 8, 4, 256000, True, head_dim=256),
    "gemma-2-9b": _shape("gemma2", 3584, 14336, 42, 16, 8, 256000, True, head_dim=256),
    "qwen2.5-14b": _shape("qwen2", 5120, 13824, 48, 40, 8, 152064, False),
    "deepseek-r1-distill-qwen-1.5b": _shape("qwen2", 1536, 8960, 28, 12, 2, 151936, False),
    "deepseek-r1-distill-qwen-7b": _shape("qwen2", 3584, 18944, 28, 28, 4, 152064, False),
    "deepseek-r1-distill-qwen-14b": _shape("qwen2", 5120, 13824, 48, 40, 8, 152064, False),
}


def shape_config(name: str) -> PretrainedConfig:
    """The config of a known model.

    Raises:
        CapreseError: not known.
    """
    if name not in SHAPES:
        raise CapreseError(f"no known shape {name!r}; known: {', '.join(sorted(SHAPES))}")
    facts = {**SHAPES[name], "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    return CONFIG_MAPPING[facts.pop("model_type")](**facts)


def random_model(
    config: PretrainedConfig, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", seed: int = 0
) -> PreTrainedModel:
    """A model with random weights, made where it will run, at once in its type.

    Raises:
        CapreseError: too little memory on the device.
    """
    try:
        with no_init_weights(), torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except RuntimeError as error:
        raise CapreseError(f"these weights do not fit into the memory of {device} ({error})") from error
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.02, generator=generator)
            else:
                parameter.fill_(0.0 if name.endswith("bias") or config.model_type.startswith("gemma") else 1.0)
    model.tie_weights()
    return model.eval().requires_grad_(False)
