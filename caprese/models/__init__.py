"""What a transformers causal LM looks like: its FFNs by family, its names and aliases, and how to load one."""

from caprese.models.families import (
    FAMILIES,
    Family,
    Site,
    device_of,
    family_of,
    find_ffns,
    unwrap,
)
from caprese.models.ffn import FFN, Weights
from caprese.models.loading import (
    ALIASES,
    TERMS,
    Base,
    base_of,
    base_terms,
    check_keepable,
    load_base,
    load_config,
    resolve,
    save_base,
)
from caprese.models.parameters import active_parameters, base_parameters, count_parameters
from caprese.models.residency import residency_of
from caprese.models.shapes import SHAPES, random_model, shape_config
from caprese.models.text import broken, check_context, context_of, encode_prompt, encode_text, ending

__all__ = [
    "ALIASES",
    "FAMILIES",
    "FFN",
    "SHAPES",
    "TERMS",
    "Base",
    "Family",
    "Site",
    "Weights",
    "active_parameters",
    "base_of",
    "base_parameters",
    "base_terms",
    "broken",
    "check_context",
    "context_of",
    "check_keepable",
    "count_parameters",
    "device_of",
    "encode_prompt",
    "encode_text",
    "ending",
    "family_of",
    "find_ffns",
    "load_base",
    "load_config",
    "random_model",
    "residency_of",
    "resolve",
    "save_base",
    "shape_config",
    "unwrap",
]
