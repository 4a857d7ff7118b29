"""The files a report goes into."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from caprese.adapters.sidecar import FILES
from caprese.evaluation import finite
from caprese.files import sha256, write_sealed, write_text
from caprese.report.card import render_card
from caprese.report.html import render_html
from caprese.report.plots import write_plots
from caprese.report.summary import portable

#: what can be written again from report.json alone
PAGES = ("recipe.yaml", "report.html", "README.md", "plots/*.png")


def write_report(report: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """The recipe, plots, report.html, the model card README.md and, last, report.json with a digest of every other file
    of the result and of itself; returns the report as written."""
    final: dict[str, Any] = portable(finite(dict(report)))
    write_text(directory / "recipe.yaml", yaml.safe_dump(final["recipe"], sort_keys=False))
    write_plots(final, directory / "plots")
    write_text(directory / "report.html", render_html(final))
    write_text(directory / "README.md", render_card(final))
    paths = [path for name in (*FILES, *PAGES, "samples/*.parquet") for path in sorted(directory.glob(name))]
    final["files"] = {path.relative_to(directory).as_posix(): sha256(path) for path in paths}
    write_sealed(directory / "report.json", final)
    return final
