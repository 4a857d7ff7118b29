"""q8 and q4: weights in 8 or 4 bits by row, so that neurons can still be chosen among them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, ClassVar, Literal, Self, cast

import torch
from pydantic import model_validator
from torch import nn

from caprese.efficient_methods.base import Method, Part, Reads, Source
from caprese.efficient_methods.hooks import mixed
from caprese.efficient_methods.passes import NO_DENSE
from caprese.efficient_methods.stand_in import Acting
from caprese.errors import CapreseError
from caprese.kernels import GROUP, PackedFFN, QuantizedFFN, QuantizedRows, products, quantize
from caprese.models import FFN, Site
from caprese.models.linear import linear_weights

_PARTS: dict[str, frozenset[Part]] = {
    "ffn": frozenset({"weights"}),
    "attention": frozenset({"projections"}),
    "all": frozenset({"weights", "projections"}),
    "none": frozenset(),
}


class _Rounded(Method):
    parts: ClassVar[frozenset[Part]] = frozenset({"weights", "projections", "head"})
    bits: ClassVar[int]
    stored: ClassVar[float]
    """Bits of a weight, scales and all."""

    where: Literal["ffn", "attention", "all", "none"] = "all"
    """Which linear layers of a decoder layer; none leaves the head."""
    head: bool = False
    """The language model head too, and the embedding where the two are one."""

    @model_validator(mode="after")
    def _something(self) -> Self:
        if self.where == "none" and not self.head:
            raise ValueError(f"{self.name}: where=none leaves nothing to store in few bits; add head=true")
        return self

    @property
    def acts_on(self) -> frozenset[Part]:
        return _PARTS[self.where] | (frozenset({"head"}) if self.head else frozenset())

    @property
    def reads_weights(self) -> bool:
        return True

    @property
    def _another(self) -> str:
        return f"this calibration of {self.name} was made for another model; calibrate again with this one"

    def store(self, weight: torch.Tensor, importance: torch.Tensor | None = None) -> QuantizedRows:
        """A weight [R, C] in few bits; importance [C], see `quantize`.

        Raises:
            CapreseError: 4 bits of columns that are no multiple of 32, or a weight that is not finite.
        """
        if not torch.isfinite(weight).all():
            raise CapreseError(f"{self.name}: a weight is NaN or infinite; download the base model again")
        if self.bits == 4 and weight.shape[1] % GROUP:
            raise CapreseError(
                f"{self.name} stores weights in groups of {GROUP} columns, and one here has {weight.shape[1]}; use q8"
            )
        if importance is not None:  # a channel that samples never use still counts a little: other texts may
            importance = importance.clamp_min(1e-3 * importance.mean().clamp_min(torch.finfo(importance.dtype).tiny))
        return quantize(weight, self.bits, importance)

    def transform(self, ffn: FFN | PackedFFN, choice: torch.Tensor | None) -> FFN | PackedFFN:
        if "weights" not in self.acts_on:
            return ffn
        if choice is None:
            return QuantizedFFN(ffn, self.store)
        if choice.numel() < ffn.hidden_size or (self.where == "ffn" and choice.numel() > ffn.hidden_size):
            raise CapreseError(self._another)
        return QuantizedFFN(ffn, self.store, choice.flatten()[: ffn.hidden_size])

    def install(
        self, site: Site, config: Any, phases: Acting, choice: torch.Tensor | None = None
    ) -> Callable[[], None]:
        if "projections" not in self.acts_on:
            return lambda: None
        linears = site.attention_linears()
        weights = [linear_weights(at)[0] for at in linears]
        importance: Sequence[torch.Tensor | None] = [None] * len(weights)
        if choice is not None:
            sizes = [weight.shape[1] for weight in weights]
            if choice.numel() != sum(sizes) + (site.ffn.hidden_size if "weights" in self.acts_on else 0):
                raise CapreseError(self._another)
            importance = choice.flatten()[-sum(sizes) :].split(sizes)
        stored = [self.store(*each) for each in zip(weights, importance, strict=True)]
        undo = [_Linear.put_on(at, one, phases, site.index) for at, one in zip(linears, stored, strict=True)]
        return functools.partial(_all, undo)

    def install_head(self, model: Any, phases: Acting) -> Callable[[], None]:
        if not self.head:
            return lambda: None
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        rounded = self.store(linear_weights(head)[0])
        undo = [_Head.put_on(head, rounded, phases, None)]
        if embedding.weight is head.weight:
            undo.append(_Embedding.put_on(embedding, rounded, phases, None))
        return functools.partial(_all, undo)

    def reads(self, reads: Reads) -> Reads:
        return reads.times(self.stored / 16) if "weights" in self.acts_on else reads

    @property
    def attention_density(self) -> float:
        return self.stored / 16 if "projections" in self.acts_on else 1.0

    @property
    def head_density(self) -> float:
        return self.stored / 16 if self.head else 1.0


class Q8(_Rounded):
    """Linear weights as symmetric 8-bit integers with a scale a row; down with one a neuron."""

    name: ClassVar[str] = "q8"
    summary: ClassVar[str] = "linear weights in 8 bits by row, of which neurons can be chosen"
    bits: ClassVar[int] = 8
    stored: ClassVar[float] = 8.0


class Q4(_Rounded):
    """Linear weights as 4-bit integers in groups of 32 with a scale each, that of the least squared error."""

    name: ClassVar[str] = "q4"
    summary: ClassVar[str] = "linear weights in 4 bits by groups of 32, of which neurons can be chosen"
    bits: ClassVar[int] = 4
    stored: ClassVar[float] = 4.5  # 4 and a bfloat16 scale for 32 weights

    scales: Literal["plain", "calibrated"] = "plain"
    """calibrated: an error counts by its input channel's mean square on calibration samples, as in llama.cpp's
    importance matrix; of down, whose groups lie along its outputs, and of the head all count the same."""

    @property
    def learns(self) -> frozenset[Source]:
        by_input = self.acts_on & {"weights", "projections"}
        return frozenset({"samples"} if self.scales == "calibrated" and by_input else ())

    def statistic(self, x: torch.Tensor, a: torch.Tensor, z: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Sum of x^2 over tokens, [B, D]; nothing where FFNs keep their bits."""
        return _squares(x, mask) if "weights" in self.acts_on else x.new_zeros(len(x), 0)

    def attention_statistic(self, inputs: list[torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
        return torch.cat([_squares(x.flatten(2), mask) for x in inputs], -1)

    def calibrated(self, statistic: torch.Tensor, ffn: FFN | PackedFFN) -> torch.Tensor:
        return statistic / statistic.mean().clamp_min(torch.finfo(statistic.dtype).tiny)


def _squares(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * mask[..., None]).square().sum(1)


def _all(undo: list[Callable[[], None]]) -> None:
    for each in undo:
        each()


class RoundedModule(nn.Module):
    """Mixed into the class of a module with a weight, so that names stay: generated tokens go through few bits of it.

    Attributes:
        rounded: the weight [out, in].
        layer: the decoder layer's number; None outside of them.
    """

    rounded: QuantizedRows
    phases: Any
    layer: int | None
    inner: ClassVar[int] = 1
    """Dimensions of what it sees of one token."""

    @classmethod
    def put_on(cls, module: Any, rounded: QuantizedRows, phases: Any, layer: int | None) -> Callable[[], None]:
        """Make a module a rounded one; returns the undoing."""
        before = type(module)
        module.__class__ = mixed(cast(Hashable, cls), cast(Hashable, before))
        module.rounded, module.phases, module.layer = rounded, phases, layer

        def undo() -> None:
            for name in ("rounded", "phases", "layer"):
                delattr(module, name)
            module.__class__ = before

        return undo

    def few_bits(self, x: torch.Tensor) -> torch.Tensor:
        """What the module computes of x with the rounded weight."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        phases = self.phases
        if phases.compiled and torch.compiler.is_compiling():
            return self.few_bits(x)
        current = self.running()
        acts = phases.observer is None if self.layer is None else phases.acts_on(self.layer)
        if current is None or not acts or (current.completion is None and not phases.stored_prompts):
            return self.as_it_was(x)
        y = self.few_bits(x)
        if current.prompt is None or phases.stored_prompts:
            return y
        assert current.completion is not None
        dense, batch = self.as_it_was(x), current.shape[0]
        y, dense = y.view(batch, -1, y.shape[-1]), dense.view(batch, -1, y.shape[-1])
        # the head may be asked for the last tokens alone
        return torch.where(current.completion[:, -y.shape[1] :, None], y, dense).view(
            *x.shape[: x.dim() - self.inner], -1
        )

    def running(self) -> Any:
        """The pass that it takes part in (`passes.Pass`)."""
        return self.phases.current

    def as_it_was(self, x: torch.Tensor) -> torch.Tensor:
        """What the module computes itself.

        Raises:
            CapreseError: its weight was let go.
        """
        if self.phases.lean:
            raise CapreseError(NO_DENSE)
        y: torch.Tensor = super().forward(x)
        return y


class _Linear(RoundedModule):
    def few_bits(self, x: torch.Tensor) -> torch.Tensor:
        y = products(x.flatten(0, -2), self.rounded)
        bias: Any = self.bias
        return (y if bias is None else y + bias).view(*x.shape[:-1], -1)


class _Head(_Linear):
    """It comes after the decoder, and so after its pass."""

    def running(self) -> Any:
        return self.phases.ended


class _Embedding(RoundedModule):
    """An embedding that is also the head."""

    inner: ClassVar[int] = 0

    def few_bits(self, x: torch.Tensor) -> torch.Tensor:
        weight: Any = self.weight
        scale = getattr(self, "embed_scale", 1.0)  # Gemma's
        y = self.rounded.wide(weight.dtype, x.flatten()).view(*x.shape, -1)
        return y if scale == 1.0 else y * scale
