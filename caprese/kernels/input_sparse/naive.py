"""A linear layer that sees only the large channels of its input, in plain torch."""

from __future__ import annotations

import torch

from caprese.kernels.naive import wide


def input_sparse(
    x: torch.Tensor, weight_t: torch.Tensor, threshold: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The reference of `kernels.input_sparse`."""
    x_wide = wide(x)
    y = x_wide.masked_fill(x_wide.abs() < threshold.reshape(1, 1), 0) @ wide(weight_t)
    return (y if bias is None else y + bias).to(x.dtype)
