"""Aligning mixers with the attentions they replace, before they are trained by what the whole model says.

First every layer alone, all in parallel: each mixer sees what its attention saw in the dense model and is to give what
it gave, and to mix tokens as it did if asked (the second and first stage of MOHAWK, arXiv 2408.10189, section 4, on
mixers instead of blocks). No gradient goes from layer to layer. Then, if asked, the model on its own inputs: hidden
states after every layer are to be the dense model's (Zebra-HyLo, arXiv 2604.24715).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn

from caprese.distill.batches import Batch, positions_of
from caprese.distill.checkpoints import Checkpoints, shared
from caprese.distill.descend import Descent, descend
from caprese.efficient_methods import dense, observing_mixers, phases, replacements
from caprese.errors import CapreseError
from caprese.models import device_of, unwrap

#: by layer, what a replaced attention saw and gave in the dense model, [B, T, D], and its probabilities [B, H, T, T]
Seen = dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]


class Alignment(Descent):
    """Stage 2, where attentions are replaced: mixers learn what attention gave."""

    epochs: Annotated[int, Field(ge=0)] = 1
    """Passes over the samples with every mixer alone, on what its attention saw; 0 skips this part."""
    hidden_epochs: Annotated[int, Field(ge=0)] = 0
    """Passes after those with all mixers in place, learning the dense model's hidden states after every layer."""
    matrices: Annotated[float, Field(ge=0)] = 0.0
    """With every mixer alone: the weight, beside what it gives, of how it mixes tokens; takes memory by the square of
    the text's length."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """Peak of a linear schedule with 2% warm-up."""


def _whole(model: nn.Module, batch: Batch, **more: Any) -> tuple[Any, torch.Tensor]:
    """One pass over prompts and completions, all FFNs dense, and which tokens are real."""
    mask = torch.cat([batch.prompt_mask, batch.mask], 1)
    with phases(model, mask.sum(-1)):  # as if all were prompt: what FFN sparsity takes, branches give back later
        out = unwrap(model).get_decoder()(
            input_ids=torch.cat([batch.prompt, batch.inputs], 1),
            attention_mask=mask.long(),
            position_ids=positions_of(mask),
            use_cache=False,
            **more,
        )
    return out, mask


@torch.no_grad()
def teacher_mixing(model: nn.Module, batch: Batch, matrices: bool = False) -> tuple[Seen, torch.Tensor]:
    """What each replaced attention saw and gave in the dense model, and which tokens are real [B, T]."""
    seen: Seen = {}
    base = unwrap(model)
    how = base.config._attn_implementation
    try:
        if matrices:  # other implementations do not say their probabilities
            base.set_attn_implementation("eager")
        with observing_mixers(model, lambda at, *facts: seen.__setitem__(at.layer, facts)), dense(model):
            _, mask = _whole(model, batch)
    finally:
        if matrices:
            base.set_attn_implementation(how)
    return seen, mask


@torch.no_grad()
def match_scale(model: nn.Module, batch: Batch) -> None:
    """Scale every mixer's output to its attention's size: norm weights times ||attention(x)|| / ||mixer(x)||.

    A mixer norms what it gives where attention averages, so that with attention's out projection it starts too large.
    The bias of that projection is not the norm's; and where either gives nothing, there is nothing to match.
    """
    seen, mask = teacher_mixing(model, batch)
    for at in replacements(model):
        x, out, _ = seen[at.layer]
        bias = at.mixer.out_proj.bias
        wanted, given = ((t[mask].float() - bias).norm() for t in (out, at.mixer(x, mask)))
        if wanted and given:
            at.mixer.norm.get_parameter("weight").mul_(wanted / given)


def alignment(model: nn.Module, batch: Batch, matrices: float = 0.0) -> torch.Tensor:
    """||mixer(x) - attention(x)||^2 / ||attention(x)||^2 over the real tokens of a batch, by layer [layers].

    Args:
        matrices: how much is added of the same error of the mixing matrices, by Frobenius norm.

    Raises:
        CapreseError: an attention that does not give its probabilities, which `matrices` needs.
    """
    seen, mask = teacher_mixing(model, batch, matrices > 0)
    errors = []
    for at in replacements(model):
        x, out, probabilities = seen[at.layer]
        error = _relative(at.mixer(x, mask)[mask], out[mask])
        if matrices:
            if probabilities is None:
                raise CapreseError(
                    f"{type(at.attention).__name__} does not give its probabilities; set alignment.matrices to 0"
                )
            rows = mask[:, None, :, None]
            error = error + matrices * _relative(at.mixer.matrix(x, mask) * rows, probabilities * rows)
        errors.append(error)
    return torch.stack(errors)


def hidden_alignment(model: nn.Module, batch: Batch) -> torch.Tensor:
    """||h - dense h||^2 / ||dense h||^2 of the hidden states after each layer, over real tokens, [layers]."""
    with torch.no_grad(), dense(model):
        wanted = _whole(model, batch, output_hidden_states=True)[0].hidden_states[1:]
    out, mask = _whole(model, batch, output_hidden_states=True)
    return torch.stack([_relative(h[mask], w[mask]) for h, w in zip(out.hidden_states[1:], wanted, strict=True)])


def _relative(given: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    wanted = wanted.float()
    size = wanted.float().square().sum()
    return (given.float() - wanted).square().sum() / torch.where(size > 0, size, 1)  # an attention may give nothing


def align(
    model: nn.Module,
    measure: Callable[[nn.Module, Batch], torch.Tensor],
    batches: Sequence[Batch],
    validation: Sequence[Batch],
    config: Descent,
    run: Checkpoints | None = None,
    name: str = "alignment",
) -> tuple[float, float, list[dict[str, float]]]:
    """Train the mixers of `model` in place by `measure`, such as `alignment`; see `descend`.

    Returns: the mean error on `validation` before and after, and the training curve.
    """
    held_out = [batch.to(device_of(model)) for batch in validation]

    @torch.no_grad()
    def check() -> float:
        tokens = sum(batch.tokens for batch in held_out)
        return sum(float(measure(model, batch).mean()) * batch.tokens for batch in held_out) / max(1, tokens)

    def loss(index: int) -> torch.Tensor:
        batch = batches[index].to(device_of(model))
        return measure(model, batch).mean() * batch.tokens

    before = shared(check())
    after, curve, _ = descend(model, batches, loss, check, config, before, run, name)
    return before, after, curve
