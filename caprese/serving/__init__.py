"""Recovered models inside other engines, as plugins of theirs; imported by the engine, in its own Python."""

from __future__ import annotations

#: the architecture that vLLM is told to load a Llama-shaped base as
ARCHITECTURE = "CapreseLlamaForCausalLM"


def register() -> None:
    """vLLM's entry point `vllm.general_plugins`: make the architecture known, and import nothing else.

    Every process of vLLM calls it, some of them more than once.
    """
    from vllm import ModelRegistry

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.vllm:{ARCHITECTURE}")
