"""What a cheaper model costs and what comes back: fidelity, accuracy, latency, and the report of it."""

from caprese.evaluation.accuracy import accuracy, is_correct, mean_new_tokens
from caprese.evaluation.bench import ROWS, Bench, bench, plot_bench
from caprese.evaluation.config import Evaluation
from caprese.evaluation.fidelity import VARIANTS, fidelity, layer_errors, variant
from caprese.evaluation.latency import parameter_counts, time_to_next_token
from caprese.evaluation.report import environment, evaluate, finite, lost, recovered_fraction, write_report

__all__ = [
    "ROWS",
    "VARIANTS",
    "Bench",
    "Evaluation",
    "accuracy",
    "bench",
    "environment",
    "evaluate",
    "fidelity",
    "finite",
    "is_correct",
    "layer_errors",
    "lost",
    "mean_new_tokens",
    "parameter_counts",
    "plot_bench",
    "recovered_fraction",
    "time_to_next_token",
    "variant",
    "write_report",
]
