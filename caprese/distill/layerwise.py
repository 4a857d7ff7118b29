"""Stage 1: each layer's branch alone, min ||E - x L R||^2 with E = FF(x) - FF_eff(x) on dense inputs x.

In closed form this is reduced-rank regression. Two accumulators, Cxx = X'X and Cxy = X'E, hold all that matters, so
memory does not depend on the number of samples. W = (Cxx + lambda I)^-1 Cxy, V = the top eigenvectors of Cxy' W,
L = W V, R = V'. The directions of V add up independently, which gives the error at every rank at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from caprese.distill.batches import Batch, completion_hidden, prefill
from caprese.distill.precision import exact_products
from caprese.efficient_methods import EfficientFFN, Observer, applied_ffns
from caprese.limits import Amount, Count, Rate
from caprese.models import device_of

RIDGES = (0.0, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)


class Layerwise(BaseModel):
    """Stage 2: how the branches are fitted layer by layer."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    how: Literal["closed", "sequential", "adam", "none"] = "closed"
    """closed: reduced-rank regression in one pass. sequential: the same, layer after layer on the inputs the recovered
    layers below produce, with their hidden states in temporary files. adam: the paper's own recipe. none: start at
    zero."""
    ridge: Amount | Literal["auto"] = "auto"
    """lambda as a fraction of the mean of Cxx's diagonal; "auto" takes, for each layer, the best of a grid on the
    validation samples."""
    batch_size: Count = 16
    """Sequences in one forward pass."""
    checkpoint_every: Count = 512
    """closed: samples between two saved states: what a kill can cost."""
    epochs: Count = 20
    """adam: passes over the samples."""
    learning_rate: Rate = 1e-3
    """adam: peak rate; linear decay after 2% warm-up."""
    token_batch: Count = 128
    """adam: tokens in one optimiser step."""
    cache_activations: bool = True
    """adam: keep every x and E in memory instead of running the model again each epoch."""


@dataclass
class Moments:
    """Sums over tokens of one layer, in float64: what a branch is fitted to and judged by."""

    n: torch.Tensor
    x: torch.Tensor
    e: torch.Tensor
    xx: torch.Tensor
    xe: torch.Tensor
    ee: torch.Tensor
    yy: torch.Tensor

    @staticmethod
    def zeros(hidden: int, device: torch.device) -> Moments:
        def z(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        return Moments(z(), z(hidden), z(hidden), z(hidden, hidden), z(hidden, hidden), z(), z())

    def add(self, x: torch.Tensor, e: torch.Tensor, y: torch.Tensor) -> None:
        """x, e, y [n, D]: products of one batch in float32, sums in float64."""
        x, e = x.float(), e.float()
        self.n += len(x)
        self.x += x.sum(0, dtype=torch.float64)
        self.e += e.sum(0, dtype=torch.float64)
        with exact_products(x.device):
            self.xx += (x.T @ x).double()
            self.xe += (x.T @ e).double()
        self.ee += e.square().sum(dtype=torch.float64)
        self.yy += y.float().square().sum(dtype=torch.float64)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def centred(self) -> Moments:
        """The same about the means: what is left to a branch with a bias."""
        n = self.n.clamp_min(1)
        return Moments(
            self.n,
            torch.zeros_like(self.x),
            torch.zeros_like(self.e),
            self.xx - torch.outer(self.x, self.x) / n,
            self.xe - torch.outer(self.x, self.e) / n,
            self.ee - self.e.square().sum() / n,
            self.yy,
        )


@dataclass
class Fit:
    """One layer's solution at full rank: rank r takes the first r columns of `left` and rows of `right`.

    `curve[r]` is the held-out relative error at rank r, from 0.
    """

    left: torch.Tensor
    right: torch.Tensor
    bias: torch.Tensor | None
    curve: torch.Tensor
    ridge: float

    def cut(self, rank: int) -> Fit:
        """What `at` needs up to this rank, without the rest."""
        return replace(self, left=self.left[:, :rank].clone(), right=self.right[:rank].clone())

    def at(self, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """L [D, r], R [r, D], b [D], with the scale shared between L and R so that both train at one rate."""
        left, right = self.left[:, :rank], self.right[:rank]
        scale = left.norm(dim=0).clamp_min(1e-30).sqrt()
        bias = None
        if self.bias is not None:
            mean_x, mean_e = self.bias
            bias = mean_e - (mean_x @ left) @ right
        return left / scale, right * scale[:, None], bias


def fit_layer(train: Moments, held_out: Moments, rank: int, ridge: float | str = "auto", bias: bool = False) -> Fit:
    """Reduced-rank regression on the training moments.

    Args:
        rank: where "auto" compares ridges.
        ridge: a fraction of mean(diag(Cxx)), or "auto": the one with the least held-out error.
    """
    means = torch.stack([train.x, train.e]) / train.n.clamp_min(1) if bias else None
    held = held_out
    if bias:
        # judged with the training means as the bias, as the branch will be
        held = _shifted(held_out, means)  # type: ignore[arg-type]
        train = train.centred()
    values, vectors = torch.linalg.eigh(train.xx)
    values = values.clamp_min(0)
    rotated = vectors.T @ train.xe
    scale = values.mean()
    floor = 1e-12 * values[-1]

    def solve(
        fraction: float, directions: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """L = W V, V and the held-out relative error at each rank; V are all eigenvectors, or the leading few."""
        shifted = values + fraction * scale
        inverse = torch.where(shifted > floor, 1 / shifted, 0)
        half = inverse.sqrt()[:, None] * rotated
        gram = half.T @ half
        if directions is None:
            directions = torch.linalg.eigh(gram).eigenvectors.flip(-1)
        else:
            for _ in range(6):  # subspace iteration: enough to compare ridges by
                directions = torch.linalg.qr(gram @ directions).Q
            directions = directions @ torch.linalg.eigh(directions.T @ gram @ directions).eigenvectors.flip(-1)
        left = vectors @ (inverse[:, None] * (rotated @ directions))
        gains = 2 * (directions * (held.xe.T @ left)).sum(0) - (left * (held.xx @ left)).sum(0)
        return left, directions, torch.cat([held.ee[None], held.ee - gains.cumsum(0)]) / held.yy

    if ridge == "auto":
        few = min(len(values), rank + 8)
        start = train.xe.T @ torch.linalg.qr(train.xe[:, :few]).Q
        ridge = min(RIDGES, key=lambda fraction: float(solve(fraction, start)[2][rank]))
    left, directions, curve = solve(float(ridge))
    return Fit(left, directions.T.contiguous(), means, curve, float(ridge))


def _shifted(m: Moments, means: torch.Tensor) -> Moments:
    """Moments of x - mean_x and e - mean_e."""
    mx, me = means
    return Moments(
        m.n,
        m.x - m.n * mx,
        m.e - m.n * me,
        m.xx - torch.outer(m.x, mx) - torch.outer(mx, m.x) + m.n * torch.outer(mx, mx),
        m.xe - torch.outer(m.x, me) - torch.outer(mx, m.e) + m.n * torch.outer(mx, me),
        m.ee - 2 * m.e @ me + m.n * me @ me,
        m.yy,
    )


def new_moments(model: nn.Module) -> list[Moments]:
    """One accumulator for each applied layer."""
    return [Moments.zeros(w.view.hidden_size, w.view.device) for w in applied_ffns(model).values()]


def adding_to(model: nn.Module, moments: Sequence[Moments]) -> Observer:
    """Adds the tokens that every layer is shown to its moments."""
    slot = {wrapper: m for wrapper, m in zip(applied_ffns(model).values(), moments, strict=True)}

    def observe(wrapper: EfficientFFN, x: torch.Tensor, e: torch.Tensor, y: torch.Tensor) -> None:
        slot[wrapper].add(x, e, y)

    return observe


@torch.no_grad()
def accumulate(model: nn.Module, batches: Iterable[Batch], moments: Sequence[Moments]) -> None:
    """One dense pass over the samples; adds the completion tokens of every layer to its moments."""
    observe = adding_to(model, moments)
    for batch in batches:
        batch = batch.to(device_of(model))
        completion_hidden(model, batch, prefill(model, batch), observe)


def allocate_ranks(curves: Sequence[torch.Tensor], budget: int) -> list[int]:
    """Spend `budget` ranks over the layers where they take away the most error; every layer gets at least one.

    Args:
        curves: held-out relative error at rank 0, 1, ... for each layer (see `Fit.curve`).
    """
    ranks = [1] * len(curves)
    gains = [
        (float(gain), layer)
        for layer, curve in enumerate(curves)
        # never rising: a direction that does not help alone may not be bought for the sake of the next
        for gain in (curve[1:-1] - curve[2:]).cummin(0).values.clamp_min(0)
    ]
    for gain, layer in sorted(gains, key=lambda pair: -pair[0])[: max(0, budget - len(curves))]:
        if gain > 0:
            ranks[layer] += 1
    return ranks
