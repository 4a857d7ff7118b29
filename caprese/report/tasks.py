"""lm-eval's scores as a table."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from caprese.report.summary import VARIANTS


def describe_tasks(result: dict[str, Any]) -> Table:
    """The scores as a table for the terminal, with standard errors."""
    table = Table("task", "metric", *VARIANTS, title="lm-eval", title_justify="left")
    for task, metrics in result["tasks"].items():
        for metric, values in metrics.items():
            errors = result["stderr"].get(task, {}).get(metric, {})
            cells = [
                "-" if (v := values.get(n)) is None else f"{v:.4f}" + (f" ± {e:.4f}" if (e := errors.get(n)) else "")
                for n in VARIANTS
            ]
            table.add_row(task, metric, *cells)
    return table
