"""Products with a weight in few bits, for decoding: few tokens, each chosen row read once, where it lies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from caprese.kernels.dispatch import MAX_BATCH, check_input, load_triton, uses_triton
from caprese.kernels.quantized import naive, native
from caprese.kernels.quantized.codes import GROUP, QuantizedRows, quantize

triton = load_triton("quantized")

__all__ = ["GROUP", "QuantizedRows", "WholeFFN", "products", "quantize", "runs_whole", "sums", "whole_ffn"]


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


def runs_whole(x: torch.Tensor, act: str | None) -> bool:
    """Whether `whole_ffn` takes this input and activation here."""
    return act in native.ACTIVATIONS and _native(x)


@dataclass(frozen=True)
class WholeFFN:
    """An FFN of F neurons and the branch beside it: (act(x gate') * x up') down + x left' right + last."""

    first: QuantizedRows | torch.Tensor
    """Gate over up, [2 F, D]; up alone where it is not `gated`; gate alone with up `beside` it, both tensors."""
    second: QuantizedRows | torch.Tensor
    """Down, one neuron a row, [F, D]; `across`, as a linear layer has it, [D, F]."""
    act: str
    """Of `activation_name`, where `runs_whole`."""
    gated: bool = True
    beside: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    """int32 [k], the neurons of all sequences; each in range, which is not looked at."""
    bias: torch.Tensor | None = None
    """Of gate and up, float32 [2 F] or [F]."""
    keep: torch.Tensor | None = None
    """bool [B, k], of each sequence."""
    threshold: torch.Tensor | None = None
    """float32 [1] or [B]: of neurons with |act(gate)| below it, up and down are not read."""
    branch: tuple[torch.Tensor, torch.Tensor] | None = None
    """left and right, [r, D] each."""
    last: torch.Tensor | None = None
    """float32 [D]."""
    across: bool = False
    """With tensors, F in whole vectors of 16, and neither rows, branch nor threshold; for `DecoderLayers`."""

    def arguments(self) -> tuple[Any, ...]:
        """In C's order."""
        first, second = (
            (w.codes, w.scales) if isinstance(w, QuantizedRows) else (w, None) for w in (self.first, self.second)
        )
        tensors = self.rows, self.bias, self.keep, self.threshold, *(self.branch or (None, None)), self.last
        return *first, self.beside, *second, *tensors, native.ACTIVATIONS.index(self.act), self.gated

    def structure(self, dtype: torch.dtype) -> native.FFN:
        """What C reads, for inputs of a type; the tensors are to live as long."""
        return native.FFN.of(self.arguments(), native.bits_of(dtype), self.across)


def whole_ffn(x: torch.Tensor, ffn: WholeFFN) -> torch.Tensor:
    """A whole FFN on a CPU, in one call.

    Args:
        x: [B, D]; float32 or bfloat16, the branch is of its type, and so are weights that are not in few bits.
    Returns: [B, D], sums in float32.
    """
    place: Any = torch.ops.caprese if torch.compiler.is_compiling() else native
    y: torch.Tensor = place.whole_ffn(x, *ffn.arguments())
    return y


def few_tokens(x: torch.Tensor, ffn: WholeFFN) -> torch.Tensor:
    """x [B, D] -> [B, D] by what `DecoderLayers` runs; not for `torch.compile`."""
    return native.run_ffn(x, ffn.structure(x.dtype))


def _native(x: torch.Tensor) -> bool:
    """Few rows, and no gradient wanted: many are faster as one product of matrices."""
    if x.device.type != "cpu" or x.dtype == torch.float64 or not 0 < len(x) <= MAX_BATCH:
        return False
    return not (torch.is_grad_enabled() and x.requires_grad) and _compiled()


@torch.compiler.assume_constant_result
def _compiled() -> bool:
    return native.library() is not None


# Under torch.compile: opaque, and of known shape. Not `custom_op`, whose checks take as long as a small product.
_ROWS = "(Tensor x, Tensor codes, Tensor scales, Tensor? rows) -> Tensor"
_FFN = (
    "(Tensor x, Tensor first, Tensor? first_scales, Tensor? beside, Tensor second, Tensor? second_scales, "
    "Tensor? rows, Tensor? bias, Tensor? keep, Tensor? threshold, Tensor? left, Tensor? right, Tensor? last, int act, "
    "bool gated) -> Tensor"
)
_LIBRARY = torch.library.Library("caprese", "DEF")
for _name, _schema, _result in (
    ("products", _ROWS, lambda x, codes, scales, rows: x.new_empty(len(x), len(codes if rows is None else rows))),
    ("sums", _ROWS, lambda z, codes, *_: z.new_empty(len(z), codes.shape[1] * (1 + (codes.dtype == torch.uint8)))),
    ("whole_ffn", _FFN, lambda x, *_: torch.empty_like(x)),
):
    _LIBRARY.define(_name + _schema)
    _LIBRARY.impl(_name, getattr(native, _name), "CPU")
    torch.library.register_fake(f"caprese::{_name}", _result, lib=_LIBRARY)
