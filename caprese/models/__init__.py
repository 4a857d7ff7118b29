"""What a transformers causal LM looks like: its FFNs by family, its names and aliases, and how to load one."""

from caprese.models.families import (
    FAMILIES,
    Family,
    Site,
    active_parameters,
    base_parameters,
    count_parameters,
    family_of,
    find_ffns,
    unwrap,
)
from caprese.models.ffn import FFN, Weights
from caprese.models.loading import ALIASES, Base, base_of, load_base, load_config, resolve

__all__ = [
    "ALIASES",
    "FAMILIES",
    "FFN",
    "Base",
    "Family",
    "Site",
    "Weights",
    "active_parameters",
    "base_of",
    "base_parameters",
    "count_parameters",
    "family_of",
    "find_ffns",
    "load_base",
    "load_config",
    "resolve",
    "unwrap",
]
