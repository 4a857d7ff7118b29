"""Products with rows in few bits, in plain torch."""

from __future__ import annotations

import torch

from caprese.kernels.naive import wide
from caprese.kernels.quantized.codes import QuantizedRows


def products(x: torch.Tensor, weight: QuantizedRows, rows: torch.Tensor | None = None) -> torch.Tensor:
    """The reference of `kernels.quantized.products`."""
    taken = weight if rows is None else weight.take(rows)
    return (wide(x) @ taken.wide(wide(x).dtype).T).to(x.dtype)


def sums(z: torch.Tensor, weight: QuantizedRows, rows: torch.Tensor | None = None) -> torch.Tensor:
    """The reference of `kernels.quantized.sums`."""
    taken = weight if rows is None else weight.take(rows)
    return (wide(z) @ taken.wide(wide(z).dtype)).to(z.dtype)
