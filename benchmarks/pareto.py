"""Draw KL against time to next token: `python benchmarks/pareto.py RESULTS.json OUTPUT.png`, of run.py few-bits."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from caprese.files import write_atomic
from caprese.report.plots import LIGHT

PANELS = {"test": "prompts of the run's own sources", "elsewhere": "prompts from elsewhere"}


def points(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By method: ttnt_ms of the fused step, and KL "efficient" and "recovered" on each kind of prompts."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        at = found.setdefault(row["cell"]["method"], {})
        at["efficient"] = {kind: row["efficient"][kind]["kl"] for kind in PANELS}
        if "recovered" in row:
            at["recovered"] = {kind: row["recovered"][kind]["kl"] for kind in PANELS}
        if "fused" in row:
            at |= {"ttnt_ms": row["fused"]["ttnt_ms"], "dense_ms": row["dense"]["ttnt_ms"]}
    return {method: at for method, at in found.items() if "ttnt_ms" in at}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """One panel for each kind of prompts; an arrow from what a method costs to what recovery leaves of it."""
    with matplotlib.rc_context(LIGHT.style):
        figure = Figure(figsize=(10, 4.4), layout="constrained")
        for ax, (kind, title) in zip(figure.subplots(1, len(PANELS), sharey=True), PANELS.items(), strict=True):
            for number, (method, at) in enumerate(points(rows).items()):
                color, x, y = f"C{number % 10}", at["ttnt_ms"], at["efficient"][kind]
                if y < 1e-6:  # the dense model itself
                    ax.axvline(x, linestyle=":", color="grey")
                    ax.annotate("dense", (x, 2e-3), rotation=90, fontsize=6)
                    continue
                ax.plot(x, y, "o", color=color, fillstyle="none")
                left = at.get("recovered", {}).get(kind)
                if left is not None:
                    ax.annotate("", (x, left), (x, y), arrowprops={"arrowstyle": "-|>", "color": color})
                    ax.plot(x, left, "o", color=color)
                ax.annotate(method, (x, y), (4, 2), textcoords="offset points", fontsize=6)
            ax.set(yscale="log", xlabel="ms to the next token, fused", title=title)
        figure.axes[0].set_ylabel("KL(dense || efficient)")
        write_atomic(path, lambda tmp: figure.savefig(tmp, dpi=150, format="png"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    draw(json.loads(args.results.read_text())["rows"], args.output)


if __name__ == "__main__":
    main()
