"""A branch as more neurons of its FFN. Exact, not fitted.

With a gate: gate row 0 with a bias b for which act(b) = 1, up row L', down column R', so that the neuron adds
act(b) (L' x) R'. Without one: two neurons for each of the branch's, since act(z) - act(-z) = z for ReLU, GELU and SiLU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from caprese.errors import CapreseError
from caprese.inference.fused import branch_of
from caprese.models import FFN, Weights

# widths are filled up with zero neurons to a multiple of it: what 4-bit groups and tensor parallelism divide
_MULTIPLE = 32
#: L' [r, D], R' [D, r], bias [D] or None
Branch = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def read_branch(recovery: nn.Module) -> Branch | None:
    """What a slot adds, if it adds anything."""
    found = branch_of(recovery)
    return None if found is None or not any(part is not None and part.any() for part in found[1:]) else found


def round_up(width: int) -> int:
    """The width of a checkpoint that holds so many neurons."""
    return -(-width // _MULTIPLE) * _MULTIPLE


def widen(ffn: FFN, w: Weights, branch: Branch | None, dtype: torch.dtype, apart: bool = False) -> Weights:
    """The FFN with its branch as more neurons, in float64.

    Args:
        apart: it is going to be rounded: zero neurons keep the branch's out of the others' groups of down, and its
            columns of down, which may be any multiple as its rows of up divide by it, get the others' size.
    """
    if branch is None:
        return w
    left, right = branch[0].detach().double(), branch[1].detach().double()
    extra = None if branch[2] is None else branch[2].detach().double()
    w = Weights(*(None if t is None else t.detach().double() for t in w))  # type: ignore[arg-type]
    if extra is not None:
        w = w._replace(down_bias=extra if w.down_bias is None else w.down_bias + extra)
    if apart:
        times = w.down.norm(dim=0).mean() / right.norm(dim=0)
        w = _filled(w, round_up(len(w.up)))
        times = torch.where(times.isfinite() & (times > 0), times, 1)
        left, right = left / times[:, None], right * times
    if w.gate is None:
        _check_odd(ffn)
        twice = left.new_zeros(2 * len(left))
        return w._replace(
            up=torch.cat([w.up, left, -left]),
            up_bias=None if w.up_bias is None else torch.cat([w.up_bias, twice]),
            down=torch.cat([w.down, right, -right], dim=1),
        )
    bias, value = _constant(ffn, dtype)
    none = left.new_zeros(len(w.up))
    return w._replace(
        gate=torch.cat([w.gate, torch.zeros_like(left)]),
        gate_bias=torch.cat([none if w.gate_bias is None else w.gate_bias, left.new_full((len(left),), bias)]),
        up=torch.cat([w.up, left]),
        up_bias=torch.cat([none if w.up_bias is None else w.up_bias, left.new_zeros(len(left))]),
        down=torch.cat([w.down, right / value], dim=1),
    )


def _constant(ffn: FFN, dtype: torch.dtype) -> tuple[float, float]:
    """(b, act(b)) with act(b) = 1, or as near as b can be in `dtype`."""
    low, high = 0.0, 16.0

    def act(x: float) -> float:
        return float(ffn.act(torch.tensor(x, dtype=torch.float64)))

    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if act(middle) < 1 else (low, middle)
    bias = float(torch.tensor(high).to(dtype))
    if abs(act(bias) - 1) > 0.01:
        raise CapreseError("this activation never is 1, so no neuron of a gated FFN can be linear; not exported")
    return bias, act(bias)


def _check_odd(ffn: FFN) -> None:
    z = torch.linspace(-8, 8, 65, dtype=torch.float64)
    if not torch.allclose(ffn.act(z) - ffn.act(-z), z, atol=1e-6):
        raise CapreseError("of this activation, act(z) - act(-z) is not z, so no neurons can be linear; not exported")


def _filled(w: Weights, width: int) -> Weights:
    """With zero neurons up to `width`."""

    def rows(t: Any) -> Any:
        return None if t is None else nn.functional.pad(t, (0, 0) * (t.dim() - 1) + (0, width - len(t)))

    return w._replace(
        gate=rows(w.gate),
        gate_bias=rows(w.gate_bias),
        up=rows(w.up),
        up_bias=rows(w.up_bias),
        down=nn.functional.pad(w.down, (0, width - w.down.shape[1])),
    )


def named_weights(ffn: FFN, w: Weights, width: int) -> dict[str, torch.Tensor]:
    """The weights under their names in the FFN, filled up with zero neurons to `width`."""
    family, w = ffn.family, _filled(w, width)
    up: torch.Tensor | None = w.up
    up_bias = w.up_bias
    named: dict[str, tuple[Any, torch.Tensor | None]] = {}
    if ffn.fused:
        up, up_bias = (
            None if half is None else torch.cat([gate, half])  # type: ignore[list-item]
            for gate, half in ((w.gate, up), (w.gate_bias, up_bias))
        )
    elif w.gate is not None:
        named[family.gate] = (w.gate, w.gate_bias)
    named[family.up] = (up, up_bias)
    named[family.down] = (w.down, w.down_bias)
    turned = isinstance(ffn.part("up"), Conv1D)
    weights = {f"{name}.weight": weight.T if turned else weight for name, (weight, _) in named.items()}
    return weights | {f"{name}.bias": bias for name, (_, bias) in named.items() if bias is not None}
