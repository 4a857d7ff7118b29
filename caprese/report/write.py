"""The files a report goes into."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from caprese.evaluation import finite
from caprese.files import write_json, write_text
from caprese.report.card import render_card
from caprese.report.html import render_html
from caprese.report.plots import write_plots
from caprese.report.summary import portable


def write_report(report: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """Plots, report.html, the model card README.md and, last, report.json; returns the report as written."""
    final: dict[str, Any] = portable(finite(dict(report)))
    write_plots(final, directory / "plots")
    write_text(directory / "report.html", render_html(final))
    write_text(directory / "README.md", render_card(final))
    write_json(directory / "report.json", final)
    return final
