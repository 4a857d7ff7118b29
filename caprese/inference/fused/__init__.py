"""One decode step of FF_eff(x) + x L R in two products (arXiv 2505.07861, figure 2).

up becomes [up_k; L'], down becomes [down_k, R']; the gate is not widened. So the branch rides in products that are
there anyway, and no part of it is computed alone. Everything a step reads lies in tensors that stay where they are when
the choice changes, so a compiled or captured decode step stays valid.
"""

from __future__ import annotations

import os
from typing import Any

from peft import PeftModel
from torch import nn

from caprese import kernels
from caprese.adapters import Adapter
from caprese.adapters import load as load_adapter
from caprese.efficient_methods import applied_ffns
from caprese.errors import CapreseError
from caprese.inference.fused.by_row import runs_here
from caprese.inference.fused.forms import Form, check_form, faster_form, forms_of
from caprese.inference.fused.model import put_on
from caprese.inference.fused.step import branch_of
from caprese.models import unwrap
from caprese.models.residency import residency_of

__all__ = ["Form", "branch_of", "fuse", "is_fused", "load", "unfuse"]


def fuse(model: nn.Module, form: Form = "auto") -> nn.Module:
    """Turn every applied FFN and what is in its slot into one decode step, in place; returns the model.

    A generated token then runs two products in each FFN, also under `torch.compile` and CUDA graphs (generate with a
    static cache). On a CPU with a C compiler it runs whole decoder layers, where they are of the Llama kind, which is
    found by trying; where all of a decoder's are, all of them in one call a token. The choice, the adapter that is
    active and its weights are followed; weights of the base that change are not: fuse again. Prefill, training and
    `caprese.phases` run as before, and so does a batch with PEFT's `adapter_names`.

    Args:
        form: "packed" gathers the chosen rows once after prefill; "indexed" reads them in place, with Triton kernels on
            a GPU and compiled C on a CPU; "auto" takes the faster one, by measurement. A layer that a form does not
            fit (4-bit weights, an unknown activation) takes packed, or keeps its own arithmetic with the branch added.

    Raises:
        CapreseError: no method is applied, a base that is not whole in memory, or the indexed form is asked for where
            its kernels do not run.
    """
    check_form(form)
    wrappers = applied_ffns(model)
    if not wrappers:
        raise CapreseError("there is nothing to fuse: caprese.apply(model, caprese.Griffin()) or caprese.load first")
    if residency_of(model) != "whole":
        raise CapreseError("a decode step of layers that are not in memory cannot be one; load the base whole")
    unfuse(model)
    first = next(iter(wrappers.values()))
    if form == "indexed" and not (kernels.triton_runs(first.view.device) or runs_here(first)):
        raise CapreseError(
            "the indexed form needs Triton and a GPU, or a C compiler on a CPU; this model is on "
            f"{first.view.device.type}"
        )
    if form == "auto":
        form = faster_form(first)
    for wrapper in wrappers.values():
        forms = forms_of(wrapper)
        wrapper.fused = forms.get(form, forms["packed"])(wrapper)
    put_on(unwrap(model), list(wrappers.values()))
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Undo `fuse` exactly; returns the model."""
    for wrapper in applied_ffns(model).values():
        wrapper.unfuse()
    return model


def is_fused(model: nn.Module) -> bool:
    """Whether every applied FFN is fused."""
    wrappers = applied_ffns(model)
    return bool(wrappers) and all(w.fused is not None for w in wrappers.values())


def load(
    base: str | nn.Module,
    adapter: str | os.PathLike[str] | Adapter,
    *,
    fused: bool = False,
    form: Form = "auto",
    **how: Any,
) -> PeftModel:
    """Base + methods + recovery adapter, ready for `generate`; see `caprese.adapters.load` for what else it takes.

    Args:
        fused: `fuse` the result, in this form.

    Raises:
        CapreseError: wrong base, damaged files, unknown method, a form that does not run here.
    """
    model = load_adapter(base, adapter, **how)
    if fused:
        fuse(model, form)
    return model
