"""Mamba-2 in place of attention: the method, the mixer and its place in the KV cache."""

from caprese.efficient_methods.mamba.method import Mamba
from caprese.efficient_methods.mamba.mixer import Mixer, MixerState
from caprese.efficient_methods.mamba.replacement import (
    Replacement,
    mixers_at_start,
    observing_mixers,
    replacements,
    settle_mixers,
)

__all__ = [
    "Mamba",
    "Mixer",
    "MixerState",
    "Replacement",
    "mixers_at_start",
    "observing_mixers",
    "replacements",
    "settle_mixers",
]
