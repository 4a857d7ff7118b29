"""What runs in an FFN while it decodes: the step that the forms have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from caprese.efficient_methods import EfficientFFN, Method
from caprese.efficient_methods.memory import LayerMemory
from caprese.kernels import WholeFFN


def branch_of(recovery: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None:
    """What the slot adds now, x L R + bias, over all active adapters: (L' [r, D], R' [D, r], bias [D] or None)."""
    names = [n for n in getattr(recovery, "active_adapters", ()) if n in recovery.lora_A]
    if not names or recovery.disable_adapters:
        return None
    left = torch.cat([recovery.lora_A[n].weight for n in names])
    right = torch.cat([recovery.lora_B[n].weight * recovery.scaling[n] for n in names], dim=1)
    biases = [b * recovery.scaling[n] for n in names if (b := recovery.lora_B[n].bias) is not None]
    return left, right, sum(biases[1:], biases[0]) if biases else None


def _version(recovery: Any) -> tuple[tuple[Any, ...], list[torch.Tensor]]:
    """What changes whenever `branch_of` would, and the tensors it names, to be held so that their ids stay theirs."""
    names = getattr(recovery, "active_adapters", None)
    if names is None or recovery.disable_adapters:
        return (), []
    # of every token and layer: straight to what a ModuleDict holds, and a Linear
    halves = recovery.lora_A._modules, recovery.lora_B._modules
    layers = [half[name]._parameters for name in names for half in halves if name in half]
    tensors = [p for layer in layers for p in (layer["weight"], layer["bias"]) if p is not None]
    scaling = recovery.scaling
    # what is made in inference mode counts no changes
    facts = [(id(p), p.data_ptr(), 0 if p.is_inference() else p._version) for p in tensors]
    return (names, [scaling.get(n) for n in names], facts), tensors


class Step(nn.Module):
    """What a decode step of one FFN runs: x [B, 1, D] -> [B, 1, D].

    Subclasses say in `_fill` what they take from a choice, and in `forward` compute from that alone.

    Attributes:
        fills: how often it was filled.
        moves: how often the model was moved, or changed its type.
        undo: what takes off again what was put on the model for it.
        in_c: whether it runs in one call of compiled C.
    """

    def __init__(self, wrapper: EfficientFFN) -> None:
        super().__init__()
        self.wrapper = (wrapper,)  # in a tuple, so that it is no submodule
        self.act = wrapper.transformed.act
        self.source: Any = None  # the choices these tensors were filled from
        self.version: Any = None
        self.tensors: list[torch.Tensor] = []
        self.fills = self.moves = 0
        self.undo: list[Callable[[], None]] = []
        self.in_c = False

    def follow(self, memory: LayerMemory, batch: int) -> None:
        """Take over the choice of the cache that decodes now, and the adapter as it is now; cheap if nothing changed.

        Raises:
            CapreseError: see `LayerMemory.chosen`.
        """
        (wrapper,) = self.wrapper
        version, tensors = _version(wrapper.recovery)
        version = (wrapper.phases.compiled, *version)
        if self.source is memory.choices and self.version == version:
            return
        # what is made in inference mode could not be written outside of it
        with torch.inference_mode(False), torch.no_grad():
            choices = wrapper.choices(memory, batch)
            self._fill(list(zip(wrapper.methods, choices, strict=True)), branch_of(wrapper.recovery))
        self.source, self.version, self.tensors = memory.choices, version, tensors
        self.fills += 1

    def _fill(self, choices: list[tuple[Method, torch.Tensor | None]], branch: Any) -> None:
        raise NotImplementedError

    def _hold_branch(
        self,
        branch: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None,
        bias: torch.Tensor | None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """left [r, D] and right [r, D] of a branch, and its bias with that of down, in a type of its own."""
        left, right, extra = branch or (None, None, None)
        self._hold("left", left)
        self._hold("right", None if right is None else right.T.contiguous())
        self._hold("last_bias", extra if bias is None else bias + (0 if extra is None else extra), dtype)

    def _hold(self, name: str, value: torch.Tensor | None, dtype: torch.dtype | None = None) -> None:
        """Keep a tensor where the last one of its kind was, if it fits there; in the model's type or another."""
        if value is not None and value.is_floating_point() and not name.startswith("choice"):
            value = value.to(dtype or self.wrapper[0].view.dtype)
        held = getattr(self, name, None)
        if held is not None and value is not None and held.shape == value.shape and held.dtype == value.dtype:
            held.copy_(value)
        else:
            self.register_buffer(name, None if value is None else value.detach().clone(), persistent=False)

    def whole(self) -> WholeFFN | None:
        """What C is given of this FFN as it was last filled, where `in_c` holds; None where one call is not enough."""
        return None

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Step:
        """What a model that is moved, or changes its type, leaves behind is filled anew."""
        super()._apply(fn, recurse)
        self.source = None
        self.moves += 1
        return self

    def restore(self) -> None:
        """Put back what was moved in the model."""
        for each in self.undo:
            each()
        self.undo.clear()

    @property
    def nbytes(self) -> int:
        """Memory of its own."""
        return sum(b.nbytes for b in self.buffers())


def chosen_rows(choices: list[tuple[Method, torch.Tensor | None]]) -> torch.Tensor | None:
    """The choice by sequence, bool [S, 1, F], if a method makes one; two such do not compose."""
    return next((choice for m, choice in choices if m.acts_on == {"rows"}), None)
