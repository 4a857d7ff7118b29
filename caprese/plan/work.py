"""Tokens and floating-point operations of a recovery, by stage, and how fast they are done."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from caprese.data_gen import OWN
from caprese.distill.sensitivity import ALIGNED, LEVELS
from caprese.efficient_methods import idle_branches
from caprese.errors import CapreseError
from caprese.recipes import Recipe

# Assumed mean prompt length: a plan does not load the tokenizer.
PROMPT_TOKENS = 128
#: the rate that is assumed of a GPU, in words and in FLOP/s
GPU, GPU_FLOPS = "H100 at 40% of 989 TFLOP/s", 0.4 * 989e12


class Work(NamedTuple):
    """What a recovery passes through the model."""

    flops: dict[str, float]
    """By stage."""
    tokens: dict[str, int]
    """At most, of the stages that users set."""
    train: int
    """Tokens of the training samples, with their prompts."""
    drawn: int
    """Tokens that the teacher writes."""


def count_work(recipe: Recipe, dense: int, stand_ins: int, layers: int) -> Work:
    """Counted from the recipe.

    Args:
        dense: parameters that a token reads of the dense model.
        stand_ins: parameters that are put in the place of others.
        layers: that the method acts on.
    """
    methods, *others = recipe.compositions  # of several, planned as the first
    s, last = recipe.samples, recipe.end_to_end
    rows = s.train + s.validation + s.test + s.elsewhere
    own = sum(one.share for one in s.sources if one.source == OWN) * (rows - s.elsewhere)
    drawn = rows * s.max_new_tokens + round(own * s.self_tokens)
    forward = 2 * dense  # FLOPs of a token
    adam = 0 if recipe.layerwise.cache_activations else recipe.layerwise.epochs - 1
    passes = {"closed": 1, "sequential": 2, "adam": 1 + adam, "none": 0}[recipe.layerwise.how]
    length = s.max_new_tokens + PROMPT_TOKENS
    train = s.train * length
    # sequences: one pass for each method that learns, and for auto one for each layer and level, on validation samples
    calibration = min(recipe.calibration_samples, s.train) * sum("samples" in m.learns for m in methods)
    calibration += len(LEVELS) * layers * s.validation if recipe.allocates else 0
    if recipe.alternatives:
        learners = sum(any("samples" in m.learns for m in each) for each in recipe.compositions)
        calibration += learners * min(recipe.calibration_samples, s.train) + (1 + len(others)) * s.validation
    if any(method.undecided for method in methods):  # trained a little, then measured
        calibration += 3 * ALIGNED * recipe.alignment.batch_size + layers * s.validation
    epochs = last.epochs * last.rounds
    # each stand-in alone, beside the dense pass; then forward and backward of everything
    objectives = [each for method in methods for each in method.objectives(recipe.alignment)]
    alone, whole = (train * sum(o.epochs for o in objectives if o.alone is how) for how in (True, False))
    dense_prompts = recipe.dense_prompts
    flops = {
        "samples": forward * (rows * PROMPT_TOKENS + 2.5 * drawn),  # decoding is slower than a plain pass
        "alignment": alone * (forward + 6 * stand_ins) + whole * 4 * forward,
        "calibration": forward * calibration * length,
        "layerwise": 0.0 if idle_branches(methods) else forward * train * passes * 1.3,
        "end_to_end": 0.0
        if not epochs
        else forward * train * (1 + 3.5 * epochs)  # prompts run with the completions
        if not dense_prompts
        else forward * s.train * (2 * s.max_new_tokens + PROMPT_TOKENS + 3.5 * s.max_new_tokens * epochs),
        "evaluation": forward * s.test * (s.max_new_tokens * (3 + 5 * recipe.evaluation.generate) + 3 * PROMPT_TOKENS),
    }
    tokens = {
        "samples": drawn,
        "alignment": alone + whole,
        "end_to_end": (s.train * s.max_new_tokens if dense_prompts else train) * epochs,
    }
    return Work({stage: float(count) for stage, count in flops.items()}, tokens, train, drawn)


def measure_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> float:
    """FLOP/s of a recovery's stages here: half of what a matrix product reaches, measured."""
    a = torch.randn(1024, 1024, device=device).to(dtype)
    done, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        a @ a
        if device.type != "cpu":
            torch.accelerator.synchronize()
        done += 1
    return done * 1024**3 / (time.perf_counter() - begin)


def rates_of(report: Mapping[str, Any]) -> dict[str, float]:
    """FLOP/s that a finished run reached, by stage, of those that its recipe counts.

    Raises:
        CapreseError: it does not say so, such as one of another version.
    """
    try:
        counts = report["parameters"]
        recipe = Recipe.model_validate(report["recipe"])
        flops = count_work(recipe, counts["active_dense"], counts["mixers"], len(report["layers"])).flops
        seconds = {stage["name"]: float(stage["seconds"]) for stage in report["stages"]}
        rates = {name: count / seconds[name] for name, count in flops.items() if count and seconds.get(name)}
        if not all(math.isfinite(rate) and rate > 0 for rate in rates.values()):
            raise ValueError("seconds that are none")
    except (CapreseError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        said = str(error).splitlines()[0]
        raise CapreseError(
            f"the report of the run given to --like does not say how long which stage took ({said}); give a run of "
            "this version"
        ) from error
    return rates
