"""Products with a weight in few bits, for decoding: few tokens, each chosen row read once, where it lies."""

from __future__ import annotations

from typing import Any

import torch

from caprese.kernels.dispatch import MAX_BATCH, check_input, load_triton, uses_triton
from caprese.kernels.quantized import naive, native
from caprese.kernels.quantized.codes import GROUP, QuantizedRows, quantize

triton = load_triton("quantized")

__all__ = ["GROUP", "QuantizedRows", "products", "quantize", "sums"]


def products(x: torch.Tensor, weight: QuantizedRows, rows: torch.Tensor | None = None) -> torch.Tensor:
    """x W' with chosen rows of W.

    Args:
        x: [B, C].
        weight: [R, C].
        rows: int32 [k], of all sequences; each in range, which is not looked at. None takes all.
    Returns: [B, k], sums in float32 (of float64 inputs: float64).
    """
    _check("x", x, weight, rows, weight.columns)
    return _run("products", x, weight, rows)


def sums(z: torch.Tensor, weight: QuantizedRows, rows: torch.Tensor | None = None) -> torch.Tensor:
    """z W with chosen rows of W: how a down projection is stored, one neuron a row.

    Args:
        z: [B, k].
        weight, rows: see `products`.
    Returns: [B, C].
    """
    _check("z", z, weight, rows, len(weight) if rows is None else len(rows))
    return _run("sums", z, weight, rows)


def _run(name: str, x: torch.Tensor, weight: QuantizedRows, rows: torch.Tensor | None) -> torch.Tensor:
    y: torch.Tensor
    if uses_triton(x) and len(x) <= MAX_BATCH:
        y = getattr(triton, name)(x, weight, rows)
    elif _native(x):
        place: Any = torch.ops.caprese if torch.compiler.is_compiling() else native
        y = getattr(place, name)(x, weight.codes, weight.scales, rows)
    else:
        y = getattr(naive, name)(x, weight, rows)
    return y


def _check(name: str, x: torch.Tensor, weight: QuantizedRows, rows: torch.Tensor | None, columns: int) -> None:
    check_input(name, x)
    if x.shape[1] != columns:
        raise ValueError(f"{name}: expected [B, {columns}], got {list(x.shape)}")
    if rows is not None and (rows.ndim != 1 or rows.dtype != torch.int32 or not rows.is_contiguous()):
        raise ValueError(f"rows: expected int32 [k], got {rows.dtype} {list(rows.shape)}")
    if not (x.device == weight.codes.device and (rows is None or rows.device == x.device)):
        raise ValueError(f"{name}: it is on {x.device}, the weight on {weight.codes.device}")


def _native(x: torch.Tensor) -> bool:
    """Few rows, and no gradient wanted: many are faster as one product of matrices."""
    if x.device.type != "cpu" or x.dtype == torch.float64 or not 0 < len(x) <= MAX_BATCH:
        return False
    return not (torch.is_grad_enabled() and x.requires_grad) and _compiled()


@torch.compiler.assume_constant_result
def _compiled() -> bool:
    return native.library() is not None


# under torch.compile: opaque, and of known shape
torch.library.custom_op("caprese::products", native.products, mutates_args=()).register_fake(
    lambda x, codes, scales, rows: x.new_empty(len(x), len(codes) if rows is None else len(rows))
)
torch.library.custom_op("caprese::sums", native.sums, mutates_args=()).register_fake(
    lambda z, codes, scales, rows: z.new_empty(len(z), codes.shape[1] * (1 if codes.dtype == torch.int8 else 2))
)
