"""What sits in an attention's place: the mixer, and the attention itself for the teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import Cache
from transformers.cache_utils import StaticLayer

from caprese.efficient_methods.mamba.method import Mamba
from caprese.efficient_methods.mamba.mixer import Mixer, MixerState
from caprese.errors import CapreseError
from caprese.models import Site, unwrap
from caprese.models.attention import read_attention

if TYPE_CHECKING:
    from caprese.efficient_methods.passes import Phases

#: called with (replacement, x [B, T, D], out [B, T, D], probabilities [B, H, T, T] if it gives them) by every replaced
#: attention in a dense pass
MixerObserver = Callable[["Replacement", torch.Tensor, torch.Tensor, torch.Tensor | None], None]


class Replacement(nn.Module):
    """Called as the attention is; runs the mixer, or the attention where the layer is not to act.

    Attributes:
        lost: what of the attention the mixer's start does not have.
        observer: see `observing_mixers`.
    """

    def __init__(self, site: Site, config: Any, method: Mamba, phases: Phases) -> None:
        super().__init__()
        self.attention = site.attention()
        self.layer, self.phases = site.index, phases
        self.config, self.method = config, method
        self.observer: MixerObserver | None = None
        self.lost = read_attention(self.attention, config).lost
        self.mixer = self._fresh()
        self._start: list[Mixer] = []  # and no module of it, which it would be by itself

    def start(self) -> Mixer:
        """The mixer as mapped from its attention, before its size was matched and anything trained; made once, since it
        takes seconds in a large model."""
        if not self._start:
            self._start.append(self._fresh())
        return self._start[0]

    def _fresh(self) -> Mixer:
        names = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon")
        eps = next((found for name in names if (found := getattr(self.config, name, None))), 1e-6)
        seed = self.method.seed * 1_000_003 + self.layer
        made = Mixer(read_attention(self.attention, self.config), eps, seed, self.method.start)
        return made.requires_grad_(False).train(self.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        if self.phases.dense or not self.phases.acts_on(self.layer):
            out = self.attention(*args, **kwargs)
            if self.observer is not None:
                self.observer(self, x, *out[:2])
            return out
        cache = next((v for v in (*kwargs.values(), *args) if isinstance(v, Cache)), None)
        state = None if cache is None else self._state(cache)
        return self.mixer(x, self._valid(x), state), None

    def _valid(self, x: torch.Tensor) -> torch.Tensor | None:
        current = self.phases.current
        if current is None or (x.shape[1] == 1 and current.prompt is None):
            return None
        parts = [part for part in (current.prompt, current.completion) if part is not None]
        return parts[0] if len(parts) == 1 else parts[0] | parts[1]

    def _state(self, cache: Cache) -> MixerState:
        layers: list[Any] = cache.layers
        while len(layers) <= self.layer:
            layers.append(cache.layer_class_to_replicate())  # type: ignore[misc]
        found = layers[self.layer]
        if not isinstance(found, MixerState):
            if isinstance(found, StaticLayer):
                raise CapreseError("a hybrid does not run with a static cache yet; leave out cache_implementation")
            if found.get_seq_length():
                raise CapreseError("this KV cache was filled by the dense model; a hybrid starts with an empty one")
            layers[self.layer] = found = MixerState()
        return found

    def __getattr__(self, name: str) -> Any:
        """What decoder layers ask of their attention beside calling it."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("attention"), name)


def replacements(model: nn.Module) -> list[Replacement]:
    """The replaced attentions of a model, in layer order."""
    return [m for m in model.modules() if isinstance(m, Replacement)]


@contextmanager
def observing_mixers(model: nn.Module, observer: MixerObserver) -> Iterator[None]:
    """Inside, `observer` is shown what each replaced attention sees and gives in dense passes."""
    for at in replacements(model):
        at.observer = observer
    try:
        yield
    finally:
        for at in replacements(model):
            at.observer = None


def settle_mixers(model: nn.Module) -> None:
    """Mixers as they run beside a base of 16 bit (see `Mixer.settle`); nothing changes beside one of 32."""
    for at in replacements(model):
        at.mixer.settle(unwrap(model).dtype)


@contextmanager
def mixers_at_start(model: nn.Module) -> Iterator[None]:
    """Inside, the mixers are as mapped from their attention: nothing trained, and their size not matched either."""
    trained = {at: at.mixer for at in replacements(model)}
    try:
        for at, mixer in trained.items():
            at.mixer = at.start()
            at.mixer.settle(mixer.in_proj.weight.dtype)
        yield
    finally:
        for at, mixer in trained.items():
            at.mixer = mixer
