"""The module that stands in for an attention layer: a Mamba-2 mixer started from the attention's own weights.

V -> x, K -> B, Q -> C, O -> out (arXiv 2408.15237, section 3): linear attention is the recurrence S += v k^T, y = S q,
and Mamba-2 adds to it a decay, a gate, a short convolution and a norm. Those start at random, as in Mamba-2, or
neutral: a gate that is open, a convolution that passes its input, and a decay that forgets half over the head's mean
attention distance (arXiv 2606.16429). What of the attention is not linear may stay: rope and the norms of queries and
keys, on C and B.

Key and value heads that query heads share stay shared: x and B are repeated after the convolution, so that a token
reads them once. Biases of q, k and v are the convolution's, and the projection has none: a pad, masked to 0, then stays
0 in every implementation. Parameters have the names and, by `unshared`, the shapes of transformers'
GraniteMoeHybridMambaLayer, which can hold exactly those without rope and with SiLU.
"""

from __future__ import annotations

import copy
import math
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from caprese.efficient_methods.mamba.state import KERNEL, MixerState
from caprese.kernels.replay import Tokens
from caprese.kernels.scan import convolve, mixing_matrix, scan
from caprese.models.attention import Attention

# dt from 1/1000 to 1/10, log-uniform, and A from 1 to 16, as in Mamba-2: heads remember from a token to a thousand
_DT, _A = (1e-3, 1e-1), (1.0, 16.0)
# how much smaller what moves a neutral gate and decay starts; tuned on nothing
_QUIET = 0.1
# where SiLU is 1
_OPEN = 1.2784645427610738

Rotation = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines of rope at each token, [B or 1, T, d], as transformers gives them to attentions."""


class Settings(Protocol):
    """As much of the method as a mixer looks at."""

    @property
    def start(self) -> str: ...
    @property
    def seed(self) -> int: ...
    @property
    def rope(self) -> bool: ...
    @property
    def silu(self) -> bool: ...
    @property
    def state(self) -> int: ...
    @property
    def per_head(self) -> bool: ...
    @property
    def train(self) -> str: ...
    @property
    def window(self) -> int | None: ...
    @property
    def sinks(self) -> int: ...
    @property
    def window_dropout(self) -> float: ...
    def heads_of(self, layer: int) -> list[int]: ...


class Mixer(nn.Module):
    """x [B, T, D] -> [B, T, D], causal, with a state of fixed size."""

    def __init__(self, attention: Attention, eps: float, settings: Settings, layer: int = 0) -> None:
        """
        Args:
            layer: its number, which with the seed decides what is random.
        """
        super().__init__()
        a = attention
        like = a.q
        self.silu, self.rotate, self.scaling = settings.silu, a.rotate, a.scaling
        self.heads, self.size, self.eps = a.heads, a.head_dim, eps
        self.width = settings.state * a.head_dim  # of B and C
        self.inner = a.heads * a.head_dim
        self.convolved = [a.groups * self.size, a.groups * self.width, a.heads * self.width]  # x, B and C
        self.repeats = a.heads // a.groups
        self.channels = sum(self.convolved)
        inner, hidden, channels = self.inner, like.shape[1], self.channels
        # float32 whatever the base is: Adam's small steps are lost in bfloat16. See `settle` for running it
        kind: dict[str, Any] = {"device": like.device, "dtype": torch.float32}
        # z, x, B, C, dt
        self.in_proj = nn.Linear(hidden, inner + channels + a.heads, bias=False, **kind)
        self.conv1d = nn.Conv1d(channels, channels, KERNEL, groups=channels, padding=KERNEL - 1, **kind)
        self.dt_bias = nn.Parameter(torch.empty(a.heads, device=like.device))
        self.A_log = nn.Parameter(torch.empty(a.heads, device=like.device))
        self.D = nn.Parameter(torch.ones(a.heads, device=like.device))
        self.norm = nn.Module()
        self.norm.weight = nn.Parameter(torch.ones(inner, **kind))
        self.out_proj = nn.Linear(inner, hidden, **kind)
        self.thawed: nn.ParameterDict | None = None  # what is trained beside it; see `thaw`
        self.norms: nn.ModuleList | None = None
        if a.norms is not None:
            self.norms = nn.ModuleList(copy.deepcopy(norm).float() for norm in a.norms)
        self.gate_bias: nn.Parameter | None = None
        if settings.start == "calibrated":
            self.gate_bias = nn.Parameter(torch.full((inner,), _OPEN, device=like.device))
        self._start(a, settings.seed * 1_000_003 + layer, settings.start)

    @torch.no_grad()
    def _start(self, a: Attention, seed: int, start: str) -> None:
        generator = torch.Generator().manual_seed(seed)

        def drawn(*shape: int) -> torch.Tensor:
            return torch.rand(*shape, generator=generator)

        dt = torch.exp(drawn(a.heads) * math.log(_DT[1] / _DT[0]) + math.log(_DT[0]))
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus of it is dt
        self.A_log.copy_(torch.log(_A[0] + (_A[1] - _A[0]) * drawn(a.heads)))
        weight, bias = self.in_proj.weight, self.conv1d.bias
        assert bias is not None
        bias.zero_()
        self.out_proj.bias.zero_()
        for p in (weight, self.conv1d.weight, self.out_proj.weight):
            p.copy_((2 * drawn(*p.shape) - 1) * p[0].numel() ** -0.5)
        if start == "random":
            return
        if start == "calibrated":
            weight[: self.inner] *= _QUIET
            weight[self.inner + self.channels :] *= _QUIET
            self.conv1d.weight.zero_()[..., -1] = 1
            self.A_log.zero_()
        scaling = 1.0 if self.norms is not None else a.scaling
        starts = (a.v, a.v_bias, 1.0), (a.k, a.k_bias, 1.0), (a.q, a.q_bias, scaling)
        places = torch.arange(self.channels).split(self.convolved)
        for (rows, extra, factor), own in zip(starts, places, strict=True):
            # of a state wider than its head, what is beyond stays random
            part = own.unflatten(0, (len(rows) // self.size, -1))[:, : self.size].flatten()
            weight[self.inner + part] = (factor * rows).to(weight)
            if extra is not None:
                bias[part] = factor * extra.to(bias) * self.conv1d.weight[part].sum((1, 2))
        self.out_proj.weight.copy_(a.out)
        if a.out_bias is not None:
            self.out_proj.bias.copy_(a.out_bias)

    @torch.no_grad()
    def forget(self, half_life: torch.Tensor) -> None:
        """Have each head forget half over so many tokens, [H], as long as nothing of the input moves its decay."""
        dt = math.log(2) / half_life.to(self.dt_bias) / self.A_log.exp()
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))

    def forward(
        self,
        x: torch.Tensor,
        valid: torch.Tensor | None = None,
        cache: MixerState | None = None,
        rotation: Rotation | None = None,
    ) -> torch.Tensor:
        """x [B, T, D]; tokens that are not `valid` [B, T] leave no trace, which is meant for pads before a text."""
        dtype = x.dtype
        window = None if cache is None else cache.last_inputs
        z, v, dt, a, b, c, mixed = self._project(x, valid, window, rotation)
        y = scan(v, dt, a, b, c)[0] if cache is None else cache.read(Tokens(v, dt, b), a, c, mixed)
        y = y + self.D[:, None] * v
        y = y * F.silu(z).unflatten(-1, (self.heads, self.size))
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return _in_its_type(self.out_proj, (self.norm.weight * y.flatten(-2)).to(dtype))

    def settle(self, dtype: torch.dtype) -> None:
        """When nothing is to be trained any more: the projections, nearly all of its weights, in the type of what they
        are multiplied by, so that it need not be made each time."""
        for part in (self.in_proj, self.out_proj, self.thawed):
            if part is not None:
                part.to(dtype)

    def matrix(
        self, x: torch.Tensor, valid: torch.Tensor | None = None, rotation: Rotation | None = None
    ) -> torch.Tensor:
        """What mixes the tokens of x [B, T, D], as attention's probabilities do: [B, H, T, T]."""
        _, _, dt, a, b, c, _ = self._project(x, valid, None, rotation)
        return mixing_matrix(dt, a, b, c) + self.D[:, None, None] * torch.eye(x.shape[1], device=x.device)

    def _project(
        self,
        x: torch.Tensor,
        valid: torch.Tensor | None,
        window: torch.Tensor | None,
        rotation: Rotation | None,
    ) -> Any:
        """z [B, T, H P], x, dt, A, B and C of the recurrence, and what the convolution saw, `window` and these tokens,
        [B, KERNEL - 1 + T, channels]."""
        projected = _in_its_type(self.in_proj, x).float()
        z, mixed, dt = projected.split([self.inner, self.channels, self.heads], dim=-1)
        if self.gate_bias is not None:
            z = z + self.gate_bias
        dt = F.softplus(dt + self.dt_bias)
        if valid is not None:
            mixed, dt = (t * valid.unsqueeze(-1).to(t.dtype) for t in (mixed, dt))
        if window is None:
            window = mixed.new_zeros(len(mixed), KERNEL - 1, self.channels)
        seen = torch.cat([window, mixed], 1)
        mixed = convolve(seen, self.conv1d.weight, self.conv1d.bias, self.silu)
        sizes = self.size, self.width, self.width
        v, b, c = (t.unflatten(-1, (-1, n)) for t, n in zip(mixed.split(self.convolved, -1), sizes, strict=True))
        b, c = self._as_keys_and_queries(b, c, rotation)
        if self.repeats > 1:
            v, b = (t.repeat_interleave(self.repeats, -2) for t in (v, b))
        return z, v, dt, -self.A_log.exp(), b, c, seen

    def _as_keys_and_queries(
        self, b: torch.Tensor, c: torch.Tensor, rotation: Rotation | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """B and C normed and rotated, in the part of them that attention's weights are in."""
        (b, *more), (c, *others) = (t.split(self.size, -1) for t in (b, c))
        if self.norms is not None:
            c, b = (normed(norm, t) for norm, t in zip(self.norms, (c, b), strict=True))
            c = self.scaling * c
        if self.rotate is not None and rotation is not None:
            c, b = self.rotate(c, b, *rotation, unsqueeze_dim=2)
        return (torch.cat([b, *more], -1), torch.cat([c, *others], -1)) if more else (b, c)

    def unshared(self) -> dict[str, torch.Tensor]:
        """The parameters of the same mixer without shared heads, as GraniteMoeHybridMambaLayer has them."""

        def by_head(t: torch.Tensor, size: int) -> torch.Tensor:
            return t.unflatten(0, (-1, size)).repeat_interleave(self.repeats, 0).flatten(0, 1)

        made = {name: p.detach() for name, p in self.named_parameters() if not name.startswith("thawed.")}
        for name, sizes, first in (
            ("in_proj", [self.inner, *self.convolved, self.heads], 1),
            ("conv1d", self.convolved, 0),
        ):
            for part in ("weight", "bias"):
                if f"{name}.{part}" in made:
                    pieces = list(made[f"{name}.{part}"].split(sizes))
                    pieces[first : first + 2] = map(by_head, pieces[first : first + 2], (self.size, self.width))
                    made[f"{name}.{part}"] = torch.cat(pieces)
        rows = made["in_proj.weight"]
        bias = rows.new_zeros(len(rows))  # one setting has it with that of out_proj
        if (gate := made.pop("gate_bias", None)) is not None:
            bias[: self.inner] = gate
        return {**made, "in_proj.bias": bias}


def normed(norm: nn.Module, t: torch.Tensor) -> torch.Tensor:
    """A norm of queries or keys [B, T, heads, d], by head or of all of them at once as its weights are."""
    weight = norm.get_parameter("weight")
    return norm(t) if weight.numel() == t.shape[-1] else norm(t.flatten(-2)).unflatten(-1, t.shape[-2:])


def _in_its_type(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """A linear layer computed in x's type, whatever its weights are kept in."""
    return F.linear(x, linear.weight.to(x.dtype), None if linear.bias is None else linear.bias.to(x.dtype))
