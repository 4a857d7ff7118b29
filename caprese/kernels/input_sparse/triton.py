"""`input_sparse` by the kernels of `down`."""

from __future__ import annotations

import torch

from caprese.kernels.dispatch import Rows
from caprese.kernels.down.triton import split_down


def input_sparse(
    x: torch.Tensor, weight_t: torch.Tensor, threshold: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """See `kernels.input_sparse`."""
    return split_down(x, weight_t, Rows(), None, bias, threshold, False, "input_sparse")
