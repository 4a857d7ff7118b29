"""Draw KL against time to next token from run.py few-bits: `python benchmarks/pareto.py RESULTS.json OUTPUT.png`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from caprese.files import write_atomic
from caprese.report.plots import LIGHT

MARKERS = "os^"
PANELS = {"test": "prompts of the run's own sources", "elsewhere": "prompts from elsewhere"}


def points(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By method: "time", of dense in the same run, and KL "efficient" and "recovered" by kind of prompts."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        at = found.setdefault(row["cell"]["method"], {})
        at["efficient"] = {kind: row["efficient"][kind]["kl"] for kind in PANELS}
        if "recovered" in row:
            at["recovered"] = {kind: row["recovered"][kind]["kl"] for kind in PANELS}
        if "fused" in row:
            at["time"] = row["fused"]["ttnt_ms"] / row["dense"]["ttnt_ms"]
    return {method: at for method, at in found.items() if "time" in at}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """One panel for each kind of prompts; an arrow from what a method costs to what recovery leaves of it."""
    with matplotlib.rc_context(LIGHT.style):
        figure = Figure(figsize=(10, 6), layout="constrained")
        for ax, (kind, title) in zip(figure.subplots(1, len(PANELS), sharey=True), PANELS.items(), strict=True):
            for number, (method, at) in enumerate(points(rows).items()):
                color, x, y = f"C{number % 10}", at["time"], at["efficient"][kind]
                if y < 1e-6:  # the dense model itself, whose KL no logarithm has
                    continue
                marker = MARKERS[number // 10]
                ax.plot(x, y, marker, color=color, fillstyle="none", label=method)
                left = at.get("recovered", {}).get(kind)
                if left is not None:
                    ax.annotate("", (x, left), (x, y), arrowprops={"arrowstyle": "-|>", "color": color})
                    ax.plot(x, left, marker, color=color)
            ax.axvline(1, color="0.5", linestyle=":", label="dense bfloat16, KL 0")
            ax.set(xscale="log", yscale="log", xlabel="time to next token, of dense bfloat16", title=title)
            ax.set_xticks([0.1, 0.2, 0.5, 1], ["0.1", "0.2", "0.5", "1"])
            ax.minorticks_off()
        figure.axes[0].set_ylabel("KL(dense || efficient); filled: recovered")
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=7)
        write_atomic(path, lambda tmp: figure.savefig(tmp, dpi=150, format="png"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    draw(json.loads(args.results.read_text())["rows"], args.output)


if __name__ == "__main__":
    main()
