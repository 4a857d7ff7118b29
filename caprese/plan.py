"""--dry-run: what a run will do and take, without loading a weight."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from caprese.distill.sensitivity import LEVELS
from caprese.distill.sequential import check_sequential
from caprese.efficient_methods import Mamba, Mixer, describe_methods, methods_by_layer, weights_saved
from caprese.errors import CapreseError
from caprese.files import free_bytes
from caprese.models import active_parameters, count_parameters, find_ffns
from caprese.models.attention import read_attention
from caprese.models.loading import pick_device, pick_dtype
from caprese.recipes import Recipe

# Assumed mean prompt length: a plan does not load the tokenizer.
_PROMPT_TOKENS = 128


def _flops_per_second(device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> float:
    """What a matrix product reaches here, measured."""
    a = torch.randn(1024, 1024, device=device).to(dtype)
    done, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        a @ a
        if device.type != "cpu":
            torch.accelerator.synchronize()
        done += 1
    return done * 2 * 1024**3 / (time.perf_counter() - begin)


def plan(config: PretrainedConfig, recipe: Recipe) -> dict[str, Any]:
    """Parameters, bytes and a rough time for `recipe` on this machine.

    Raises:
        CapreseError: what `recover` would refuse about model, method, rank, device or type.
    """
    device = pick_device(recipe.device)
    dtype = pick_dtype(recipe.dtype, device) or torch.bfloat16
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    sites = find_ffns(model)
    hidden = sites[0].ffn.hidden_size
    methods = recipe.make_methods()
    for method in methods:
        method.check()
    if recipe.layerwise.how == "sequential":
        check_sequential(model)
    own = methods_by_layer(methods, len(sites))
    layers = len(own)
    base, dense = count_parameters(model), active_parameters(model)
    efficient = dense - sum(weights_saved(sites[i], each) for i, each in own.items())
    mixers = 0
    for method in methods:
        for i in method.layer_indices(len(sites)) if isinstance(method, Mamba) else []:
            with torch.device("meta"):
                mixer = Mixer(read_attention(sites[i].attention(), config), 1e-6, 0)
            count = sum(p.numel() for p in mixer.parameters())
            mixers, efficient = mixers + count, efficient + count
            efficient -= sum(p.numel() for p in sites[i].attention().parameters())
    if recipe.target_active is not None:
        efficient = int(recipe.target_active * dense)
    if recipe.reselect_every is not None:
        efficient += round(dense / recipe.reselect_every)
    if recipe.rank == "auto":
        adapter = int(recipe.budget * base)
    elif recipe.rank > hidden:
        raise CapreseError(f"rank {recipe.rank} exceeds the hidden size {hidden}; choose 1 to {hidden}, or auto")
    else:
        adapter = layers * (2 * hidden * recipe.rank + (hidden if recipe.bias else 0))
    s = recipe.samples
    rows = s.train + s.validation + s.test
    completion, prompt = rows * s.max_new_tokens, rows * _PROMPT_TOKENS
    rate = 0.5 * _flops_per_second(torch.device(device), dtype)
    forward = 2 * dense / rate
    adam = 0 if recipe.layerwise.cache_activations else recipe.layerwise.epochs - 1
    passes = {"closed": 1, "sequential": 2, "adam": 1 + adam, "none": 0}[recipe.layerwise.how]
    train = s.train * (s.max_new_tokens + _PROMPT_TOKENS)
    # sequences: one pass for each method that learns, and for auto one for each layer and level, on validation samples
    calibration = min(recipe.calibration_samples, s.train) * sum("samples" in m.learns for m in methods)
    calibration += len(LEVELS) * layers * s.validation if recipe.sparsity == "auto" else 0
    seconds = {
        "samples": forward * (prompt + 2.5 * completion),  # decoding in batches runs below a plain pass's rate
        # the dense pass, and forward and backward of the mixers
        "alignment": train * recipe.alignment.epochs * (forward + 6 * mixers / rate) if mixers else 0,
        "calibration": forward * calibration * (s.max_new_tokens + _PROMPT_TOKENS),
        "layerwise": forward * train * passes * 1.3,
        "end_to_end": forward * s.train * (2 * s.max_new_tokens + _PROMPT_TOKENS)
        + forward * s.train * s.max_new_tokens * 3.5 * recipe.end_to_end.epochs,
        "evaluation": forward * s.test * (s.max_new_tokens * (3 + 5 * recipe.evaluation.generate) + 3 * _PROMPT_TOKENS),
    }
    size = torch.finfo(dtype).bits // 8
    moments = 2 * layers * 2 * hidden * hidden * 8
    return {
        "model": recipe.model,
        "method": f"{describe_methods(methods)} on {layers} of {len(sites)} layers"
        + (" (sparsity auto: to be measured)" if recipe.sparsity == "auto" else ""),
        "base_parameters": base,
        "adapter_parameters": adapter,
        "adapter_fraction": round(adapter / base, 5),
        "mixer_parameters": mixers,
        "active_parameters_dense": dense,
        "active_parameters_recovered": efficient + adapter,
        "byte_floor_ratio": round((efficient + adapter) / dense, 4),
        "samples": rows,
        "completion_tokens_at_most": completion,
        "model_bytes": base * size,
        "layerwise_bytes": moments + (2 * train * hidden * size if recipe.layerwise.how == "sequential" else 0),
        "disk_bytes": 4 * (completion + prompt) + moments + 16 * adapter,
        "disk_free_bytes": free_bytes(_output(recipe)),
        "device": device,
        "estimated_seconds": {name: round(value, 1) for name, value in seconds.items()},
        "estimated_total_seconds": round(sum(seconds.values()), 1),
    }


def _output(recipe: Recipe) -> Any:
    from pathlib import Path

    return Path(recipe.output).expanduser().absolute()
