"""What is taken away: the wrapper around an FFN, which pass is which, and one file per method.

To add a method: a file like `griffin.py`, and its class in `METHODS`; or a package of your own (docs/methods.md).
"""

from caprese.efficient_methods.apply import Calibration, applied_ffns, apply, methods_by_layer, remove
from caprese.efficient_methods.base import (
    FromPrompt,
    Layers,
    Method,
    Reads,
    Sparse,
    Sparsity,
    check_reselect,
    check_sparsity,
)
from caprese.efficient_methods.calibrate import Tokens, calibrate, needs_calibration
from caprese.efficient_methods.cats import Cats
from caprese.efficient_methods.compose import (
    METHODS,
    compose,
    describe_methods,
    find_method,
    idle_branches,
    known_methods,
    make_method,
    parse_methods,
    refusal,
)
from caprese.efficient_methods.cost import Cost, cost, cost_of, lora_rank, weights_saved
from caprese.efficient_methods.griffin import Griffin
from caprese.efficient_methods.mamba import (
    Mamba,
    Mixer,
    MixerState,
    Replacement,
    mixers_at_start,
    observing_mixers,
    replacements,
    settle_mixers,
)
from caprese.efficient_methods.none import Nothing
from caprese.efficient_methods.passes import Observer, dense, only, phases, phases_of, reselection
from caprese.efficient_methods.quantized import Int8, Nf4
from caprese.efficient_methods.static import Static
from caprese.efficient_methods.teal import Teal
from caprese.efficient_methods.wrapper import EfficientFFN, RecoverySlot

__all__ = [
    "METHODS",
    "Calibration",
    "Cats",
    "Cost",
    "EfficientFFN",
    "FromPrompt",
    "Griffin",
    "Int8",
    "Layers",
    "Mamba",
    "Method",
    "Mixer",
    "MixerState",
    "Nf4",
    "Nothing",
    "Observer",
    "Reads",
    "RecoverySlot",
    "Replacement",
    "Sparse",
    "Sparsity",
    "Static",
    "Teal",
    "Tokens",
    "applied_ffns",
    "apply",
    "calibrate",
    "check_reselect",
    "check_sparsity",
    "compose",
    "cost",
    "cost_of",
    "dense",
    "describe_methods",
    "find_method",
    "idle_branches",
    "known_methods",
    "lora_rank",
    "make_method",
    "methods_by_layer",
    "mixers_at_start",
    "observing_mixers",
    "needs_calibration",
    "parse_methods",
    "only",
    "phases",
    "phases_of",
    "refusal",
    "remove",
    "replacements",
    "reselection",
    "settle_mixers",
    "weights_saved",
]
