"""Aligning mixers with the attentions they replace, before they are trained by what the whole model says.

First every layer alone, all in parallel: each mixer sees what its attention saw in the dense model and is to give what
it gave, and to mix tokens as it did if asked (the second and first stage of MOHAWK, arXiv 2408.10189, section 4, on
mixers instead of blocks). No gradient goes from layer to layer. Then, if asked, the model on its own inputs: hidden
states after every layer are to be the dense model's (Zebra-HyLo, arXiv 2604.24715).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import nn

from caprese.efficient_methods.mamba.mixer import Rotation
from caprese.efficient_methods.mamba.replacement import replacements
from caprese.efficient_methods.passes import dense, phases
from caprese.efficient_methods.tokens import Tokens
from caprese.errors import CapreseError
from caprese.models import device_of, unwrap
from caprese.models.private import needed


class Observed(NamedTuple):
    """What a replaced attention saw and gave in the dense model."""

    x: torch.Tensor
    """[B, T, D]."""
    out: torch.Tensor
    """[B, T, D]."""
    probabilities: torch.Tensor | None
    """[B, H, T, T], where they were asked for and it gives them."""
    rotation: Rotation | None


def _whole(model: nn.Module, tokens: Tokens, **more: Any) -> Any:
    """One pass over all tokens as if they were prompt: what FFN sparsity takes, branches give back later."""
    inputs = tokens.inputs(device_of(model))
    with phases(model, inputs["attention_mask"].sum(-1)):
        return unwrap(model).get_decoder()(**inputs, use_cache=False, **more)


# of the attention's size, where what stays of it leaves nothing to mixers
_LEAST = 0.01


@torch.no_grad()
def teacher_mixing(
    model: nn.Module, tokens: Tokens, matrices: bool = False, look: Callable[[Observed], Any] = lambda seen: seen
) -> dict[int, Any]:
    """What each replaced attention saw and gave in the dense model, or what `look` makes of it, by layer."""
    seen: dict[int, Any] = {}

    def see(at: Any, args: tuple[Any, ...], kwargs: dict[str, Any], given: Any) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        seen[at.layer] = look(Observed(x, given[0], given[1], kwargs.get("position_embeddings")))

    base = unwrap(model)
    how = needed(base.config, "_attn_implementation")
    with ExitStack() as stack:
        if matrices:  # other implementations do not say their probabilities
            base.set_attn_implementation("eager")
            stack.callback(base.set_attn_implementation, how)
        for at in replacements(model):
            stack.enter_context(at.register_forward_hook(see, with_kwargs=True))
        stack.enter_context(dense(model))
        _whole(model, tokens)
    return seen


@torch.no_grad()
def match_scale(model: nn.Module, tokens: Tokens) -> None:
    """Scale every mixer's output to its attention's size: norm weights times ||attention(x)|| / ||mixer(x)||.

    A mixer norms what it gives where attention averages, so that with attention's out projection it starts too large.
    The bias of that projection is not the norm's; and where either gives nothing, there is nothing to match.
    """
    seen, mask = teacher_mixing(model, tokens), tokens.valid()
    for at in replacements(model):
        x, out, _, rotation = seen[at.layer]
        bias = at.mixer.out_proj.bias
        wanted, given = ((t[mask].float() - bias).norm() for t in (out, at.mixer(x, mask, rotation=rotation)))
        if at.attend is not None:  # and not to nothing, where all that these texts ask for is near
            left = out - at.attend(x, mask, rotation=rotation)
            wanted = (left[mask].float() - bias).norm().clamp(min=_LEAST * wanted)
        if wanted and given:
            at.mixer.norm.get_parameter("weight").mul_(wanted / given)


@torch.no_grad()
def match_decay(model: nn.Module, tokens: Tokens) -> None:
    """Have every head forget half over the mean distance that the attention's looks back (arXiv 2606.16429).

    Raises:
        CapreseError: an attention that does not give its probabilities.
    """
    mask = tokens.valid()
    places = torch.arange(mask.shape[1], device=mask.device)
    distance = (places[:, None] - places).clamp(min=0).float()

    def by_head(seen: Observed) -> torch.Tensor | None:  # and not the probabilities of all layers at once
        p = seen.probabilities
        return None if p is None else torch.einsum("bhij,ij->bih", p.float(), distance)[mask].mean(0)

    means = teacher_mixing(model, tokens, True, by_head)
    for at in replacements(model):
        mean, stay = means[at.layer], at.settings.heads_of(at.layer)
        if mean is None:
            raise CapreseError(
                f"the attention of layer {at.layer} does not give its probabilities; use start=attention"
            )
        at.mixer.forget(torch.stack([m for head, m in enumerate(mean) if head not in stay]).clamp(min=1))


def alignment(model: nn.Module, tokens: Tokens, matrices: float = 0.0) -> torch.Tensor:
    """||mixer(x) - attention(x)||^2 / ||attention(x)||^2 over the real tokens, by layer [layers].

    Args:
        matrices: how much is added of the same error of the mixing matrices, by Frobenius norm.

    Raises:
        CapreseError: an attention that does not give its probabilities, which `matrices` needs.
    """
    seen, mask = teacher_mixing(model, tokens, matrices > 0), tokens.valid()
    errors = []
    for at in replacements(model):
        x, out, probabilities, rotation = seen[at.layer]
        error = _relative(at.mix(x, mask, rotation=rotation)[mask], out[mask])
        if matrices:
            if at.attend is not None:
                raise CapreseError("mixing matrices are those of whole mixers; set alignment.matrices to 0")
            if probabilities is None:
                raise CapreseError(
                    f"{type(at.attention).__name__} does not give its probabilities; set alignment.matrices to 0"
                )
            rows = mask[:, None, :, None]
            error = error + matrices * _relative(at.mixer.matrix(x, mask, rotation) * rows, probabilities * rows)
        errors.append(error)
    return torch.stack(errors)


def hidden_alignment(model: nn.Module, tokens: Tokens) -> torch.Tensor:
    """||h - dense h||^2 / ||dense h||^2 of the hidden states after each layer, over real tokens, [layers]."""
    mask = tokens.valid()
    with torch.no_grad(), dense(model):
        wanted = _whole(model, tokens, output_hidden_states=True).hidden_states[1:]
    given = _whole(model, tokens, output_hidden_states=True).hidden_states[1:]
    return torch.stack([_relative(h[mask], w[mask]) for h, w in zip(given, wanted, strict=True)])


def _relative(given: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    wanted = wanted.float()
    size = wanted.square().sum()
    return (given.float() - wanted).square().sum() / torch.where(size > 0, size, 1)  # an attention may give nothing
