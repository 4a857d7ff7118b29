"""What sits in an attention's place: the mixer, and the attention itself for the teacher."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import Cache
from transformers.cache_utils import StaticLayer

from caprese.efficient_methods.hooks import proposed
from caprese.efficient_methods.mamba.attend import Attend
from caprese.efficient_methods.mamba.mixer import Mixer, Rotation, Settings
from caprese.efficient_methods.mamba.state import KERNEL, MixerState
from caprese.efficient_methods.mamba.thaw import RATE, Thawed, copies_of, key_of, parts_of
from caprese.efficient_methods.stand_in import Acting, StandIn
from caprese.errors import CapreseError
from caprese.kernels.scan import CHUNK
from caprese.models import Site
from caprese.models.attention import Attention, read_attention
from caprese.models.linear import adapted_layers


class Replacement(StandIn):
    """Called as the attention is; runs the mixer, or the attention where the layer is not to act.

    Attributes:
        lost: what of the attention the mixer's start does not have.
        attend: what stays of the attention beside the mixer, if anything does.
        silent: whether that alone is run.
    """

    def __init__(self, site: Site, config: Any, phases: Acting, settings: Settings) -> None:
        super().__init__()
        self.attention = site.attention()
        self.layer, self.phases = site.index, phases
        self.config, self.settings = config, settings
        self.silent = False
        self.attend = self._staying()
        self.lost = self._read().lost
        self.mixer = self._fresh()
        self._parts = dict[str, nn.Module]()  # which it has not as modules of its own
        if settings.train == "all":
            self._parts = parts_of(site)
            self._keys = {
                name: {p: key_of(name, p) for p, _ in module.named_parameters(recurse=False)}
                for name, module in self._parts.items()
            }
            self.mixer.thawed = copies_of(self._parts)
        self._start: list[Mixer] = []  # and no module of it, which it would be by itself

    def put_on(self, site: Site) -> None:
        """Take the attention's place, and have the FFN and norms compute with what is trained of them, if it is."""
        setattr(site.layer, site.attention_name, self)
        for name, module in self._parts.items():
            Thawed.put_on(module, self, name)

    def take_off(self, layer: nn.Module, attention_name: str) -> None:
        """Undo `put_on`."""
        setattr(layer, attention_name, self.attention)
        for module in self._parts.values():
            assert isinstance(module, Thawed)
            module.take_off()

    def own(self, name: str) -> dict[str, torch.Tensor] | None:
        """What was trained of the FFN's layer or norm of this name."""
        thawed = self.mixer.thawed
        if thawed is None or self.silent or self.phases.dense or not self.phases.acts_on(self.layer):
            return None
        return {p: thawed[key] for p, key in self._keys[name].items()}

    @contextmanager
    def shown(self) -> Iterator[None]:
        with ExitStack() as stack:
            for name, module in self._parts.items():
                own = self.own(name)
                assert isinstance(module, Thawed) and own is not None
                stack.enter_context(module.shown(own))
            yield

    @property
    def reads(self) -> int:
        own = sum(p.numel() for name, p in self.mixer.named_parameters() if not name.startswith("thawed."))
        return own + (0 if self.attend is None else self.attend.reads)  # what is thawed stands for what is not read

    def rate_of(self, name: str) -> float:
        return RATE if name.startswith("thawed.") else 1.0

    @property
    def original(self) -> nn.Module:
        return self.attention

    @property
    def trained(self) -> nn.Module:
        return self.mixer

    def settle(self, dtype: torch.dtype) -> None:
        self.mixer.settle(dtype)

    @contextmanager
    def untrained(self) -> Iterator[None]:
        """Inside, what a student is compared with, since it is free: attention over a window and its sinks that take
        the memory of the mixer's state, and by the heads that stay. Where a window cannot be, the mixer as mapped from
        its attention, its size not matched either."""
        before = self.mixer, self.attend, self.silent
        free = self._free()
        if free is None:
            self.mixer = self.start()
            self.mixer.settle(before[0].in_proj.weight.dtype)
        else:
            self.attend, self.silent = free, True
        try:
            yield
        finally:
            self.mixer, self.attend, self.silent = before

    def start(self) -> Mixer:
        """The mixer as mapped from its attention, before its size was matched and anything trained; made once, since it
        takes seconds in a large model."""
        if not self._start:
            self._start.append(self._fresh())
        return self._start[0]

    def _free(self) -> Attend | None:
        """The window alone: the student's own, where it has one."""
        if self.attend is not None and self.settings.window is not None:
            return self.attend
        facts = read_attention(self.attention, self.config, rope=True)
        if facts.cap:
            return None
        mixer = self.mixer
        state = mixer.heads * mixer.size * mixer.width
        tokens = state // (2 * facts.groups * facts.head_dim)  # whose keys and values are as many numbers
        window = max(1, tokens - self.settings.sinks)
        free = Attend(self.attention, self.config, None, window, self.settings.sinks)
        if stay := self.settings.heads_of(self.layer):
            free.near = [head for head in range(facts.heads) if head not in stay]
        return free

    def _read(self) -> Attention:
        """Of the heads that the mixer takes over."""
        read = read_attention(self.attention, self.config, self.settings.rope)
        return taken_over(read, self.settings, self.layer)

    def _staying(self) -> Attend | None:
        stay, window = self.settings.heads_of(self.layer), self.settings.window
        if not stay and window is None:
            return None
        return Attend(self.attention, self.config, stay or None, window, self.settings.sinks)

    def _fresh(self) -> Mixer:
        names = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon")
        eps = next((found for name in names if (found := getattr(self.config, name, None))), 1e-6)
        made = Mixer(self._read(), eps, self.settings, self.layer)
        return made.requires_grad_(False).train(self.training)

    def checkpoint_settings(self, config: Any) -> dict[str, Any]:
        mixer = self.mixer
        if self.attend is not None:
            raise CapreseError("a GraniteMoeHybrid's layer is attention or a mixer, and these have some of both")
        if mixer.rotate is not None or mixer.norms is not None or not mixer.silu:
            raise CapreseError(
                "a GraniteMoeHybrid's mixers have no rope and no norms of queries and keys, and SiLU behind their "
                "convolution; for a checkpoint of transformers, recover with mamba:start=attention, or with "
                "rope=false:silu=true"
            )
        if mixer.inner % config.hidden_size:
            raise CapreseError(
                f"a GraniteMoeHybrid's mixers are a multiple of the hidden size {config.hidden_size} wide, and these "
                f"{mixer.inner}; not exported"
            )
        return {
            "mamba_n_heads": mixer.heads,
            "mamba_n_groups": mixer.heads,
            "mamba_d_head": mixer.size,
            "mamba_d_state": mixer.width,
            "mamba_d_conv": KERNEL,
            "mamba_expand": mixer.inner // config.hidden_size,
            "mamba_chunk_size": CHUNK,
            "mamba_conv_bias": True,
            "mamba_proj_bias": True,
        }

    def checkpoint_state(self) -> dict[str, torch.Tensor]:
        return {f"mamba.{name}": t for name, t in self.mixer.unshared().items()}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        if self.phases.dense or not self.phases.acts_on(self.layer):
            return self.attention(*args, **kwargs)
        if adapted_layers(self.attention):
            raise CapreseError(
                f"layer {self.layer}'s attention is replaced by a mixer, on which an adapter would do "
                "nothing: merge it into the base before the method is applied, or leave this layer out of it"
            )
        cache = next((v for v in (*kwargs.values(), *args) if isinstance(v, Cache)), None)
        state = None if cache is None else self._state(cache)
        return self.mix(x, self._valid(x), state, kwargs.get("position_embeddings")), None

    def mix(
        self,
        x: torch.Tensor,
        valid: torch.Tensor | None = None,
        state: MixerState | None = None,
        rotation: Rotation | None = None,
    ) -> torch.Tensor:
        """What is given in the attention's place, of x [B, T, D]; see `Mixer` and `Attend`."""
        stays = self.attend
        if stays is None:
            return self.mixer(x, valid, state, rotation)
        seen = None
        if state is not None:
            seen = state.seen = state.seen or stays.sight(x)
        given = stays(x, valid, seen, rotation)
        mixed = self.mixer(x, valid, state, rotation)  # also where it is silent: its state is read
        if seen is not None and state is not None and state.block is None:  # nothing may be taken back
            seen.let_go()
        if self.silent:
            return given + stays.bias
        return mixed + given * self._shown(x)

    def _shown(self, x: torch.Tensor) -> torch.Tensor | float:
        """Whether a text's window is seen, [B, 1, 1]: while mixers learn, of some it is not."""
        part = self.settings.window_dropout
        if not part or not torch.is_grad_enabled() or not self.mixer.out_proj.weight.requires_grad:
            return 1.0
        # drawn by what is seen, so that a run that was interrupted hides the same
        seed = int(x.detach().float().sum().view(torch.int32))
        shown = torch.rand(len(x), generator=torch.Generator().manual_seed(seed)) >= part
        return shown.to(x)[:, None, None]

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
        found.always = proposed(cache) is not None
        return found

    def __getattr__(self, name: str) -> Any:
        """What decoder layers ask of their attention beside calling it."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("attention"), name)


def taken_over(whole: Attention, settings: Settings, layer: int) -> Attention:
    """Of a layer's attention, the heads that a mixer takes over."""
    stay = settings.heads_of(layer)
    rest = [head for head in range(whole.heads) if head not in stay]
    return whole.of(rest) if stay or (settings.per_head and whole.groups != whole.heads) else whole


@contextmanager
def near(model: nn.Module, heads: Mapping[int, Collection[int]]) -> Iterator[None]:
    """Inside, all is attention, and these heads, by layer, see only what is in their window."""
    before = {at: (at.silent, at.attend.near) for at in replacements(model) if at.attend is not None}
    for at in before:
        assert at.attend is not None
        at.silent, at.attend.near = True, heads.get(at.layer, ())
    try:
        yield
    finally:
        for at, (silent, limited) in before.items():
            assert at.attend is not None
            at.silent, at.attend.near = silent, limited


def replacements(model: nn.Module) -> list[Replacement]:
    """The replaced attentions of a model, in layer order."""
    return [m for m in model.modules() if isinstance(m, Replacement)]
