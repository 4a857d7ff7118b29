"""What a base must be for methods to act on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from caprese.efficient_methods.base import Method
from caprese.errors import CapreseError
from caprese.models import Site
from caprese.models.linear import offloaded, sizes, why_not_by_row


def check_layers(sites: Sequence[Site], methods: Mapping[int, Sequence[Method]]) -> None:
    """Refuse linear layers that methods cannot act on, before anything is changed.

    An ordinary Linear or Conv1D in memory is read by row where a method gains by it. One with an adapter on it, and a
    packed one, are called, and their neurons masked.

    Raises:
        CapreseError: naming the layer, what is wrong with it, and what to do.
    """
    for i, own in methods.items():
        site = sites[i]
        for part, linear in site.ffn.linears().items():
            check_linear(i, site.path(part), linear, own)
        if any(method.acts_on & {"attention", "projections", "mixer"} for method in own):
            readers = [method for method in own if "projections" in method.acts_on]
            for path, linear in zip(site.family.attention, site.attention_linears(), strict=True):
                check_linear(i, path, linear, readers)


def check_linear(layer: int, path: str, linear: Any, methods: Sequence[Method]) -> None:
    """Refuse one linear layer, `path` in its decoder layer, that `methods` cannot act on.

    Raises:
        CapreseError: see `check_layers`.
    """
    if offloaded(linear):
        raise CapreseError(
            f"layer {layer}: {path} is offloaded (device_map='auto' leaves weights on disk or in CPU memory where a "
            "GPU is too small), and methods need its weight in place: load the base on devices that hold it whole"
        )
    try:
        sizes(linear)
    except CapreseError as error:
        raise CapreseError(f"layer {layer}: {path}: {error}") from error
    reader = next((method for method in methods if method.reads_weights), None)
    if reader is not None and (reason := why_not_by_row(linear)):
        raise CapreseError(f"{reader.name} reads weights by row, and layer {layer}: {path} {reason}")
