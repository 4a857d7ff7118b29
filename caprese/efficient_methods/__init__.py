"""What is taken away: the wrapper around an FFN, which pass is which, and one file per method.

To add a method: a file like `griffin.py`, and its class in `METHODS`; or a package of your own (docs/methods.md).
"""

from caprese.efficient_methods.apply import Calibration, applied_ffns, apply, drop_dense, methods_by_layer, remove
from caprese.efficient_methods.base import FromPrompt, Method, Sparse
from caprese.efficient_methods.calibrate import calibrate, needs_calibration
from caprese.efficient_methods.cats import Cats
from caprese.efficient_methods.compose import (
    METHODS,
    compose,
    describe_methods,
    facts_of,
    find_method,
    idle_branches,
    known_methods,
    make_method,
    parse_methods,
    refusal,
)
from caprese.efficient_methods.cost import Cost, cost, cost_of, lora_rank, weights_saved
from caprese.efficient_methods.griffin import Griffin
from caprese.efficient_methods.mamba import Mamba
from caprese.efficient_methods.none import Nothing
from caprese.efficient_methods.passes import Observer, check_prefill, dense, only, phases, phases_of, reselection
from caprese.efficient_methods.quantized import Int8, Nf4
from caprese.efficient_methods.reads import Reads
from caprese.efficient_methods.rounded import Q4, Q8
from caprese.efficient_methods.settings import Layers, Prefill, Sparsity, check_reselect, check_sparsity
from caprese.efficient_methods.stand_in import (
    Objective,
    StandIn,
    settle,
    stand_in_parameters,
    stand_ins,
    untrained,
)
from caprese.efficient_methods.static import Static
from caprese.efficient_methods.teal import Teal
from caprese.efficient_methods.tokens import Tokens
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
    "Nf4",
    "Nothing",
    "Objective",
    "Observer",
    "Q4",
    "Q8",
    "Reads",
    "RecoverySlot",
    "Sparse",
    "Sparsity",
    "StandIn",
    "Static",
    "Teal",
    "Prefill",
    "Tokens",
    "applied_ffns",
    "apply",
    "calibrate",
    "check_prefill",
    "check_reselect",
    "check_sparsity",
    "compose",
    "cost",
    "cost_of",
    "dense",
    "describe_methods",
    "drop_dense",
    "facts_of",
    "find_method",
    "idle_branches",
    "known_methods",
    "lora_rank",
    "make_method",
    "methods_by_layer",
    "needs_calibration",
    "parse_methods",
    "only",
    "phases",
    "phases_of",
    "refusal",
    "remove",
    "reselection",
    "settle",
    "stand_in_parameters",
    "stand_ins",
    "untrained",
    "weights_saved",
]
