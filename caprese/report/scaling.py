"""What `scale` measured, as tables and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from caprese.files import write_atomic
from caprese.studies.equal_time import METRICS


def _columns(names: Sequence[str]) -> list[str]:
    """Names that may break between words."""
    return [name.replace("_", " ") for name in names]


def describe_scaling(result: dict[str, Any]) -> list[Any]:
    """The result as tables."""
    parts: list[Any] = []
    found = result["contenders"]
    names = list(found)
    for metric in METRICS:
        if metric not in found[names[0]]:
            continue
        word = metric.replace("_", " ")
        table = Table(
            "N", *_columns(names), title=f"{word}, with 95% intervals, and seconds a problem", title_justify="left"
        )
        for i, n in enumerate(found[names[0]]["n"]):
            cells = []
            for c in found.values():
                low, high = c[f"{metric}_interval"][i]
                cells.append(f"{c[metric][i]:.1%} ({low:.0%}-{high:.0%}), {c['seconds'][i]:.2f} s")
            table.add_row(str(n), *cells)
        parts.append(table)
        if result.get("at_equal_time"):
            table = Table(
                "dense N", "s", *_columns(names), title=f"{word} at the time dense needs", title_justify="left"
            )
            for row in result["at_equal_time"]:
                each = [row[metric][name] for name in names]
                cells = ["-" if value is None else f"{value:.1%}" for value in each]
                table.add_row(str(row["dense_n"]), f"{row['seconds']:.2f}", *cells)
            times = [result["seconds_to_reach_dense"][metric][name] for name in names]
            table.add_section()
            table.add_row("s to reach dense", "", *("-" if t is None else f"{t:.2f}" for t in times))
            ratios = result["time_of_dense"][metric]
            table.add_row("of dense's time", "", *("" if name == "dense" else _ratio(ratios[name]) for name in names))
            parts.append(table)
    table = Table("", *_columns(names), title="caches", title_justify="left")
    table.add_row("MB a sample, at its longest", *(f"{c['cache_bytes'] / 1e6:.3g}" for c in found.values()))
    table.add_row("samples drawn at once", *(str(c["together"]) for c in found.values()))
    parts.append(table)
    parts.append("-: not in that time, or never. Between measured N by interpolation; times taken never to fall with N")
    return parts


def _ratio(found: dict[str, Any]) -> str:
    if found["ratio"] is None:
        return "-"
    low, high = found["interval"] or (None, None)
    return f"{found['ratio']:.2f}" + ("" if low is None else f" ({low:.2f}-{high:.2f})")


def plot_scaling(result: dict[str, Any], path: Path) -> None:
    """Each metric against measured time, compute units and tokens."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    from caprese.report.plots import LIGHT

    found = result["contenders"]
    metrics = [m for m in METRICS if m in next(iter(found.values()))]
    budgets = (
        ("seconds", "seconds a problem"),
        ("compute_units", "N x active fraction"),
        ("tokens", "tokens a problem"),
    )
    with matplotlib.rc_context(LIGHT.style):
        figure = Figure(figsize=(9.6, 2.7 * len(metrics)), layout="constrained")
        grid = figure.subplots(len(metrics), len(budgets), squeeze=False)
        for axes, metric in zip(grid, metrics, strict=True):
            for ax, (key, label) in zip(axes, budgets, strict=True):
                for name, c in found.items():
                    low, high = zip(*c[f"{metric}_interval"], strict=True)
                    (line,) = ax.plot(c[key], c[metric], marker="o", markersize=3, label=name)
                    ax.fill_between(c[key], low, high, color=line.get_color(), alpha=0.1)
                ax.set_xscale("log")
                ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
                ax.xaxis.set_minor_formatter(NullFormatter())
                ax.set(xlabel=label, ylabel=metric.replace("_", " "), ylim=(0, 1.02))
        grid[0][0].legend(fontsize=7)
        write_atomic(path, lambda tmp: figure.savefig(tmp, dpi=200, format="png"))
