"""What the references share."""

from __future__ import annotations

import torch


def wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def valid_places(k: int, count: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """Which places of a list hold, bool [S or 1, k]."""
    places = torch.arange(k, device=device)[None]
    return torch.ones_like(places, dtype=torch.bool) if count is None else places < count[:, None]


def take_rows(weight: torch.Tensor, index: torch.Tensor | None, valid: torch.Tensor) -> torch.Tensor:
    """Rows of a weight [F, D] -> [S, k, D], wide; any row where the place does not hold."""
    return wide(weight)[None] if index is None else wide(weight[index.masked_fill(~valid, 0).long()])


def product(x: torch.Tensor, rows: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [B, D], rows [S, k, D], bias [S, k] -> [B, k]."""
    product = (wide(x)[:, None] @ rows.mT).squeeze(1)
    return product if bias is None else product + bias


def chosen_bias(bias: torch.Tensor | None, index: torch.Tensor | None, valid: torch.Tensor) -> torch.Tensor | None:
    return None if bias is None else take_rows(bias[:, None], index, valid).squeeze(-1)
