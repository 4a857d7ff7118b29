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
from caprese.inference.fused.in_place import InPlace
from caprese.inference.fused.indexed import Indexed
from caprese.inference.fused.packed import Packed
from caprese.inference.fused.quantized import PackedRows
from caprese.inference.fused.step import Step

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
    if isinstance(wrapper.transformed, kernels.QuantizedFFN):
        return {"packed": InPlace if "inputs" in every else PackedRows}
    rows_chosen = "rows" in every or "width" in every
    forms: dict[Form, Callable[[EfficientFFN], Step]] = {
        "packed": Packed if rows_chosen and not every & {"inputs", "weights"} else InPlace
    }
    if "weights" in every or kernels.activation_name(wrapper.transformed.act) is None:
        return forms
    base = wrapper.transformed is wrapper.view
    gated, conv = wrapper.view.gated, not isinstance(wrapper.view.part("up"), nn.Linear)
    acting = every - {"width", "attention"}
    if conv or wrapper.view.part("down").__class__ is not nn.Linear:
        return forms
    able = {"rows": True, "neurons": gated, "inputs": gated and base and not wrapper.view.fused}
    if len(acting) == 1 and able.get(next(iter(acting)), False):
        forms["indexed"] = Indexed
    return forms


@torch.no_grad()
def faster_form(wrapper: EfficientFFN) -> Form:
    """The form in which one token takes less time in this FFN, measured on its device with a choice at random."""
    forms = forms_of(wrapper)
    if len(forms) == 1:
        return "packed"
    x = torch.randn(1, 1, wrapper.view.hidden_size, dtype=wrapper.view.dtype, device=wrapper.view.device)
    times: dict[Form, float] = {}
    a, z = wrapper.view.neurons(x)
    if wrapper.rows is not None:
        a, z = a[..., wrapper.rows], z[..., wrapper.rows]
    seen = Seen(0, x, a, z, torch.ones(1, 1, dtype=torch.bool, device=x.device))
    for name, make in forms.items():
        memory = LayerMemory()
        memory.learn(wrapper.learners, seen)
        step = make(wrapper)
        try:
            step.follow(memory, 1)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for trial in range(_TRIALS + 3):
                if trial == 3:
                    begin.record()
                step(x)
            end.record()
            torch.cuda.synchronize()
        finally:
            step.restore()
        times[name] = begin.elapsed_time(end)
    return min(times, key=times.__getitem__)
