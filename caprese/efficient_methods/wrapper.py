"""The module that stands in for an FFN, with the slot where a recovery adapter goes."""

from __future__ import annotations

import torch
from torch import nn

from caprese.efficient_methods.base import Method
from caprese.efficient_methods.phases import LayerState, Phases
from caprese.kernels import pack, packed_ffn, sparse_ffn
from caprese.models import GatedFFN


def _float(like: torch.Tensor) -> torch.dtype:
    """The type of a weight, or float32 where it is packed integers."""
    return like.dtype if like.is_floating_point() else torch.float32


class RecoverySlot(nn.Linear):
    """A linear layer without weights that returns zeros: the place PEFT's LoRA fills, x [..., D] -> [..., D]."""

    def __init__(self, hidden: int, like: torch.Tensor) -> None:
        nn.Module.__init__(self)
        self.in_features = self.out_features = hidden
        # empty and never saved: it tells PEFT which device and type the branch should have
        self.register_buffer("weight", like.new_empty(0, dtype=_float(like)), persistent=False)
        self.register_parameter("bias", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x)


class EfficientFFN(nn.Module):
    """FF(x) on prompt tokens, FF_eff(x) + x L R on completion tokens (arXiv 2505.07861, section 3)."""

    def __init__(self, view: GatedFFN, method: Method, phases: Phases, layer: int) -> None:
        super().__init__()
        self.ffn = view.module
        self.recovery = RecoverySlot(view.hidden_size, view.down.weight)
        self.view = view
        self.method = method
        self.phases = phases
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        current = self.phases.current
        if current is None:
            return self.ffn(x)
        state = current.state.layer(self.layer)
        if current.prompt is None and self.phases.prompt_lengths is None:
            return self._decode(x, state)
        a, z = self.view.neurons(x)
        if current.prompt is not None:
            with torch.no_grad():
                state.learn(self.method.statistic(a, z, current.prompt))
        if current.completion is None:
            return self.view.down(z)
        keep = self.method.keep(a, z, state.chosen(self.method, self.view.width, len(x)))
        completion = current.completion.unsqueeze(-1)
        if self.phases.observer is not None:
            dropped = z.masked_fill(keep, 0)[current.completion]
            residual = nn.functional.linear(dropped, self.view.down.weight)
            y = self.view.down(z)
            self.phases.observer(self, x[current.completion], residual, y[current.completion])
            return y
        return sparse_ffn(self.view, z, keep | ~completion) + self.recovery(x) * completion

    def _decode(self, x: torch.Tensor, state: LayerState) -> torch.Tensor:
        choice = state.chosen(self.method, self.view.width, len(x))
        if len(x) == 1 and not self.method.per_token:
            if state.packed is None:
                state.packed = pack(self.view, choice.flatten().nonzero().squeeze(-1))
            y = packed_ffn(x, state.packed, self.view.act)
        else:
            a, z = self.view.neurons(x)
            y = sparse_ffn(self.view, z, self.method.keep(a, z, choice))
        return y if type(self.recovery) is RecoverySlot else y + self.recovery(x)
