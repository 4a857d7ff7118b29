"""One decode step of FF_eff(x) + x L R in two products (arXiv 2505.07861, figure 2).

up becomes [up_k; L'], down becomes [down_k, R']; the gate is not widened. So the branch rides in products that are
there anyway, and no part of it is computed alone. Everything a step reads lies in tensors that stay where they are when
the choice changes, so a compiled or captured decode step stays valid.
"""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn

from caprese import kernels
from caprese.adapters import load as load_adapter
from caprese.efficient_methods import EfficientFFN, Method, applied_ffns
from caprese.efficient_methods.state import LayerState, Seen
from caprese.errors import CapreseError
from caprese.kernels import sparse_down
from caprese.models import Weights

Form = Literal["auto", "packed", "indexed"]
# inputs that one product of a whole decode step is timed on, where a form is chosen by measurement
_TRIALS = 20
# A union's width is a multiple of it, so that few shapes occur.
_ROUND = 64
# Rows that are turned together and stay in the cache while they are.
_AT_ONCE = 32
# Bytes of weights that no cache holds.
_COLD = 128 << 20


def branch_of(recovery: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None:
    """What the slot adds now, x L R + bias, over all active adapters: (L' [r, D], R' [D, r], bias [D] or None)."""
    names = [n for n in getattr(recovery, "active_adapters", ()) if n in recovery.lora_A]
    if not names or recovery.disable_adapters:
        return None
    left = torch.cat([recovery.lora_A[n].weight for n in names])
    right = torch.cat([recovery.lora_B[n].weight * recovery.scaling[n] for n in names], dim=1)
    biases = [b * recovery.scaling[n] for n in names if (b := recovery.lora_B[n].bias) is not None]
    return left, right, sum(biases[1:], biases[0]) if biases else None


def _version(recovery: Any) -> tuple[tuple[Any, ...], list[torch.Tensor]]:
    """What changes whenever `branch_of` would, and the tensors it names, to be held so that their ids stay theirs."""
    names = getattr(recovery, "active_adapters", None)
    if names is None or recovery.disable_adapters:
        return (), []
    layers = [m[n] for n in names for m in (recovery.lora_A, recovery.lora_B) if n in m]
    tensors = [p for layer in layers for p in (layer.weight, layer.bias) if p is not None]
    facts = ((id(p), p.data_ptr(), p._version) for p in tensors)
    return (tuple(names), *(recovery.scaling.get(n) for n in names), *facts), tensors


@functools.cache
@torch.no_grad()
def by_column(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether one token's product with a weight [rows, columns] is faster here with the weight stored by column.

    Measured, once for a shape, on a CPU: its libraries run some shapes on one core in one order and on all in the other
    (3104 x 576 in float32, on two cores of an AMD EPYC: 9 GB/s by row, 16 by column).
    """
    if device.type != "cpu" or not rows or not columns:
        return False
    # several weights in turn, so that they come from memory, as they do between other layers
    count = max(2, min(16, _COLD // (rows * columns * dtype.itemsize)))
    x = torch.ones(1, columns, dtype=dtype)
    weights = [torch.ones(rows, columns, dtype=dtype) for _ in range(count)]
    turned = [torch.ones(columns, rows, dtype=dtype).T for _ in range(count)]
    best = [math.inf, math.inf]
    for _ in range(5):
        for i, each in enumerate((weights, turned)):
            begin = time.perf_counter()
            for weight in each:
                F.linear(x, weight)
            best[i] = min(best[i], time.perf_counter() - begin)
    return best[1] < 0.9 * best[0]


class Step(nn.Module):
    """What a decode step of one FFN runs: x [B, 1, D] -> [B, 1, D].

    Subclasses say in `_fill` what they take from a choice, and in `forward` compute from that alone.
    """

    def __init__(self, wrapper: EfficientFFN) -> None:
        super().__init__()
        self.wrapper = (wrapper,)  # in a tuple, so that it is no submodule
        self.act = wrapper.start.act
        self.source: Any = None  # the choices these tensors were filled from
        self.version: Any = None
        self.tensors: list[torch.Tensor] = []

    def follow(self, state: LayerState, batch: int) -> None:
        """Take over the choice of the cache that decodes now, and the adapter as it is now; cheap if nothing changed.

        Raises:
            CapreseError: see `LayerState.chosen`.
        """
        (wrapper,) = self.wrapper
        version, tensors = _version(wrapper.recovery)
        version = (wrapper.phases.static, *version)
        if self.source is state.choices and self.version == version:
            return
        with torch.no_grad():
            choices = wrapper.choices(state, batch)
            self._fill(list(zip(wrapper.methods, choices, strict=True)), branch_of(wrapper.recovery))
        self.source, self.version, self.tensors = state.choices, version, tensors

    def _fill(self, choices: list[tuple[Method, torch.Tensor | None]], branch: Any) -> None:
        raise NotImplementedError

    def _hold(self, name: str, value: torch.Tensor | None) -> None:
        """Keep a tensor where the last one of its kind was, if it fits there."""
        like = self.wrapper[0].view.part("down").weight
        if value is not None and value.is_floating_point() and not name.startswith(("choice", "threshold")):
            value = value.to(like.dtype if like.is_floating_point() else value.dtype)
        held = getattr(self, name, None)
        if held is not None and value is not None and held.shape == value.shape and held.dtype == value.dtype:
            held.copy_(value)
        else:
            self.register_buffer(name, None if value is None else value.detach().clone(), persistent=False)

    def _room(self, name: str, *shape: int) -> torch.Tensor:
        """A buffer of this shape to write into: the last one if it fits."""
        held = getattr(self, name, None)
        if held is None or held.shape != shape:
            like = self.wrapper[0].start.weights().down
            turned = by_column(*shape, like.dtype, like.device)
            held = torch.empty(shape[::-1] if turned else shape, dtype=like.dtype, device=like.device)
            held = held.T if turned else held
            self.register_buffer(name, held, persistent=False)
        return held

    def restore(self) -> None:
        """Put back what was moved in the model."""

    @property
    def nbytes(self) -> int:
        """Memory of its own."""
        return sum(b.nbytes for b in self.buffers())


class Packed(Step):
    """Chosen rows gathered once after prefill into contiguous tensors: [gate_k; up_k; L'] and [down_k, R'].

    Sequences with choices of their own share the union of them, each with its mask. It is filled up with masked rows to
    a width that does not depend on the prompts: in a compiled step, to what the union can have at most.
    """

    def _fill(self, choices: list[tuple[Method, torch.Tensor | None]], branch: Any) -> None:
        (wrapper,) = self.wrapper
        w = wrapper.start.weights()
        rows = _rows(choices)
        masks = [(m, choice) for m, choice in choices if "neurons" in m.acts_on]
        index: torch.Tensor | None = None
        own: torch.Tensor | None = None
        if rows is not None:
            index, own = self._union(rows)
        self.width = w.up.shape[0] if index is None else len(index)
        self._hold("mask", own)
        self.methods = [m for m, _ in masks]
        for i, (_, choice) in enumerate(masks):
            self._hold(f"choice_{i}", choice)
        left, right, extra = branch or (w.up[:0], w.down[:, :0], None)
        halves = [w.up] if w.gate is None else [w.gate, w.up]
        first = self._room("first", len(halves) * self.width + len(left), w.up.shape[1])
        second = self._room("second", w.down.shape[0], self.width + len(left))
        for i, half in enumerate(halves):
            _take(first[i * self.width : (i + 1) * self.width], half, index, 0)
        first[len(halves) * self.width :] = left
        _take(second[:, : self.width], w.down, index, 1)
        second[:, self.width :] = right
        self._hold("first_bias", self._first_bias(w, index, len(left)))
        self._hold("second_bias", extra if w.down_bias is None else w.down_bias + (0 if extra is None else extra))

    def _union(self, rows: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Rows to gather (None is all) of choices bool [S, 1, F], and what each sequence leaves of them."""
        index = rows.any(0).flatten().nonzero().squeeze(-1)
        if len(rows) == 1:
            return index, None
        most, width = len(rows) * int(rows[0].sum()), rows.shape[-1]
        wanted = most if self.wrapper[0].phases.static else -(-len(index) // _ROUND) * _ROUND
        if wanted >= width:
            return None, rows
        own = F.pad(rows[..., index], (0, wanted - len(index)))
        return F.pad(index, (0, wanted - len(index))), own

    def _first_bias(self, w: Weights, index: torch.Tensor | None, rank: int) -> torch.Tensor | None:
        if w.up_bias is None:
            return None
        halves = [b if index is None else b[index] for b in (w.gate_bias, w.up_bias) if b is not None]
        return torch.cat([*halves, w.up_bias.new_zeros(rank)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.linear(x, self.first, self.first_bias)  # type: ignore[arg-type]
        k = self.width
        gate, u = h[..., :k], h
        if self.wrapper[0].view.gated:  # [gate; up; L']: what is behind the gate is what down wants to see
            u = h[..., k:]
            a = self.act(gate)
            u[..., :k].mul_(a)
        else:
            a = self.act(gate)
            u[..., :k] = a
        z = u[..., :k]
        mask: Any = self.mask
        if mask is not None:
            z.mul_(mask)
        for i, method in enumerate(self.methods):
            keep = method.keep(a, z, getattr(self, f"choice_{i}"))
            if keep is not None:
                z.mul_(keep)
        return F.linear(u, self.second, self.second_bias)  # type: ignore[arg-type]


def _rows(choices: list[tuple[Method, torch.Tensor | None]]) -> torch.Tensor | None:
    """The choice by sequence, bool [S, 1, F], if a method makes one; two such do not compose."""
    return next((choice for m, choice in choices if m.acts_on == {"rows"}), None)


def _take(out: torch.Tensor, weight: torch.Tensor, index: torch.Tensor | None, dim: int) -> None:
    """The chosen rows (dim 0) or columns (dim 1) of a weight; a few rows at a time, so that what is stored in another
    order is turned within the cache (three times as fast on a CPU)."""
    if index is None:
        out.copy_(weight)
    elif dim == 0 and out.is_contiguous():
        torch.index_select(weight.detach(), 0, index, out=out)
    elif weight.device.type != "cpu":
        out.copy_(weight.index_select(dim, index))
    elif dim == 0:
        for rows, chosen in zip(out.split(_AT_ONCE), index.split(_AT_ONCE), strict=True):
            rows.copy_(weight.index_select(0, chosen))
    else:  # gather is a third faster than index_select here
        for rows, whole in zip(out.split(_AT_ONCE), weight.split(_AT_ONCE), strict=True):
            rows.copy_(whole.gather(1, index.expand(len(whole), -1)))


class InPlace(Step):
    """The method's own arithmetic on the weights where they lie, and the branch added by the product that ends it."""

    def _fill(self, choices: list[tuple[Method, torch.Tensor | None]], branch: Any) -> None:
        self.methods = [m for m, _ in choices]
        for i, (_, choice) in enumerate(choices):
            self._hold(f"choice_{i}", choice)
        left, right, extra = branch or (None, None, None)
        self._hold("left", left)
        self._hold("right", None if right is None else right.T.contiguous())
        self._hold("extra", extra)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (wrapper,) = self.wrapper
        choices = [(m, getattr(self, f"choice_{i}")) for i, m in enumerate(self.methods)]
        y = sparse_down(wrapper.start, *wrapper.kept(x, wrapper.start, choices))
        left: Any = self.left
        right: Any = self.right
        extra: Any = self.extra
        if left is None:
            return y
        flat = torch.addmm(y.flatten(0, 1), F.linear(x, left).flatten(0, 1), right)
        return (flat if extra is None else flat + extra).view_as(y)


class Indexed(Step):
    """Kernels that read the chosen rows of the base's weights in place: no second copy of the FFN.

    down is stored transposed for it, one neuron a contiguous row; `restore` puts it back.
    """

    def __init__(self, wrapper: EfficientFFN) -> None:
        super().__init__(wrapper)
        name = kernels.activation_name(wrapper.start.act)
        assert name is not None
        self.act_name = name
        acting = frozenset().union(*(m.acts_on for m in wrapper.methods))
        self.kind = next((part for part in ("inputs", "neurons") if part in acting), "rows")
        for tensor in self._transposed():
            tensor.data = tensor.data.T.contiguous().T

    def restore(self) -> None:
        for tensor in self._transposed():
            tensor.data = tensor.data.contiguous()

    def _transposed(self) -> list[torch.Tensor]:
        """The weights that are read by input channel."""
        (wrapper,) = self.wrapper
        start: Any = wrapper.start
        if start is not wrapper.view:
            return [start.down_weight]
        return [wrapper.view.part(p).weight for p in (("gate", "up", "down") if self.kind == "inputs" else ("down",))]

    def _fill(self, choices: list[tuple[Method, torch.Tensor | None]], branch: Any) -> None:
        (wrapper,) = self.wrapper
        w = wrapper.start.weights()
        rows = _rows(choices)
        index = None
        if rows is not None:  # exactly k in each row
            index = rows.squeeze(1).nonzero()[:, 1].view(len(rows), -1).int()
        elif self.kind == "rows":
            index = torch.arange(len(w.up), device=w.up.device, dtype=torch.int32)[None]
        self._hold("index", index)
        self._hold("threshold", next((c for m, c in choices if m.acts_on & {"neurons", "inputs"}), None))
        left, right, extra = branch or (None, None, None)
        self._hold("left", left)
        self._hold("right", None if right is None else right.T.contiguous())
        self._hold("last_bias", extra if w.down_bias is None else w.down_bias + (0 if extra is None else extra))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w = self.wrapper[0].start.weights()  # not kept here: compiled, they are to be known as the model's own
        flat = x.flatten(0, 1)
        left: Any = self.left
        right: Any = self.right
        bias: Any = self.last_bias
        threshold: Any = self.threshold
        assert w.gate is not None or self.kind == "rows"
        if self.kind == "inputs":
            gate, up = (
                kernels.input_sparse(flat, weight.T, threshold[0, i], b)  # type: ignore[union-attr]
                for i, (weight, b) in enumerate(((w.gate, w.gate_bias), (w.up, w.up_bias)))
            )
            y = kernels.input_sparse(self.act(gate) * up, w.down.T, threshold[0, 2], bias)
            return (y if left is None else torch.addmm(y, F.linear(flat, left), right)).view_as(x)
        a = count = None
        index: Any = self.index
        if self.kind == "neurons":
            assert w.gate is not None
            a, index, count = kernels.cats_select(flat, w.gate, threshold.flatten(), self.act_name, w.gate_bias)
        rows = kernels.Rows(index, count)
        z = kernels.gate_up(flat, w.gate, w.up, rows, self.act_name, left, (w.gate_bias, w.up_bias), a)
        return kernels.down(z, w.down.T, rows, right, bias).view_as(x)


def _fits(wrapper: EfficientFFN) -> dict[Form, Callable[[EfficientFFN], Step]]:
    """The forms an applied FFN can take."""
    every = frozenset().union(*(m.acts_on for m in wrapper.methods))
    if not wrapper.view.row_wise:
        return {"packed": InPlace}
    rows_chosen = "rows" in every or "width" in every
    forms: dict[Form, Callable[[EfficientFFN], Step]] = {
        "packed": Packed if rows_chosen and not every & {"inputs", "weights"} else InPlace
    }
    if "weights" in every or kernels.activation_name(wrapper.start.act) is None:
        return forms
    base = wrapper.start is wrapper.view
    gated, conv = wrapper.view.gated, not isinstance(wrapper.view.part("up"), nn.Linear)
    acting = every - {"width", "attention"}
    if conv or wrapper.view.part("down").__class__ is not nn.Linear:
        return forms
    able = {"rows": True, "neurons": gated, "inputs": gated and base and not wrapper.view.fused}
    if len(acting) == 1 and able.get(next(iter(acting)), False):
        forms["indexed"] = Indexed
    return forms


def check_form(form: str) -> None:
    """Raise CapreseError if there is no such form."""
    if form not in get_args(Form):
        raise CapreseError(f"no form {form!r}: {', '.join(get_args(Form))}")


def fuse(model: nn.Module, form: Form = "auto") -> nn.Module:
    """Turn every applied FFN and what is in its slot into one decode step, in place; returns the model.

    A generated token then runs two products in each FFN, also under `torch.compile` and CUDA graphs (generate with a
    static cache). The choice, the adapter that is active and its weights are followed. Prefill, training and
    `caprese.phases` run as before, and so does a batch with PEFT's `adapter_names`.

    Args:
        form: "packed" gathers the chosen rows once after prefill; "indexed" reads them in place with Triton kernels
            (GPU); "auto" takes the faster one, by measurement on a GPU. A layer that a form does not fit (4-bit
            weights, an unknown activation) takes packed, or keeps its own arithmetic with the branch added to it.

    Raises:
        CapreseError: no method is applied, or the indexed form is asked for where its kernels do not run.
    """
    check_form(form)
    wrappers = applied_ffns(model)
    if not wrappers:
        raise CapreseError("there is nothing to fuse: caprese.apply(model, caprese.Griffin()) or caprese.load first")
    unfuse(model)
    first = next(iter(wrappers.values()))
    able = kernels.triton_runs(first.view.device)
    if form == "indexed" and not able:
        raise CapreseError(f"the indexed form needs Triton and a GPU, and this model is on {first.view.device.type}")
    if form == "auto":
        form = faster_form(first) if able and first.view.device.type != "cpu" else "packed"
    for wrapper in wrappers.values():
        forms = _fits(wrapper)
        wrapper.fused = forms.get(form, forms["packed"])(wrapper)
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Undo `fuse` exactly; returns the model."""
    for wrapper in applied_ffns(model).values():
        if wrapper.fused is not None:
            wrapper.fused.restore()
        wrapper.fused = None
    return model


def is_fused(model: nn.Module) -> bool:
    """Whether every applied FFN is fused."""
    wrappers = applied_ffns(model)
    return bool(wrappers) and all(w.fused is not None for w in wrappers.values())


@torch.no_grad()
def faster_form(wrapper: EfficientFFN) -> Form:
    """The form in which one token takes less time in this FFN, measured on its device with a choice at random."""
    forms = _fits(wrapper)
    if len(forms) == 1:
        return "packed"
    like = wrapper.view.part("down").weight
    x = torch.randn(1, 1, wrapper.view.hidden_size, dtype=like.dtype, device=like.device)
    times: dict[Form, float] = {}
    a, z = wrapper.view.neurons(x)
    if wrapper.rows is not None:
        a, z = a[..., wrapper.rows], z[..., wrapper.rows]
    seen = Seen(0, x, a, z, torch.ones(1, 1, dtype=torch.bool, device=x.device))
    for name, make in forms.items():
        state = LayerState()
        state.learn(wrapper.learners, seen)
        step = make(wrapper)
        try:
            step.follow(state, 1)
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


def load(
    base: str | nn.Module, adapter: str | os.PathLike[str], *, fused: bool = False, form: Form = "auto", **how: Any
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
