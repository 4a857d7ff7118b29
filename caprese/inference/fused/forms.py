"""Which forms a decode step can take in an FFN, and which is the faster."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import nn

from caprese import kernels
from caprese.efficient_methods import EfficientFFN
from caprese.efficient_methods.memory import LayerMemory, Seen
from caprese.errors import CapreseError
from caprese.inference.fused.by_row import ByRow, runs_here, whole_is_faster
from caprese.inference.fused.in_place import InPlace
from caprese.inference.fused.indexed import Indexed
from caprese.inference.fused.packed import Packed
from caprese.inference.fused.step import Step
from caprese.inference.generate import clock

Form = Literal["auto", "packed", "indexed"]
# inputs that one product of a whole decode step is timed on, where a form is chosen by measurement
_TRIALS = 20


def check_form(form: str) -> None:
    """Raise CapreseError if there is no such form."""
    if form not in get_args(Form):
        raise CapreseError(f"no form {form!r}: {', '.join(get_args(Form))}")


def forms_of(wrapper: EfficientFFN) -> dict[Form, Callable[[EfficientFFN], Step]]:
    """The forms an applied FFN can take."""
    every = frozenset().union(*(m.acts_on for m in wrapper.methods))
    if not wrapper.view.row_wise:
        return {"packed": InPlace}
    ffn = wrapper.transformed
    if isinstance(ffn, kernels.QuantizedFFN):
        return {"packed": InPlace if "inputs" in every else ByRow}
    forms: dict[Form, Callable[[EfficientFFN], Step]] = {"packed": InPlace}
    act = kernels.activation_name(ffn.act)
    if ("rows" in every or "width" in every) and not every & {"inputs", "weights"}:
        whole = act is not None and whole_is_faster(ffn.width, ffn.hidden_size, wrapper.view.dtype, ffn.device)
        forms["packed"] = ByRow if whole else Packed
    if "weights" in every or act is None:
        return forms
    base = ffn is wrapper.view
    gated, conv = wrapper.view.gated, not isinstance(wrapper.view.part("up"), nn.Linear)
    acting = every - {"width", "attention"}
    if conv or wrapper.view.part("down").__class__ is not nn.Linear:
        return forms
    apart = gated and not wrapper.view.fused
    triton, whole = kernels.triton_runs(ffn.device), runs_here(wrapper)
    able = {"rows": triton or whole, "neurons": gated and (triton or whole), "inputs": triton and base and apart}
    if len(acting) == 1 and able.get(next(iter(acting)), False):
        forms["indexed"] = Indexed
    return forms


@torch.no_grad()
def faster_form(wrapper: EfficientFFN) -> Form:
    """The form in which one token takes less time in this FFN, measured on its device with a choice at random."""
    forms = forms_of(wrapper)
    if len(forms) == 1:
        return "packed"
    device = wrapper.view.device
    x = torch.randn(1, 1, wrapper.view.hidden_size, dtype=wrapper.view.dtype, device=device)
    times: dict[Form, float] = {}
    a, z = wrapper.view.neurons(x)
    if wrapper.rows is not None:
        a, z = a[..., wrapper.rows], z[..., wrapper.rows]
    seen = Seen(0, x, a, z, torch.ones(1, 1, dtype=torch.bool, device=device))
    for name, make in forms.items():
        memory = LayerMemory()
        memory.learn(wrapper.learners, seen)
        step = make(wrapper)
        try:
            step.follow(memory, 1)
            for trial in range(_TRIALS + 3):
                if trial == 3:
                    begin = clock(device)
                step(x)
            times[name] = clock(device) - begin
        finally:
            step.restore()
    return min(times, key=times.__getitem__)
