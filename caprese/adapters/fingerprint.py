"""Which weights a base has, whatever it is called and whatever type it was loaded in."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from caprese.errors import CapreseError
from caprese.models import unwrap

_SAMPLE = 1 << 16


def fingerprint(model: nn.Module) -> dict[str, str]:
    """A digest for each group of base parameters: {"ffn", "attention", "rest"}.

    Up to 65,536 evenly spaced values of every tensor are hashed after rounding to bfloat16, so the same checkpoint
    loaded in float32 or bfloat16 agrees, while a fine-tuned copy does not. Groups stand apart so that a base whose
    FFNs were quantised can still be known by the rest.

    Raises:
        CapreseError: a sampled weight is NaN or infinite.
    """
    digests = {group: hashlib.sha256() for group in ("ffn", "attention", "rest")}
    for name, parameter in sorted((_base_name(n), p) for n, p in unwrap(model).named_parameters() if ".lora_" not in n):
        group = "attention" if ".self_attn." in name else "ffn" if ".mlp." in name else "rest"
        flat = parameter.detach().flatten()
        step = max(1, flat.numel() // _SAMPLE)
        values = flat[::step].to("cpu")
        if values.is_floating_point():
            if not torch.isfinite(values).all():
                raise CapreseError(f"weight {name} holds NaN or infinity; download the base model again")
            values = values.to(torch.bfloat16).view(torch.int16)
        digests[group].update(f"{name}{tuple(parameter.shape)}".encode())
        digests[group].update(values.contiguous().numpy().tobytes())
    return {group: digest.hexdigest()[:32] for group, digest in digests.items()}


def _base_name(name: str) -> str:
    """The parameter's name in the bare model, also while a method is applied."""
    return name.replace(".mlp.ffn.", ".mlp.")
