"""What methods that choose from samples learn, in one dense pass over them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from caprese.efficient_methods.apply import applied_ffns, attention_hooks, methods_by_layer
from caprese.efficient_methods.base import Method
from caprese.efficient_methods.bases import check_layers
from caprese.efficient_methods.compose import compose
from caprese.efficient_methods.memory import PromptMemory
from caprese.efficient_methods.passes import Pass, Phases
from caprese.efficient_methods.tokens import Tokens
from caprese.efficient_methods.wrapper import EfficientFFN
from caprese.errors import CapreseError
from caprese.models import Site, device_of, find_ffns, unwrap
from caprese.models.linear import sizes

# Tokens on which a method may look at a layer's output again and again.
BLOCK_TOKENS = 512


def needs_calibration(methods: Method | Sequence[Method]) -> bool:
    """Whether any of the methods learns from samples."""
    return any("samples" in method.learns for method in compose(methods))


@torch.no_grad()
def calibrate(
    model: nn.Module,
    methods: Method | Sequence[Method],
    rows: Iterable[Tokens],
    advance: Callable[[int], None] | None = None,
) -> dict[str, torch.Tensor]:
    """The choices of every method that learns from samples, by "method.layer"; what `apply` takes.

    Statistics are summed over the completion tokens, which is where the methods will act. A method's statistic is of
    the neurons that the methods before it leave.

    Args:
        model: dense.
        rows: statistics are of all; what looks at a layer's output again and again (greedy TEAL) looks at the first.

    Raises:
        CapreseError: an unsupported model, linear layers that a method cannot act on (see `bases.check_layers`), a
            method already applied, methods that do not compose, or rows that are no Tokens or without a
            completion token.
    """
    chosen = compose(methods)
    if applied_ffns(model):
        raise CapreseError("a method is applied to this model, and samples are read dense; caprese.remove(model) first")
    sites = find_ffns(model)
    layers = methods_by_layer(chosen, len(sites))
    check_layers(sites, layers)
    batches = list(rows)
    if not all(isinstance(batch, Tokens) for batch in batches):
        raise CapreseError("calibrate takes a list of caprese.Tokens(ids, prompt_lengths)")
    useful = [batch for batch in batches if batch.completion().any()]
    result: dict[str, torch.Tensor] = {}
    learners = [m for m in chosen if "samples" in m.learns]
    for method in learners:
        if not useful:
            raise CapreseError(f"{method.name} has no completion token to learn from; give samples with completions")
        sums: dict[int, torch.Tensor] = {}
        wanted = {i: own for i, own in layers.items() if any(m.name == method.name for m in own)}
        fits = type(method).fit is not Method.fit
        attention = bool(method.acts_on & {"attention", "projections"})
        capture: _Capture | None = None
        for batch in batches:
            with _Capture(model, [sites[i] for i in wanted], attention) as seen:
                unwrap(model).get_decoder()(**batch.inputs(device_of(model)), use_cache=False)
            mask = batch.completion().to(device_of(model))
            for i, own in wanted.items():
                x = seen.ffn[i].view(*mask.shape, -1)
                narrowing = _narrowing(own, i, result)
                left = slice(None) if narrowing is None else narrowing[1][0]
                a, z = sites[i].ffn.neurons(x)
                one = next(m for m in own if m.name == method.name)
                with torch.autocast(x.device.type, enabled=False):  # it would round sums over tokens
                    new = one.statistic(x, a[..., left], z[..., left], mask)
                    if attention:
                        new = torch.cat([new, one.attention_statistic(seen.attention[i], mask)], -1)
                    new = new.sum(0, keepdim=True)
                sums[i] = sums[i] + new if i in sums else new
            if fits and batch is useful[0]:
                capture = seen
            if advance is not None:
                advance(1)
        for i, own in wanted.items():
            one = next(m for m in own if m.name == method.name)
            narrowing = _narrowing(own, i, result)
            ffn = sites[i].ffn if narrowing is None else narrowing[0].transform(sites[i].ffn, narrowing[1])
            if fits:
                assert capture is not None
                block = _OnBlock(sites[i], one, capture, useful[0].completion().to(sums[i].device))
                result[f"{method.name}.{i}"] = one.fit(sums[i], ffn, block)
                block.close()
            else:
                result[f"{method.name}.{i}"] = one.calibrated(sums[i], ffn)
    return {name: tensor.cpu() for name, tensor in result.items()}


def _narrowing(own: list[Method], layer: int, known: dict[str, torch.Tensor]) -> tuple[Method, torch.Tensor] | None:
    """The method that narrows an FFN before others choose in it, and its choice."""
    for method in own:
        choice = known.get(f"{method.name}.{layer}")
        if "width" in method.acts_on and choice is not None:
            return method, choice
    return None


class _Capture:
    """What the FFNs, the attention's linear layers and the decoder layers are called with in one pass."""

    def __init__(self, model: nn.Module, sites: list[Site], attention: bool) -> None:
        self.ffn: dict[int, torch.Tensor] = {}
        self.attention: dict[int, list[torch.Tensor]] = {}
        self.layer: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self.sites, self.wants_attention = sites, attention
        self.handles: list[Any] = []

    def __enter__(self) -> _Capture:
        for site in self.sites:
            self.handles.append(site.layer.register_forward_pre_hook(self._layer(site.index), with_kwargs=True))
            entry = getattr(site.layer, site.entry)
            self.handles.append(entry.register_forward_pre_hook(self._ffn(site.index)))
            linears = site.attention_linears() if self.wants_attention else []
            self.attention[site.index] = [torch.empty(0)] * len(linears)
            for number, linear in enumerate(linears):
                self.handles.append(linear.register_forward_pre_hook(self._attention(site.index, number)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _layer(self, index: int) -> Callable[..., None]:
        return lambda _, args, kwargs: self.layer.__setitem__(index, (args, kwargs))

    def _ffn(self, index: int) -> Callable[..., None]:
        return lambda _, args: self.ffn.__setitem__(index, args[0])

    def _attention(self, index: int, number: int) -> Callable[..., None]:
        return lambda _, args: self.attention[index].__setitem__(number, args[0])


class _OnBlock:
    """`base.Block`: one decoder layer, run again on what it was called with."""

    def __init__(self, site: Site, method: Method, seen: _Capture, completion: torch.Tensor) -> None:
        self.site, self.completion = site, completion
        self.args, self.kwargs = seen.layer[site.index]
        rows = max(1, BLOCK_TOKENS // completion.shape[1])
        self.args, self.kwargs = _rows(self.args, rows), {k: _rows(v, rows) for k, v in self.kwargs.items()}
        self.completion = completion[:rows]
        self.sizes = [math.prod(sizes(linear)) for linear in site.attention_linears()]
        self.dense = self._output()
        self.scale = float(self.dense.square().sum())
        self.phases = Phases((method,), {})
        self.wrapper: EfficientFFN | None = None
        self.method = method
        self.undo: list[Callable[[], None]] = []

    def _output(self) -> torch.Tensor:
        y = self.site.layer(*self.args, **self.kwargs)
        return (y[0] if isinstance(y, tuple) else y)[self.completion].double()

    def error(self, choice: torch.Tensor) -> float:
        if self.wrapper is None:
            self.wrapper = EfficientFFN.put_on(self.site, [self.method], {self.method.name: choice}, self.phases)
            self.undo = [*attention_hooks(self.site, self.wrapper), self.wrapper.take_off]
        setattr(self.wrapper, f"fixed_{self.method.name}", choice)
        batch, length = self.completion.shape
        with self.phases.within(Pass(~self.completion, self.completion, PromptMemory({}), (batch, length))):
            return float((self._output() - self.dense).square().sum()) / max(self.scale, 1e-30)

    def close(self) -> None:
        for undo in self.undo:
            undo()


def _rows(value: Any, rows: int) -> Any:
    """The first `rows` sequences of whatever a layer is called with."""
    if isinstance(value, torch.Tensor):
        return value[:rows] if value.dim() > 1 and len(value) > 1 else value
    if isinstance(value, tuple):
        return tuple(_rows(v, rows) for v in value)
    return value
