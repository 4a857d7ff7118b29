"""How results are printed."""

from __future__ import annotations

import os
from typing import Any


def quiet(on: bool) -> None:
    """With --json, nothing but JSON on stdout, and no progress at all."""
    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils import logging as transformers_logging

    from caprese import progress

    # of several processes only the first speaks
    progress.quiet = on or not is_main()
    if progress.quiet:
        disable_progress_bars()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    import warnings

    warnings.filterwarnings("ignore", category=UserWarning, module="peft")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def print_report(report: dict[str, Any]) -> None:
    from rich.console import Console

    from caprese.report.summary import summary_lines, summary_table

    console = Console()
    console.print(summary_table(report))
    for line in summary_lines(report):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def print_table(title: str, figures: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from caprese.report.summary import duration

    def shown(key: str, value: Any) -> str:
        if isinstance(value, list):
            return "\n".join(map(str, value))
        if isinstance(value, dict):
            return "\n".join(f"{name} {shown(key, each)}" for name, each in value.items())
        if key.endswith("seconds"):
            return duration(value)
        return f"{value:,}" if isinstance(value, int) else str(value)

    table = Table(title=title, show_header=False)
    for key, value in figures.items():
        table.add_row(key.replace("_", " ").replace(" seconds", " time"), shown(key, value))
    Console().print(table)
