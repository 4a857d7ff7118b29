"""The most bytes that each stage of a recovery holds on one device, counted from shapes.

What is counted: the base where its `residency` leaves it, a stage's sums, caches and what is trained, and the largest
of what a pass holds for a moment. Not counted: what a process holds before it loads a model (libraries, a CUDA
context), and what an allocator loses between tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from caprese.distill.losses import CHUNK
from caprese.efficient_methods import Method, Sparse, idle_branches
from caprese.errors import CapreseError
from caprese.models import find_ffns
from caprese.models.families import family_of
from caprese.models.residency import Residency
from caprese.recipes import Recipe
from caprese.recovery.stages import check_residency

LAYOUTS: tuple[Residency, ...] = ("whole", "sharded", "streamed")
#: what evaluation remembers of the dense model's answers
_REMEMBERED = 2e9
# Of a GPU's memory, what tensors may take: the rest is a CUDA context, libraries, and what the allocator loses.
_USABLE = 0.9
# Tensors of [tokens, V], counted in float32, that one chunk of a divergence holds at once: both logits, both of their
# log-softmaxes, probabilities, what is between them, and gradients or, in evaluation, sums in float64.
_LOGITS = 16
# Matrices of D x D in float64 that one layer's solution holds at once beside its sums: the eigenvectors, the rotated
# right side, and for a ridge the half, its gram, directions and what `eigh` works in.
_SOLVE = 8


@dataclass(frozen=True)
class Shape:
    """What memory depends on."""

    rest: int
    """Parameters outside the decoder layers."""
    layer: int
    """Of the largest decoder layer."""
    layers: int
    applied: int
    """Layers with a branch."""
    hidden: int
    ffn: int
    attention: int
    """Width of the queries of a layer: heads x head size."""
    keys: int
    """Width of keys and values of a layer together."""
    vocabulary: int

    @staticmethod
    def of(model: nn.Module, config: PretrainedConfig, applied: int) -> Shape:
        """Of a model, which may be on the meta device."""
        text = config.get_text_config()
        layers: Any = model.get_submodule(family_of(config).layers)
        sizes = [sum(p.numel() for p in layer.parameters()) for layer in layers]
        ffn = find_ffns(model)[0].ffn
        heads = text.num_attention_heads
        size = getattr(text, "head_dim", None) or text.hidden_size // heads
        return Shape(
            rest=sum(p.numel() for p in model.parameters()) - sum(sizes),
            layer=max(sizes),
            layers=len(sizes),
            applied=applied,
            hidden=ffn.hidden_size,
            ffn=ffn.width,
            attention=heads * size,
            keys=2 * (getattr(text, "num_key_value_heads", None) or heads) * size,
            vocabulary=text.vocab_size,
        )


def peaks(
    shape: Shape,
    recipe: Recipe,
    dtype: torch.dtype,
    trained: int,
    layout: str = "whole",
    processes: int = 1,
    prompt: int = 128,
) -> dict[str, int]:
    """Bytes by stage, on each of `processes` devices.

    Args:
        dtype: of the base.
        trained: parameters of branches and stand-ins.
        prompt: tokens of a prompt with its template.
    """
    size = torch.finfo(dtype).bits // 8
    s, fit, last = recipe.samples, recipe.layerwise, recipe.end_to_end
    new, whole = s.max_new_tokens, prompt + s.max_new_tokens
    d, f, kv = shape.hidden, shape.ffn, shape.keys * size
    methods = recipe.compositions[0]  # of several, planned as the first
    dense_prompts = recipe.dense_prompts

    base = size * (shape.rest + shape.layers * shape.layer)
    if layout == "sharded":  # its own part, and one layer that is gathered while the next one comes
        base = size * (shape.rest + shape.layers * shape.layer // processes + 2 * shape.layer)
    elif layout == "streamed":
        base = size * (shape.rest + shape.layer)

    def passing(tokens: int) -> int:
        """One layer's tensors for so many tokens, without a way back: around its attention or its FFN."""
        return tokens * max(size * (3 * d + 3 * f), size * (2 * d + 2 * shape.attention) + 2 * kv + 8 * d)

    def remembered(samples: int, limit: float) -> float:
        """A prompt's keys and values, and the final states that the dense model gives."""
        each = size * d * (new if dense_prompts else whole) + (prompt * kv * shape.layers if dense_prompts else 0)
        return min(samples * each, limit)

    drawing = min(s.batch_size, s.train)
    room = 64 + whole + prompt // 4  # a cache grows by a quarter of what it holds
    samples = drawing * (room * kv * shape.layers) + max(passing(drawing * prompt), drawing * shape.vocabulary * 4 * 4)

    tokens = fit.batch_size * whole
    # what every layer and its FFN are called with, and one layer's neurons and their squares
    calibration = 2 * size * d * tokens * shape.applied + max(passing(tokens), (4 * size + 4) * f * tokens)

    caches = remembered(s.train, last.cache_gigabytes * 1e9 * (layout == "whole"))
    caches += remembered(s.validation, last.cache_gigabytes * 1e9)
    # x, E and their copies, and the neurons of both FFNs
    observed = 4 * (4 * d + 3 * f) * fit.batch_size * (new if dense_prompts else whole)
    batch = fit.batch_size * prompt * kv * shape.layers if dense_prompts else 0
    sums = 2 * 2 * d * d * 8
    held = sums * (shape.applied if layout == "whole" else 1)
    if layout == "whole" and processes > 1:  # each process adds to its own, then all to the others'
        held *= 2
    if recipe.rank == "auto":
        held += shape.applied * 2 * d * d * 8
    closed = fit.how == "closed" or recipe.rank == "auto"
    layerwise = caches + max(batch + passing(tokens) + observed + 12 * d * d, closed * _SOLVE * 8 * d * d)
    layerwise += held if closed and not idle_branches(methods) else 0

    # for the way back: what norms, attention and the FFN read, of every layer
    counted = last.micro_batch * (new if dense_prompts else whole)
    each = counted * (8 * d + size * (2 * d + 2 * shape.attention)) + last.micro_batch * whole * kv
    saved = shape.layers * each
    saved += counted * size * 4 * _neurons(shape, methods)
    logits = CHUNK * shape.vocabulary * 4 * _LOGITS
    states = trained * (4 + 4 + 8 + 4 + 4)  # weights, gradients, AdamW's, the best ones, a copy being written
    end_to_end = caches + states + saved + max(logits, passing(counted))

    measured = remembered(s.test + s.elsewhere, _REMEMBERED)
    asked = recipe.evaluation.batch_size
    evaluation = measured + 4 * trained + max(logits, passing(asked * whole))
    found = {"samples": samples, "calibration": calibration, "layerwise": layerwise, "end_to_end": end_to_end}
    found["evaluation"] = evaluation
    if not any("samples" in method.learns for method in methods):
        del found["calibration"]
    if fit.how == "none":
        del found["layerwise"]
    if not last.epochs:
        del found["end_to_end"]
    return {name: int(base + value) for name, value in found.items()}


def _neurons(shape: Shape, methods: Sequence[Method]) -> int:
    """Of all layers together, that methods leave which make FFNs narrower."""
    left = [float(shape.ffn)] * shape.layers
    for method in methods:
        if "width" in method.acts_on:
            for i, own in method.by_layer(shape.layers).items():
                left[i] *= 1 - own.level if isinstance(own, Sparse) else 1
    return int(sum(left))


def layouts(
    shape: Shape, recipe: Recipe, dtype: torch.dtype, trained: int, gpus: int, gpu_memory: int
) -> dict[str, dict[str, Any]]:
    """For each place of the base {"bytes" by stage, "fits", and "why_not"}; see `peaks`.

    What runs only layer by layer is planned without its last stage.
    """
    may = gpu_memory * _USABLE
    found: dict[str, dict[str, Any]] = {}
    for layout in LAYOUTS:
        if layout == "sharded" and gpus == 1:
            continue
        each = recipe
        if layout == "streamed":
            each = recipe.model_copy(update={"end_to_end": recipe.end_to_end.model_copy(update={"epochs": 0})})
        try:
            check_residency(layout, each)
        except CapreseError as error:
            found[layout] = {"bytes": {}, "fits": False, "why_not": str(error)}
            continue
        held = peaks(shape, each, dtype, trained, layout, gpus)
        over = {stage: size for stage, size in held.items() if size > may}
        found[layout] = {"bytes": held, "fits": not over}
        if over:
            most = max(over, key=lambda stage: over[stage])
            found[layout]["why_not"] = f"{most} holds {over[most] / 1e9:.1f} GB, of {may / 1e9:.1f} GB that are usable"
    return found
