"""Mamba-2 in place of attention: the method, the mixer, its place in the cache, and what it learns from attention."""

from caprese.efficient_methods.mamba.method import Mamba
from caprese.efficient_methods.mamba.mixer import Mixer, MixerState
from caprese.efficient_methods.mamba.replacement import Replacement, replacements

__all__ = ["Mamba", "Mixer", "MixerState", "Replacement", "replacements"]
