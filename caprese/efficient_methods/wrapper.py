"""The module that stands in for an FFN, with the slot where a recovery adapter goes."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any, ClassVar

import torch
from torch import nn

from caprese.efficient_methods.base import Method
from caprese.efficient_methods.bases import check_linear
from caprese.efficient_methods.memory import LayerMemory, Seen
from caprese.efficient_methods.passes import NO_DENSE, Phases
from caprese.errors import CapreseError
from caprese.kernels import PackedFFN, sparse_down
from caprese.models import FFN, Site


class _NoWeight(torch.Tensor):
    """What a slot has for a weight: a device and a type and no elements. What needs more of it fails, and hears why."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            return super().__torch_function__(func, types, args, kwargs or {})
        except (RuntimeError, IndexError, ValueError) as error:
            if func is torch.Tensor.to:
                raise
            raise CapreseError(
                "a recovery slot has no weights to merge into or to start from, so merge_and_unload, DoRA, PiSSA, "
                "OLoRA and CorDA are not for it: use plain LoRA, and caprese.fuse(model) to run it as one with its "
                "FFN, or caprese export for one checkpoint"
            ) from error

    def __deepcopy__(self, memo: Any) -> torch.Tensor:
        return self.clone()


class RecoverySlot(nn.Linear):
    """A linear layer without weights that returns zeros: the place PEFT's LoRA fills, x [..., D] -> [..., D]."""

    def __init__(self, hidden: int, dtype: torch.dtype, device: torch.device) -> None:
        nn.Module.__init__(self)
        self.in_features = self.out_features = hidden
        # empty and never saved: it tells PEFT which device and type the branch should have
        weight = torch.empty(0, dtype=dtype, device=device).as_subclass(_NoWeight)
        self.register_buffer("weight", weight, persistent=False)
        self.register_parameter("bias", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x)


class EfficientFFN(nn.Module):
    """FF(x) on prompt tokens, FF_eff(x) + x L R on completion tokens (arXiv 2505.07861, section 3).

    Where prompts run as stored, FF is `transformed` for them.

    Mixed into the class of the model's own FFN module, so that every weight keeps its name, and adapters that others
    made find their places.

    Attributes:
        view: the dense FFN.
        methods: what acts on this layer's FFN, each with its own sparsity.
        fixed_NAME: choices made from samples, by method name.
        transformed: the FFN that completion tokens go through, before anything is dropped per sequence or token.
        recovery: the slot where an adapter goes.
        fused: runs generated tokens in place of `efficient` and the branch; see `caprese.fuse`.
    """

    site: Site
    view: FFN
    layer: int
    phases: Phases
    methods: list[Method]
    learners: list[Method]
    transformed: FFN | PackedFFN
    recovery: nn.Module
    fused: Any
    hooked: Any
    added: set[str]
    own_class: ClassVar[type[nn.Module]]

    @staticmethod
    def put_on(site: Site, methods: list[Method], fixed: dict[str, torch.Tensor], phases: Phases) -> EfficientFFN:
        """Make a layer's FFN module an efficient one; `take_off` undoes it."""
        transformed: FFN | PackedFFN = site.ffn
        for method in methods:
            transformed = method.transform(transformed, fixed.get(method.name))
        slot = RecoverySlot(site.ffn.hidden_size, site.ffn.dtype, site.ffn.device)
        self: Any = site.ffn.module
        before = _attributes(self)
        kind: Any = type(self)
        self.__class__ = _efficient(kind)
        self.site, self.view, self.layer = site, site.ffn, site.index
        self.phases, self.methods, self.transformed = phases, methods, transformed
        self.learners = [m for m in methods if "prompt" in m.learns]
        self.recovery = slot.train(self.training)
        for name, choice in fixed.items():
            self.register_buffer(f"fixed_{name}", choice, persistent=False)
        self.fused = None
        # accelerate sets `forward` on the module itself; the class's own is to be called
        self.hooked = vars(self).pop("forward", None)
        self.added = {"added", *_attributes(self)} - before
        site.gather()
        return self

    def take_off(self) -> None:
        """Undo `put_on`: the module is of its own class again and has nothing that it did not bring."""
        self.unfuse()
        self.site.scatter()
        hooked = self.hooked
        for name in self.added:
            delattr(self, name)
        self.__class__ = self.own_class  # type: ignore[assignment]
        if hooked is not None:
            vars(self)["forward"] = hooked

    def unfuse(self) -> None:
        if self.fused is not None:
            self.fused.restore()
        self.fused = None

    def __setattr__(self, name: str, value: Any) -> None:
        """Sees an adapter come to one of the FFN's linear layers."""
        view: FFN | None = vars(self).get("view")
        if view is not None and isinstance(value, nn.Module) and value is not self._modules.get(name):
            family = view.family
            part = next((p for p in ("gate", "up", "down") if getattr(family, p) == name), None)
            if part is not None:
                check_linear(self.layer, self.site.path(part), value, self.methods)
                self.unfuse()  # what was fused is of the layer before
        super().__setattr__(name, value)

    def dense(self, x: torch.Tensor) -> torch.Tensor:
        """FF(x), as the model's own module computes it.

        Raises:
            CapreseError: the dense weights were let go.
        """
        if self.phases.lean:
            raise CapreseError(NO_DENSE)
        y: torch.Tensor = super().forward(x) if self.hooked is None else self.hooked(x)
        return y

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.shape
        if self.phases.compiled and torch.compiler.is_compiling():
            return self.fused(x.reshape(-1, 1, flat[-1])).view(flat)
        current = self.phases.current
        if current is None:
            return self.dense(x)
        x = x.reshape(*current.shape, flat[-1])  # some families flatten the batch
        memory = current.memory.layer(self.layer)
        if self.fused is not None and current.prompt is None and current.shape[1] == 1 and self.can_decode_fused:
            self.fused.follow(memory, current.shape[0])
            return self.fused(x).view(flat)
        y: torch.Tensor | None = None
        acts = current.completion is not None and self.phases.acts_on(self.layer)
        if current.prompt is not None or not acts:
            y = self._dense(x, memory)
        if current.completion is None or not (acts or self.phases.observer is not None):
            assert y is not None
            return y.view(flat)
        if self.phases.observer is not None:
            assert y is not None
            x_seen, y_seen = x[current.completion], y[current.completion]
            self.phases.observer(self, x_seen, self._residual(x, y, memory)[current.completion], y_seen)
            return y.view(flat)
        efficient = self.efficient(x, memory)
        if type(self.recovery) is not RecoverySlot:
            efficient = efficient + self.recovery(x)
        return (efficient if y is None else torch.where(current.completion.unsqueeze(-1), efficient, y)).view(flat)

    @property
    def can_decode_fused(self) -> bool:
        """Not where gradients or an observer are wanted, nor where hooks are on the slot: by them PEFT mixes adapters
        within a batch."""
        hooked = self.recovery._forward_pre_hooks or self.recovery._forward_hooks
        return self.phases.acts_on(self.layer) and not torch.is_grad_enabled() and not hooked

    @property
    def rows(self) -> torch.Tensor | None:
        """The neurons a fixed choice left, [k]; None is all."""
        return next((getattr(self, f"fixed_{m.name}")[0] for m in self.methods if "width" in m.acts_on), None)

    def _dense(self, x: torch.Tensor, memory: LayerMemory) -> torch.Tensor:
        """FF(x), learning from the prompt tokens on the way."""
        current = self.phases.current
        assert current is not None
        stored = self.phases.stored_prompts and self.phases.acts_on(self.layer)
        learns = current.prompt is not None and bool(self.learners)
        if not learns and not stored:
            return self.dense(x)
        ffn = self.transformed if stored else self.view
        a, z = ffn.neurons(x)
        if not learns:
            return ffn.down(z)
        assert current.prompt is not None
        with torch.no_grad():
            whole = ffn is self.transformed or self.rows is None
            seen_a, seen_z = (a, z) if whole else (a[..., self.rows], z[..., self.rows])
            seen = Seen(current.offset, x.detach(), seen_a.detach(), seen_z.detach(), current.prompt)
            if current.verifies:
                memory.waiting.append(seen)
            else:
                memory.learn(self.learners, seen, current.tail)
        return ffn.down(z)

    def choices(self, memory: LayerMemory, batch: int) -> list[torch.Tensor | None]:
        """Of each method, for a batch of `batch` sequences."""
        known = [getattr(self, f"fixed_{m.name}", None) for m in self.methods]
        return [
            memory.chosen(m, self.transformed, batch, k) if "prompt" in m.learns else k
            for m, k in zip(self.methods, known, strict=True)
        ]

    def kept(
        self, x: torch.Tensor, ffn: FFN | PackedFFN, methods: list[tuple[Method, torch.Tensor | None]]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """z [B, T, F] of the efficient FFN, and which of it to keep."""
        gate, up = x, x
        for method, choice in methods:
            gate, up = method.inputs(gate, up, choice)
        a, z = ffn.neurons(gate, up)
        keep: torch.Tensor | None = None
        for method, choice in methods:
            mask = method.keep(a, z, choice)
            if mask is not None:
                keep = mask if keep is None else keep & mask
        return z, keep

    def efficient(self, x: torch.Tensor, memory: LayerMemory) -> torch.Tensor:
        """FF_eff(x), [B, T, D], without the branch."""
        methods = list(zip(self.methods, self.choices(memory, len(x)), strict=True))
        ffn = self.transformed
        if x.shape[1] == 1 and self.view.row_wise:
            rows = [choice for m, choice in methods if m.acts_on == {"rows"} and choice is not None]
            if rows and all(len(choice) == 1 for choice in rows):  # one choice for all that decode here
                if memory.packed is None:
                    index = torch.stack([choice.flatten() for choice in rows]).all(0).nonzero().squeeze(-1)
                    ffn = self.transformed
                    memory.packed = ffn.take(index) if isinstance(ffn, PackedFFN) else PackedFFN(ffn, index)
                ffn = memory.packed
                methods = [(m, choice) for m, choice in methods if m.acts_on != {"rows"}]
        return sparse_down(ffn, *self.kept(x, ffn, methods))

    def _residual(self, x: torch.Tensor, y: torch.Tensor, memory: LayerMemory) -> torch.Tensor:
        """FF(x) - FF_eff(x), [B, T, D]."""
        by_neuron = self.transformed is self.view and self.view.row_wise
        if by_neuron and not any("inputs" in m.acts_on for m in self.methods):
            # from the dropped neurons themselves, which keeps its precision in bfloat16
            z, keep = self.kept(x, self.view, list(zip(self.methods, self.choices(memory, len(x)), strict=True)))
            if keep is None:
                return torch.zeros_like(y)
            return nn.functional.linear(z.masked_fill(keep, 0), self.view.weights().down)
        return y - self.efficient(x, memory)


@functools.cache
def _efficient(kind: Hashable) -> type[EfficientFFN]:
    """The class of an FFN module of this kind, efficient."""
    assert isinstance(kind, type)
    return type(f"Efficient{kind.__name__}", (EfficientFFN, kind), {"__module__": __name__, "own_class": kind})


def _attributes(module: nn.Module) -> set[str]:
    return {*vars(module), *module._modules, *module._buffers}
