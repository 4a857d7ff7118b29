"""Studies on finished adapters: time to next token, many samples at equal time, lm-eval's tasks."""

from caprese.studies.bench import ROWS, Bench, bench

__all__ = ["ROWS", "Bench", "bench"]
