"""What every operation on chosen rows has in common: which rows, when Triton runs, and what is refused.

For each operation a folder: `naive.py`, plain torch, the reference; `triton.py`, the kernel; and in `__init__.py` the
function that chooses between them. Methods that use them: GRIFFIN (arXiv 2404.01365) and static pruning choose rows,
CATS (arXiv 2404.08763) by `cats_select`, TEAL (arXiv 2408.14690) inputs by `input_sparse`; the recovery branch is
`left` and `right` (arXiv 2505.07861). B sequences decode one token each. Sums are taken in float32 (float64 inputs:
float64), results returned in x's type.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any, NamedTuple

import torch

from caprese.kernels.activations import ACTIVATIONS

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton interprets its kernels on the CPU; Triton itself reads this when it is imported."""

MAX_BATCH = 16
"""Sequences a kernel takes at once; more are taken in turn, each time reading the weights again."""


class Rows(NamedTuple):
    """Chosen rows of a weight: a list shared by all sequences (S = 1), or each has its own (S = B)."""

    chosen: torch.Tensor | None = None
    """int32 or int64 [S, k]; None takes all rows."""
    held: torch.Tensor | None = None
    """[S]: how many of a list hold, the rest being ignored; None is all."""

    def turn(self, turn: slice) -> Rows:
        """The lists of some sequences; a shared one as it is."""
        return Rows(*(t if t is None or t.shape[0] == 1 else t[turn] for t in self))


# Triton is not everywhere torch is
_RUNS = (INTERPRET or torch.version.cuda or torch.version.hip) and importlib.util.find_spec("triton") is not None


def load_triton(operation: str) -> Any:
    """The Triton kernels of an operation, None where Triton does not run."""
    return importlib.import_module(f"caprese.kernels.{operation}.triton") if _RUNS else None


def triton_runs(device: torch.device) -> bool:
    """Whether the kernels run on this device."""
    return bool(_RUNS) and (device.type == "cuda" or INTERPRET)


def uses_triton(x: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """On a GPU (or interpreted), unless a gradient is wanted or all is float64, which the reference is for."""
    if not triton_runs(x.device) or x.dtype == torch.float64 or x.shape[0] == 0:
        return False
    return not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *others)))


def turns(batch: int) -> list[slice]:
    """The sequences of a batch, `MAX_BATCH` at a time."""
    return [slice(start, start + MAX_BATCH) for start in range(0, batch, MAX_BATCH)]


def check_weight(name: str, weight: torch.Tensor | None, x: torch.Tensor, rows: int | None, columns: int) -> None:
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


def check_vector(name: str, vector: torch.Tensor | None, size: int) -> None:
    if vector is not None and (vector.ndim != 1 or vector.shape[0] != size):
        raise ValueError(f"{name}: expected [{size}], got {list(vector.shape)}")


def check_rows(chosen: Rows, batch: int, rows: int) -> int:
    """k, the length of a list."""
    index, count = chosen
    if index is None:
        if count is not None:
            raise ValueError("count: without an index there is no list to cut short")
        return rows
    if index.ndim != 2 or index.shape[0] not in (1, batch) or index.dtype not in (torch.int32, torch.int64):
        wanted = f"int32 or int64 [1 or {batch}, k]"
        raise ValueError(f"index: expected {wanted}, got {index.dtype} {list(index.shape)}")
    check_vector("count", count, index.shape[0])
    return index.shape[1]


def check_input(name: str, x: torch.Tensor) -> None:
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(f"{name}: expected floats [B, any], got {x.dtype} {list(x.shape)}")


def check_act(act: str) -> None:
    if act not in ACTIVATIONS:
        raise ValueError(f"act: expected one of {', '.join(ACTIVATIONS)}, got {act!r}")
