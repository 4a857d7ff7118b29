"""Parameters, tokens, bytes and time of a run, and what it holds by where the base is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from caprese.efficient_methods import cost, describe_methods, idle_branches
from caprese.errors import CapreseError
from caprese.files import free_bytes, path_of
from caprese.models import SHAPES, find_ffns, load_config, shape_config
from caprese.models.loading import pick_device, pick_dtype
from caprese.plan.memory import Shape, layouts, peaks
from caprese.plan.work import GPU, GPU_FLOPS, PROMPT_TOKENS, count_work, measure_rate, rates_of
from caprese.progress import say
from caprese.recipes import Recipe
from caprese.recovery.stages import check_job, check_residency


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
    config: PretrainedConfig,
    recipe: Recipe,
    gpus: int | None = None,
    gpu_memory: int = 80 * 10**9,
    like: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Parameters, bytes, tokens and a rough time for `recipe`, on this machine and in hours of a GPU.

    Args:
        gpus: plan for so many of them, too, by where the base is.
        gpu_memory: bytes of each.
        like: the report of a run in one process, whose time by stage is taken for the hours, here and on GPUs; without
            it a product of matrices is timed here, and a constant is taken for GPUs.

    Raises:
        CapreseError: what `recover` would refuse about model, method, rank, device or type.
    """
    device = pick_device(recipe.device)
    dtype = pick_dtype(recipe.dtype, device) or torch.bfloat16
    if gpus is not None and recipe.dtype == "auto":  # whatever this machine would take
        dtype = torch.bfloat16
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise CapreseError(
            f"the config of {recipe.model} makes no causal LM ({error!r}); get the model again"
        ) from error
    if not config.get_text_config().num_hidden_layers:
        raise CapreseError(f"the config of {recipe.model} has no layers; get the model again")
    check_residency(recipe.residency, recipe)
    sites = find_ffns(model)
    methods, *others = recipe.compositions  # of several, planned as the first
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
    work = count_work(recipe, reads.dense, reads.stand_ins, layers)
    flops = {stage: count for stage, count in work.flops.items() if count}
    s, hidden = recipe.samples, sites[0].ffn.hidden_size
    rows = s.train + s.validation + s.test + s.elsewhere
    size = torch.finfo(dtype).bits // 8
    fits = recipe.layerwise.how == "closed" or rank == "auto"
    # training states of 16 bytes a parameter, and one more while it is written
    states = 1 + sum(len(method.objectives(recipe.alignment)) for method in methods) + recipe.end_to_end.rounds
    moments = 2 * layers * 2 * hidden * hidden * 8 if fits and not idle else 0
    # hidden states between two layers, in files
    files = 3 if recipe.layerwise.how == "sequential" else int(recipe.residency != "whole")
    shape, trained = Shape.of(model, config, layers), reads.adapter + reads.stand_ins
    ids = 4 * rows * (s.max_new_tokens + PROMPT_TOKENS)
    known = {} if like is None else rates_of(like)
    other = GPU_FLOPS if flops.keys() <= known.keys() else measure_rate(torch.device(device), dtype)
    here, on_gpus = (
        {stage: count / known.get(stage, rate) for stage, count in flops.items()} for rate in (other, GPU_FLOPS)
    )
    found: dict[str, Any] = {
        "model": recipe.model,
        "method": f"{describe_methods(methods)} on {layers} of {len(sites)} layers"
        + (" (sparsity auto: to be measured)" if recipe.allocates else "")
        + (f" (the first of {len(recipe.alternatives)}: the fastest is to be measured)" if recipe.alternatives else ""),
        "base_parameters": reads.base,
        "adapter_parameters": reads.adapter,
        "adapter_fraction": round(reads.adapter / reads.base, 5),
        "stand_in_parameters": reads.stand_ins,
        "active_parameters_dense": reads.dense,
        "active_parameters_recovered": reads.recovered,
        "byte_floor_ratio": round(reads.recovered / reads.dense, 4),
        "samples": rows,
        "tokens_at_most": work.tokens,
        "flops": {stage: _short(count) for stage, count in flops.items()},
        "model_bytes": reads.base * size,
        "layerwise_bytes": moments,
        "peak_bytes": peaks(shape, recipe, dtype, trained, recipe.residency),
        "disk_bytes": ids + moments + 16 * trained * states + files * work.train * hidden * size,
        "disk_free_bytes": free_bytes(path_of(recipe.output).absolute()),
        "device": device,
        "estimated_seconds": {stage: round(value, 1) for stage, value in here.items()},
        "estimated_total_seconds": round(sum(here.values()), 1),
        "estimated_gpu_hours": _short(sum(on_gpus.values()) / 3600),
    }
    if gpus is not None:
        hours = {stage: _short(value / gpus / 3600) for stage, value in on_gpus.items()}
        found |= {
            "gpus": gpus,
            "gpu_memory_bytes": gpu_memory,
            "gpu_layouts": layouts(shape, recipe, dtype, trained, gpus, gpu_memory),
            "gpu_hours": {**hours, "kind": "; ".join(_kinds(flops, known, like))},
        }
    return found


def _kinds(flops: Iterable[str], known: Mapping[str, float], like: Mapping[str, Any] | None) -> Iterator[str]:
    """On what the hours are, in words."""
    assumed = [stage for stage in flops if stage not in known]
    if like is not None and known:
        yield str(like.get("environment", {}).get("device", "unknown"))
    if assumed:
        yield f"{', '.join(assumed)} assumed on {GPU}" if known else GPU


def _short(value: float) -> float:
    return float(f"{value:.3g}")
