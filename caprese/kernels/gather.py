"""Products with chosen rows of a weight, for decoding: few tokens, each weight that is needed read once.

For each function a plain torch reference and, on a GPU, a Triton kernel (`triton_gather`); the function that bears the
name alone chooses between them. Methods that use them: GRIFFIN (arXiv 2404.01365) and static pruning give `index`,
CATS (arXiv 2404.08763) `cats_select`, TEAL (arXiv 2408.14690) `input_sparse`, the recovery branch `left` and `right`
(arXiv 2505.07861). B sequences decode one token each. A list of rows, `index` [S, k], is shared by all (S = 1) or each
has its own (S = B); `count` [S] says how many of them hold, the rest is ignored.

Sums are taken in float32 (float64 inputs: float64), results returned in x's type.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton interprets its kernels on the CPU; Triton itself reads this when it is imported."""

triton_gather: Any = None
if INTERPRET or torch.version.cuda or torch.version.hip:
    with contextlib.suppress(ImportError):  # Triton is not everywhere torch is
        triton_gather = importlib.import_module("caprese.kernels.triton_gather")

MAX_BATCH = 16
"""Sequences a kernel takes at once; more are taken in turn, each time reading the weights again."""


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def activation_name(act: Callable[[torch.Tensor], torch.Tensor]) -> str | None:
    """Which of `ACTIVATIONS` a function is, within 1e-6 on -8..8; None if it is none of them."""
    x = torch.linspace(-8, 8, 4001, dtype=torch.float64, device="cpu")
    try:
        with torch.no_grad():
            y = act(x)
    except (RuntimeError, TypeError, ValueError):  # a function with parameters, or of another shape
        return None
    if not isinstance(y, torch.Tensor) or y.shape != x.shape:
        return None
    return next((name for name, known in ACTIVATIONS.items() if bool((y - known(x)).abs().max() <= 1e-6)), None)


# The references.


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _valid(k: int, count: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """Which places of a list hold, bool [S or 1, k]."""
    places = torch.arange(k, device=device)[None]
    return torch.ones_like(places, dtype=torch.bool) if count is None else places < count[:, None]


def _rows(weight: torch.Tensor, index: torch.Tensor | None, valid: torch.Tensor) -> torch.Tensor:
    """Rows of a weight [F, D] -> [S, k, D], wide; any row where the place does not hold."""
    return _wide(weight)[None] if index is None else _wide(weight[index.masked_fill(~valid, 0).long()])


def _product(x: torch.Tensor, rows: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [B, D], rows [S, k, D], bias [S, k] -> [B, k]."""
    product = (_wide(x)[:, None] @ rows.mT).squeeze(1)
    return product if bias is None else product + bias


def _chosen(bias: torch.Tensor | None, index: torch.Tensor | None, valid: torch.Tensor) -> torch.Tensor | None:
    return None if bias is None else _rows(bias[:, None], index, valid).squeeze(-1)


def reference_gate_up(
    x: torch.Tensor,
    gate: torch.Tensor | None,
    up: torch.Tensor,
    index: torch.Tensor | None,
    act: str,
    left: torch.Tensor | None = None,
    gate_bias: torch.Tensor | None = None,
    up_bias: torch.Tensor | None = None,
    count: torch.Tensor | None = None,
    a: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `gate_up`."""
    valid = _valid(len(up) if index is None else index.shape[1], count, x.device)
    z = _product(x, _rows(up, index, valid), _chosen(up_bias, index, valid))
    if a is not None:
        z = _wide(a) * z
    elif gate is None:
        z = ACTIVATIONS[act](z)
    else:
        z = ACTIVATIONS[act](_product(x, _rows(gate, index, valid), _chosen(gate_bias, index, valid))) * z
    z = z.masked_fill(~valid, 0)
    if left is not None:
        z = torch.cat([z, _product(x, _wide(left)[None])], -1)
    return z.to(x.dtype)


def reference_cats_select(
    x: torch.Tensor, gate: torch.Tensor, threshold: torch.Tensor, act: str, gate_bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `cats_select`."""
    a = reference_gate_up(x, None, gate, None, act, up_bias=gate_bias)
    keep = _wide(a).abs() >= threshold.reshape(-1, 1)
    count = keep.sum(-1, dtype=torch.int32)
    # a stable sort of "is dropped" brings the kept ones to the front in order
    index = (~keep).byte().argsort(dim=-1, stable=True)
    valid = _valid(len(gate), count, x.device)
    return a.gather(-1, index).masked_fill(~valid, 0), index.masked_fill(~valid, 0).int(), count


def reference_down(
    z: torch.Tensor,
    down: torch.Tensor,
    index: torch.Tensor | None,
    right: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    count: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `down`."""
    k = len(down) if index is None else index.shape[1]
    valid = _valid(k, count, z.device)
    y = (_wide(z)[:, None, :k].masked_fill(~valid[:, None], 0) @ _rows(down, index, valid)).squeeze(1)
    if right is not None:
        y = y + _wide(z)[:, k:] @ _wide(right)
    if bias is not None:
        y = y + bias
    return y.to(z.dtype)


def reference_input_sparse(
    x: torch.Tensor, weight_t: torch.Tensor, threshold: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """See `input_sparse`."""
    wide = _wide(x)
    y = wide.masked_fill(wide.abs() < threshold.reshape(1, 1), 0) @ _wide(weight_t)
    return (y if bias is None else y + bias).to(x.dtype)


# What callers use.


def triton_runs(device: torch.device) -> bool:
    """Whether the kernels run on this device."""
    return triton_gather is not None and (device.type == "cuda" or INTERPRET)


def _uses_triton(x: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """On a GPU (or interpreted), unless a gradient is wanted or all is float64, which the reference is for."""
    if not triton_runs(x.device) or x.dtype == torch.float64 or x.shape[0] == 0:
        return False
    return not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *others)))


def _turns(batch: int) -> list[slice]:
    return [slice(start, start + MAX_BATCH) for start in range(0, batch, MAX_BATCH)]


def _of(lists: torch.Tensor | None, turn: slice) -> torch.Tensor | None:
    """What is one for each sequence, for some of them; what all share as it is."""
    return lists if lists is None or lists.shape[0] == 1 else lists[turn]


def _check_weight(name: str, weight: torch.Tensor | None, x: torch.Tensor, rows: int | None, columns: int) -> None:
    """A weight [rows, columns], each row contiguous, of x's type."""
    if weight is None:
        return
    if weight.ndim != 2 or weight.shape[1] != columns or (rows is not None and weight.shape[0] != rows):
        wanted = f"[{'any' if rows is None else rows}, {columns}]"
        raise ValueError(f"{name}: expected {wanted}, got {list(weight.shape)}")
    if columns > 1 and weight.stride(1) != 1:
        raise ValueError(f"{name}: rows are not contiguous")
    if weight.dtype != x.dtype:
        raise ValueError(f"{name}: {weight.dtype}, but the input is {x.dtype}")


def _check_vector(name: str, vector: torch.Tensor | None, size: int) -> None:
    if vector is not None and (vector.ndim != 1 or vector.shape[0] != size):
        raise ValueError(f"{name}: expected [{size}], got {list(vector.shape)}")


def _check_index(index: torch.Tensor | None, count: torch.Tensor | None, batch: int, rows: int) -> int:
    """k, the length of the list."""
    if index is None:
        if count is not None:
            raise ValueError("count: without an index there is no list to cut short")
        return rows
    if index.ndim != 2 or index.shape[0] not in (1, batch) or index.dtype not in (torch.int32, torch.int64):
        wanted = f"int32 or int64 [1 or {batch}, k]"
        raise ValueError(f"index: expected {wanted}, got {index.dtype} {list(index.shape)}")
    _check_vector("count", count, index.shape[0])
    return index.shape[1]


def _check_input(name: str, x: torch.Tensor) -> None:
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(f"{name}: expected floats [B, any], got {x.dtype} {list(x.shape)}")


def _check_act(act: str) -> None:
    if act not in ACTIVATIONS:
        raise ValueError(f"act: expected one of {', '.join(ACTIVATIONS)}, got {act!r}")


def gate_up(
    x: torch.Tensor,
    gate: torch.Tensor | None,
    up: torch.Tensor,
    index: torch.Tensor | None,
    act: str,
    left: torch.Tensor | None = None,
    gate_bias: torch.Tensor | None = None,
    up_bias: torch.Tensor | None = None,
    count: torch.Tensor | None = None,
    a: torch.Tensor | None = None,
) -> torch.Tensor:
    """act(x gate') * (x up') on chosen rows, and x left' behind it; act(x up') where gate is None.

    Args:
        x: [B, D].
        gate, up: [F, D], rows contiguous; gate_bias, up_bias: [F].
        index: [S, k]; None takes all rows.
        left: [r, D], the recovery branch's first factor, transposed.
        count: [S].
        a: [B, k], act(x gate') already there in the list's order (`cats_select`): gate is not read.
    Returns: [B, k + r], zero where the list does not hold.
    """
    _check_input("x", x)
    _check_act(act)
    _check_weight("up", up, x, None, x.shape[1])
    k = _check_index(index, count, x.shape[0], up.shape[0])
    _check_vector("up_bias", up_bias, up.shape[0])
    _check_weight("left", left, x, None, x.shape[1])
    if a is None:
        _check_weight("gate", gate, x, up.shape[0], x.shape[1])
        if gate is None and gate_bias is not None:
            raise ValueError("gate_bias: there is no gate")
        _check_vector("gate_bias", gate_bias, up.shape[0])
    else:
        gate = gate_bias = None
        _check_weight("a", a, x, x.shape[0], k)
    if not _uses_triton(x, gate, up, left, gate_bias, up_bias, a):
        return reference_gate_up(x, gate, up, index, act, left, gate_bias, up_bias, count, a)
    if x.shape[0] <= MAX_BATCH:
        return triton_gather.gate_up(x, gate, up, index, act, left, gate_bias, up_bias, count, a)
    z = []
    for t in _turns(x.shape[0]):
        some = None if a is None else a[t]
        z.append(gate_up(x[t], gate, up, _of(index, t), act, left, gate_bias, up_bias, _of(count, t), some))
    return torch.cat(z)


def cats_select(
    x: torch.Tensor, gate: torch.Tensor, threshold: torch.Tensor, act: str, gate_bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Which neurons CATS keeps for each sequence: those with |act(x gate')| >= threshold.

    Args:
        x: [B, D].
        gate: [F, D], rows contiguous (up, in a plain FFN); gate_bias: [F].
        threshold: one, or [B].
    Returns: a [B, F], index [B, F] int32, count [B] int32: the kept activations and their places, in ascending order of
        place, then zeros. The comparison sees activations as rounded to x's type.
    """
    _check_input("x", x)
    _check_act(act)
    _check_weight("gate", gate, x, None, x.shape[1])
    _check_vector("gate_bias", gate_bias, gate.shape[0])
    if threshold.numel() not in (1, x.shape[0]):
        raise ValueError(f"threshold: expected one or [{x.shape[0]}], got {list(threshold.shape)}")
    if not _uses_triton(x, gate, gate_bias):
        return reference_cats_select(x, gate, threshold, act, gate_bias)
    if x.shape[0] <= MAX_BATCH:
        return triton_gather.cats_select(x, gate, threshold, act, gate_bias)
    each = threshold.reshape(-1)
    found = [cats_select(x[t], gate, each if len(each) == 1 else each[t], act, gate_bias) for t in _turns(x.shape[0])]
    a, index, count = zip(*found, strict=True)
    return torch.cat(a), torch.cat(index), torch.cat(count)


def down(
    z: torch.Tensor,
    down: torch.Tensor,
    index: torch.Tensor | None,
    right: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    count: torch.Tensor | None = None,
    atomic: bool = False,
) -> torch.Tensor:
    """Sum over j of z_j times row index_j of down, plus the tail of z times right, plus bias.

    Args:
        z: [B, k + r]; of the first k only those that hold are read.
        down: [F, D], the weight stored transposed, rows contiguous; bias: [D].
        index: [S, k]; None takes all rows.
        right: [r, D], the recovery branch's second factor.
        count: [S].
        atomic: add up in memory, in no fixed order: faster perhaps, but two runs may differ in the last bits.
    Returns: [B, D].
    """
    _check_input("z", z)
    if down.ndim != 2:
        raise ValueError(f"down: expected [F, D], got {list(down.shape)}")
    _check_weight("down", down, z, None, down.shape[1])
    _check_weight("right", right, z, None, down.shape[1])
    k = _check_index(index, count, z.shape[0], down.shape[0])
    wanted = k + (0 if right is None else right.shape[0])
    if z.shape[1] != wanted:
        raise ValueError(f"z: expected [B, {wanted}], got {list(z.shape)}")
    _check_vector("bias", bias, down.shape[1])
    if not _uses_triton(z, down, right, bias):
        return reference_down(z, down, index, right, bias, count)
    if z.shape[0] <= MAX_BATCH:
        return triton_gather.down(z, down, index, right, bias, count, atomic)
    y = []
    for t in _turns(z.shape[0]):
        y.append(triton_gather.down(z[t], down, _of(index, t), right, bias, _of(count, t), atomic))
    return torch.cat(y)


def input_sparse(
    x: torch.Tensor, weight_t: torch.Tensor, threshold: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """A linear layer that sees only the large channels of its input, sequence by sequence (TEAL).

    A row of the weight is read if any sequence needs it.

    Args:
        x: [B, D]; channels with |x| < threshold count as zero.
        weight_t: [D, N], the weight stored transposed, rows contiguous; bias: [N].
        threshold: one.
    Returns: [B, N].
    """
    _check_input("x", x)
    if weight_t.ndim != 2:
        raise ValueError(f"weight_t: expected [D, N], got {list(weight_t.shape)}")
    _check_weight("weight_t", weight_t, x, x.shape[1], weight_t.shape[1])
    if threshold.numel() != 1:
        raise ValueError(f"threshold: expected one, got {list(threshold.shape)}")
    _check_vector("bias", bias, weight_t.shape[1])
    if not _uses_triton(x, weight_t, bias):
        return reference_input_sparse(x, weight_t, threshold, bias)
    if x.shape[0] <= MAX_BATCH:
        return triton_gather.input_sparse(x, weight_t, threshold, bias)
    return torch.cat([input_sparse(x[t], weight_t, threshold, bias) for t in _turns(x.shape[0])])
