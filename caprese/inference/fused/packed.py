"""The packed form: chosen rows gathered once after prefill, two products a token."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from caprese.efficient_methods import Method
from caprese.inference.fused.step import Step, chosen_rows
from caprese.models import Weights

# A union's width is a multiple of it, so that few shapes occur.
_ROUND = 64
# Rows that are turned together and stay in the cache while they are.
_AT_ONCE = 32
# Bytes of weights that no cache holds.
_COLD = 128 << 20


def fastest(nbytes: int, weights: Callable[[], Any], *ways: Callable[..., Any]) -> int:
    """Which way to compute with weights takes least time on a CPU, with weights that come from memory, as they do
    between other layers.

    Args:
        nbytes: of one set of weights.
        weights: makes a set, which each way is given.
    """
    sets = [weights() for _ in range(max(2, min(16, _COLD // max(1, nbytes))))]
    best = [math.inf] * len(ways)
    for _ in range(5):
        for i, way in enumerate(ways):
            begin = time.perf_counter()
            for each in sets:
                way(*each)
            best[i] = min(best[i], time.perf_counter() - begin)
    return min(range(len(ways)), key=best.__getitem__)


@functools.cache
@torch.no_grad()
def by_column(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether one token's product with a weight [rows, columns] is faster here with the weight stored by column.

    Measured, once for a shape, on a CPU: its libraries run some shapes on one core in one order and on all in the other
    (3104 x 576 in float32, on two cores of an AMD EPYC: 9 GB/s by row, 16 by column).
    """
    if device.type != "cpu" or not rows or not columns:
        return False
    x = torch.ones(1, columns, dtype=dtype)
    return (
        fastest(
            rows * columns * dtype.itemsize,
            lambda: (torch.ones(rows, columns, dtype=dtype), torch.ones(columns, rows, dtype=dtype).T),
            lambda weight, turned: F.linear(x, weight),
            lambda weight, turned: F.linear(x, turned),
        )
        == 1
    )


class Packed(Step):
    """Chosen rows gathered once after prefill into contiguous tensors: [gate_k; up_k; L'] and [down_k, R'].

    Sequences with choices of their own share the union of them, each with its mask. It is filled up with masked rows to
    a width that does not depend on the prompts: in a compiled step, to what the union can have at most.
    """

    def _fill(self, choices: list[tuple[Method, torch.Tensor | None]], branch: Any) -> None:
        (wrapper,) = self.wrapper
        w = wrapper.transformed.weights()
        index = self._take_over(choices)
        left, right, extra = branch or (w.up[:0], w.down[:, :0], None)
        halves = [w.up] if w.gate is None else [w.gate, w.up]
        first = self._room("first", len(halves) * self.width + len(left), w.up.shape[1])
        second = self._room("second", w.down.shape[0], self.width + len(left))
        for i, half in enumerate(halves):
            take_rows(first[i * self.width : (i + 1) * self.width], half, index)
        first[len(halves) * self.width :] = left
        take_columns(second[:, : self.width], w.down, index)
        second[:, self.width :] = right
        self._hold("first_bias", self._first_bias(w, index, len(left)))
        self._hold("second_bias", extra if w.down_bias is None else w.down_bias + (0 if extra is None else extra))

    def _take_over(self, choices: list[tuple[Method, torch.Tensor | None]]) -> torch.Tensor | None:
        """The rows to gather, [k], None for all; sets the width, and what else decides about neurons."""
        rows = chosen_rows(choices)
        masks = [(m, choice) for m, choice in choices if "neurons" in m.acts_on]
        index, own = (None, None) if rows is None else self._union(rows)
        self.width = self.wrapper[0].transformed.width if index is None else len(index)
        self._hold("mask", own)
        self.methods = [m for m, _ in masks]
        for i, (_, choice) in enumerate(masks):
            self._hold(f"choice_{i}", choice)
        return index

    def _room(self, name: str, *shape: int) -> torch.Tensor:
        """A buffer of this shape to write into: the last one if it fits."""
        held = getattr(self, name, None)
        if held is None or held.shape != shape:
            like = self.wrapper[0].transformed.weights().down
            turned = by_column(*shape, like.dtype, like.device)
            held = torch.empty(shape[::-1] if turned else shape, dtype=like.dtype, device=like.device)
            held = held.T if turned else held
            self.register_buffer(name, held, persistent=False)
        return held

    def _union(self, rows: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Rows to gather (None is all) of choices bool [S, 1, F], and what each sequence leaves of them."""
        index = rows.any(0).flatten().nonzero().squeeze(-1)
        if len(rows) == 1:
            return index, None
        most, width = len(rows) * int(rows[0].sum()), rows.shape[-1]
        wanted = most if self.wrapper[0].phases.compiled else -(-len(index) // _ROUND) * _ROUND
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


def take_rows(out: torch.Tensor, weight: torch.Tensor, index: torch.Tensor | None) -> None:
    """The chosen rows of a weight; a few at a time, so that what is stored in another order is turned within the cache
    (three times as fast on a CPU)."""
    if index is None:
        out.copy_(weight)
    elif out.is_contiguous() and weight.is_contiguous():
        torch.index_select(weight.detach(), 0, index, out=out)
    elif weight.device.type != "cpu":
        out.copy_(weight.index_select(0, index))
    else:
        for rows, chosen in zip(out.split(_AT_ONCE), index.split(_AT_ONCE), strict=True):
            rows.copy_(weight.index_select(0, chosen))


def take_columns(out: torch.Tensor, weight: torch.Tensor, index: torch.Tensor | None) -> None:
    """The chosen columns of a weight, likewise."""
    if index is None:
        out.copy_(weight)
    elif weight.device.type != "cpu":
        out.copy_(weight.index_select(1, index))
    else:  # gather is a third faster than index_select here
        for rows, whole in zip(out.split(_AT_ONCE), weight.split(_AT_ONCE), strict=True):
            rows.copy_(whole.gather(1, index.expand(len(whole), -1)))
