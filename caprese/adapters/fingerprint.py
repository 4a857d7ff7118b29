"""Which weights a base has, whatever it is called and whatever type it was loaded in."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from caprese.efficient_methods import applied_ffns
from caprese.efficient_methods.passes import NO_DENSE
from caprese.errors import CapreseError
from caprese.models import base_parameters, unwrap
from caprese.models.residency import residency_of, whole

_SAMPLE = 1 << 16
# on a base that is sharded or streamed
_KNOWN = "caprese_fingerprint"
# the smallest normal float16
_SMALLEST = 2.0**-14


def fingerprint(model: nn.Module) -> dict[str, str]:
    """A digest for each group of base parameters: {"ffn", "attention", "rest"}.

    Evenly spaced values of every tensor (65,536 to 131,071, all of a smaller one) are hashed after rounding to bfloat16
    and dropping what float16 cannot hold, so the same bfloat16 checkpoint agrees whether loaded in float32, bfloat16 or
    float16, while a fine-tuned copy does not. Groups stand apart so that a base whose FFNs were quantised can still be
    known by the rest.

    Raises:
        CapreseError: a sampled weight is NaN or infinite, or a weight is not in memory, or was let go.
    """
    if any(wrapper.phases.lean for wrapper in applied_ffns(model).values()):
        raise CapreseError(NO_DENSE)
    apart = None if residency_of(model) == "whole" else vars(unwrap(model))
    if apart is not None and _KNOWN in apart:  # nobody trains it, and all processes would have to read it together
        return dict(apart[_KNOWN])
    found = Fingerprint()
    for name, group, parameter in base_parameters(model):
        found.add(name, group, whole(model, name, parameter))
    digests = found.digests()
    if apart is not None:
        apart[_KNOWN] = digests
    return dict(digests)


class Fingerprint:
    """`fingerprint`, of parameters that pass one by one, in any order."""

    def __init__(self) -> None:
        self._rows: list[tuple[str, str, bytes]] = []

    def add(self, name: str, group: str, parameter: torch.Tensor) -> None:
        """One parameter, by its name in the bare model; one that is shared is to be added once.

        Raises:
            CapreseError: as `fingerprint`.
        """
        self._rows.append((name, group, _sampled(name, parameter)))

    def digests(self) -> dict[str, str]:
        """By group."""
        digests = {group: hashlib.sha256() for group in ("ffn", "attention", "rest")}
        for _, group, sampled in sorted(self._rows):
            digests[group].update(sampled)
        return {group: digest.hexdigest()[:32] for group, digest in digests.items()}


def noted(
    weights: Iterable[tuple[str, torch.Tensor]], tied: bool, seen: Fingerprint
) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of a Llama's checkpoint as they come; on the way, their fingerprint is taken.

    Args:
        tied: the head is the embedding, and where a checkpoint has it, it counts once.
    """
    for name, tensor in weights:
        part = name.split(".")[3] if name.startswith("model.layers.") else ""
        group = {"mlp": "ffn", "self_attn": "attention"}.get(part, "rest")
        # older checkpoints hold frequencies, which are no parameters
        if not (tied and name == "lm_head.weight") and not name.endswith(".rotary_emb.inv_freq"):
            seen.add(name, group, tensor)
        yield name, tensor


def _sampled(name: str, parameter: torch.Tensor) -> bytes:
    known = f"{name}{tuple(parameter.shape)}".encode()
    if is_traceable_wrapper_subclass(parameter):
        return known  # packed by some library: there are no values to compare
    if parameter.is_meta:
        raise CapreseError(
            f"weight {name} is not in memory (device_map='auto' leaves some on disk where memory is short), so the "
            "base cannot be told from others: load it on devices that hold it whole"
        )
    flat = parameter.detach().flatten()
    step = max(1, flat.numel() // _SAMPLE)
    values = flat[::step].to("cpu")
    if values.is_floating_point():
        if not torch.isfinite(values).all():
            raise CapreseError(f"weight {name} holds NaN or infinity; download the base model again")
        values = values.to(torch.bfloat16)  # before any is dropped: some round up to the smallest that stays
        values = torch.where(values.abs() < _SMALLEST, 0.0, values).view(torch.int16)
    return known + values.contiguous().numpy().tobytes()
