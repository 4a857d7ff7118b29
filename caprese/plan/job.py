"""Parameters, tokens, bytes and time of a run, and what it holds by where the base is."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from caprese.data_gen import OWN
from caprese.distill.sensitivity import ALIGNED, LEVELS
from caprese.efficient_methods import cost, describe_methods, idle_branches
from caprese.errors import CapreseError
from caprese.files import free_bytes, path_of
from caprese.models import SHAPES, find_ffns, load_config, shape_config
from caprese.models.loading import pick_device, pick_dtype
from caprese.plan.memory import Shape, layouts, peaks
from caprese.progress import say
from caprese.recipes import Recipe
from caprese.recovery.stages import check_job

# Assumed mean prompt length: a plan does not load the tokenizer.
_PROMPT_TOKENS = 128
# Assumed of a GPU: an H100's 989 dense bfloat16 TFLOP/s at 40%.
_GPU, _GPU_FLOPS = "H100 at 40% of 989 TFLOP/s", 0.4 * 989e12


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


def config_of(recipe: Recipe) -> PretrainedConfig:
    """The config of a recipe's model; of a known model that the hub does not give now, its shape.

    Raises:
        CapreseError: neither.
    """
    assert recipe.model is not None
    try:
        return load_config(recipe.model, recipe.revision)
    except CapreseError as error:
        if recipe.model not in SHAPES:
            raise
        say((f"{error}; planned with the shape that caprese knows", "yellow"))
        return shape_config(recipe.model)


def plan(
    config: PretrainedConfig, recipe: Recipe, gpus: int | None = None, gpu_memory: int = 80 * 10**9
) -> dict[str, Any]:
    """Parameters, bytes, tokens and a rough time for `recipe`, on this machine and in hours of a GPU.

    Args:
        gpus: plan for so many of them, too, by where the base is.
        gpu_memory: bytes of each.

    Raises:
        CapreseError: what `recover` would refuse about model, method, rank, device or type.
    """
    device = pick_device(recipe.device)
    dtype = pick_dtype(recipe.dtype, device) or torch.bfloat16
    if gpus is not None and recipe.dtype == "auto":  # whatever this machine would take
        dtype = torch.bfloat16
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    sites = find_ffns(model)
    methods, *others = recipe.compositions  # of several, planned as the first
    hidden = sites[0].ffn.hidden_size
    layers = len(check_job(model, methods, recipe.branches, recipe.layerwise, recipe.samples.sources))
    for each in others:
        check_job(model, each, recipe.branches, recipe.layerwise, recipe.samples.sources)
    idle = idle_branches(methods)
    rank = 1 if idle else recipe.rank  # of branches that stay at zero
    reads = cost(model, methods, 0 if rank == "auto" else rank, bias=recipe.bias, reselect_every=recipe.reselect_every)
    if rank == "auto":
        reads = replace(reads, adapter=int(recipe.budget * reads.base))
    if recipe.target_active is not None:
        reads = replace(reads, spared=reads.dense - int(recipe.target_active * reads.dense))
    base, dense, stand_ins, adapter = reads.base, reads.dense, reads.stand_ins, reads.adapter
    s = recipe.samples
    rows = s.train + s.validation + s.test + s.elsewhere
    completion, prompt = rows * s.max_new_tokens, rows * _PROMPT_TOKENS
    own = sum(one.share for one in s.sources if one.source == OWN) * (rows - s.elsewhere)
    drawn = completion + round(own * s.self_tokens)
    rate = 0.5 * _flops_per_second(torch.device(device), dtype)
    forward = 2 * dense  # FLOPs of a token
    adam = 0 if recipe.layerwise.cache_activations else recipe.layerwise.epochs - 1
    passes = {"closed": 1, "sequential": 2, "adam": 1 + adam, "none": 0}[recipe.layerwise.how]
    train = s.train * (s.max_new_tokens + _PROMPT_TOKENS)
    # sequences: one pass for each method that learns, and for auto one for each layer and level, on validation samples
    calibration = min(recipe.calibration_samples, s.train) * sum("samples" in m.learns for m in methods)
    calibration += len(LEVELS) * layers * s.validation if recipe.allocates else 0
    if recipe.alternatives:
        learners = sum(any("samples" in m.learns for m in each) for each in recipe.compositions)
        calibration += learners * min(recipe.calibration_samples, s.train) + (1 + len(others)) * s.validation
    if any(method.undecided for method in methods):  # trained a little, then measured
        calibration += 3 * ALIGNED * recipe.alignment.batch_size + len(sites) * s.validation
    epochs = recipe.end_to_end.epochs * recipe.end_to_end.rounds
    # each stand-in alone, beside the dense pass; then forward and backward of everything
    objectives = [each for method in methods for each in method.objectives(recipe.alignment)]
    alone, whole = (train * sum(o.epochs for o in objectives if o.alone is how) for how in (True, False))
    dense_prompts = recipe.prefill == "dense" and all(method.dense_prompts for method in methods)
    flops = {
        "samples": forward * (prompt + 2.5 * drawn),  # decoding in batches runs below a plain pass's rate
        "alignment": alone * (forward + 6 * stand_ins) + whole * 4 * forward,
        "calibration": forward * calibration * (s.max_new_tokens + _PROMPT_TOKENS),
        "layerwise": 0.0 if idle else forward * train * passes * 1.3,
        "end_to_end": forward * train * (1 + 3.5 * epochs)  # prompts run with the completions
        if not dense_prompts
        else forward * s.train * (2 * s.max_new_tokens + _PROMPT_TOKENS + 3.5 * s.max_new_tokens * epochs),
        "evaluation": forward * s.test * (s.max_new_tokens * (3 + 5 * recipe.evaluation.generate) + 3 * _PROMPT_TOKENS),
    }
    tokens = {
        "samples": drawn,
        "alignment": alone + whole,
        "end_to_end": (s.train * s.max_new_tokens if dense_prompts else train) * epochs,
    }
    seconds = {name: value / rate for name, value in flops.items()}
    size = torch.finfo(dtype).bits // 8
    fits = recipe.layerwise.how == "closed" or rank == "auto"
    # training states of 16 bytes a parameter, and one more while it is written
    states = 2 + len(objectives) + recipe.end_to_end.rounds - 1
    moments = 2 * layers * 2 * hidden * hidden * 8 if fits and not idle else 0
    # hidden states between two layers, in files
    files = 3 if recipe.layerwise.how == "sequential" else int(recipe.residency != "whole")
    between = files * train * hidden * size
    shape, trained = Shape.of(model, config, layers), adapter + stand_ins
    found: dict[str, Any] = {
        "model": recipe.model,
        "method": f"{describe_methods(methods)} on {layers} of {len(sites)} layers"
        + (" (sparsity auto: to be measured)" if recipe.allocates else "")
        + (f" (the first of {len(recipe.alternatives)}: the fastest is to be measured)" if recipe.alternatives else ""),
        "base_parameters": base,
        "adapter_parameters": adapter,
        "adapter_fraction": round(adapter / base, 5),
        "stand_in_parameters": stand_ins,
        "active_parameters_dense": dense,
        "active_parameters_recovered": reads.recovered,
        "byte_floor_ratio": round(reads.recovered / dense, 4),
        "samples": rows,
        "tokens_at_most": tokens,
        "model_bytes": base * size,
        "layerwise_bytes": moments,
        "peak_bytes": peaks(shape, recipe, dtype, trained, recipe.residency),
        "disk_bytes": 4 * (completion + prompt) + moments + 16 * trained * states + between,
        "disk_free_bytes": free_bytes(path_of(recipe.output).absolute()),
        "device": device,
        "estimated_seconds": {name: round(value, 1) for name, value in seconds.items()},
        "estimated_total_seconds": round(sum(seconds.values()), 1),
        "estimated_gpu_hours": float(f"{sum(flops.values()) / _GPU_FLOPS / 3600:.3g}"),
    }
    if gpus is not None:
        hours = {name: float(f"{value / _GPU_FLOPS / gpus / 3600:.3g}") for name, value in flops.items() if value}
        found |= {
            "gpus": gpus,
            "gpu_memory_bytes": gpu_memory,
            "gpu_layouts": layouts(shape, recipe, dtype, trained, gpus, gpu_memory),
            "gpu_hours": {**hours, "kind": _GPU},
        }
    return found
