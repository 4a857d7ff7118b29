"""What a cheaper model costs and what comes back: fidelity, accuracy, latency, side by side."""

from caprese.evaluation.accuracy import accuracy, is_correct, mean_new_tokens
from caprese.evaluation.checkpoint import NEW_TOKENS, checkpoint_fidelity
from caprese.evaluation.config import Evaluation
from caprese.evaluation.evaluate import (
    environment,
    evaluate,
    finite,
    held_out_prompts,
    lost,
    measure,
    recovered_fraction,
)
from caprese.evaluation.fidelity import VARIANTS, fidelity, layer_errors, variant
from caprese.evaluation.latency import parameter_counts, time_to_next_token

__all__ = [
    "NEW_TOKENS",
    "VARIANTS",
    "Evaluation",
    "accuracy",
    "checkpoint_fidelity",
    "environment",
    "evaluate",
    "fidelity",
    "finite",
    "held_out_prompts",
    "is_correct",
    "layer_errors",
    "lost",
    "mean_new_tokens",
    "measure",
    "parameter_counts",
    "recovered_fraction",
    "time_to_next_token",
    "variant",
]
