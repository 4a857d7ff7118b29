"""What verbs do for lossless generation: a model with what drafts for it."""

from __future__ import annotations

from typing import Any

from caprese.errors import CapreseError


def check_draft(draft: str | None, has_own: bool) -> None:
    """Raise CapreseError if nobody drafts.

    Args:
        has_own: whether an adapter or a method is on the model.
    """
    if draft in (None, "own") and not has_own:
        raise CapreseError("--lossless needs a draft: --adapter, --method such as q8, --draft lookup, or --draft MODEL")


def make_draft(draft: str | None, tokenizer: Any, **how: Any) -> Any:
    """Who drafts, as `Lossless` takes it.

    Args:
        tokenizer: the target's; None is not compared.
        how: to load a draft model.

    Raises:
        CapreseError: a model that speaks other tokens, or none.
    """
    from caprese.models import load_base

    if draft in (None, "own", "lookup"):
        return draft or "own"
    model, other = load_base(draft, **how)
    if tokenizer is not None and tokenizer.get_vocab() != other.get_vocab():
        raise CapreseError(f"--draft {draft}: its tokenizer is not the model's; a draft has to share it")
    return model


def put_method(model: Any, method: str, sparsity: float | None = None, layers: Any = None, fused: bool = True) -> None:
    """Put a method on a bare model.

    Raises:
        CapreseError: one that learns from samples.
    """
    from caprese.efficient_methods import apply, needs_calibration
    from caprese.inference import fuse
    from caprese.recipes import resolve_recipe

    methods = resolve_recipe(method=method, sparsity=sparsity, layers=layers).methods
    if needs_calibration(methods):
        raise CapreseError(f"--method {method} chooses from samples: caprese recover makes an adapter of it")
    apply(model, methods)
    if fused:
        fuse(model)
