"""What `bench` measured, as tables and as a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from caprese.files import write_atomic


def describe_bench(result: dict[str, Any]) -> list[Any]:
    """The result as tables, one for each batch size."""
    parts: list[Any] = []
    for each in result.get("batches") or [result]:
        title = f"{result.get('shape', '')}  {result['method']}, rank {result['rank']}, {result['dtype']} on "
        title += f"{result['device']}, batch {each['batch']}: byte floor {each['floor_ratio']:.3f} of dense"
        table = Table(title=title, title_justify="left")
        table.add_column("", no_wrap=True, min_width=14)
        for column in ("ms", "±", "tok/s", "same engine", "dense eager", "best dense", "MB/tok", "eff.", "GB"):
            table.add_column(column, justify="right")
        for row in each["rows"]:
            table.add_row(
                row["name"],
                f"{row['ttnt_ms']:.2f}",
                f"{row['spread_ms'] / 2:.2f}",
                f"{row['tokens_per_second']:.1f}",
                "" if row["ratio_same_engine"] is None else f"{row['ratio_same_engine']:.3f}",
                f"{row['ratio_dense_eager']:.3f}",
                f"{row['ratio_best_dense']:.3f}",
                f"{row['bytes_per_token'] / 1e6:.0f}",
                f"{row['efficiency']:.2f}",
                f"{row['peak_bytes'] / 1e9:.2f}",
            )
        parts.append(table)
    parts.append(
        "ms: time to next token. same engine, dense eager, best dense: of dense's. MB/tok: weights read. eff.: the "
        "byte floor's ratio over the measured one; above 1 where rows lie better than dense's. GB: held"
    )
    return parts


def plot_bench(result: dict[str, Any], path: Path) -> None:
    """TTNT of each row with its byte floor as a mark; over batch sizes, where there are several, the ratio to dense."""
    import matplotlib  # takes a second
    from matplotlib.figure import Figure

    from caprese.report.plots import LIGHT

    with matplotlib.rc_context(LIGHT.style):
        figure = Figure(figsize=(6.4, 3.2), layout="constrained")
        axes = figure.add_subplot()
        batches = result.get("batches")
        if batches:
            sizes = [b["batch"] for b in batches]
            for i, row in enumerate(batches[0]["rows"]):
                if row["ratio_same_engine"] is None:  # another engine's, at batch 1 alone
                    continue
                ratios = [b["rows"][i]["ratio_same_engine"] for b in batches]
                if not row["name"].startswith("dense"):
                    axes.plot(sizes, ratios, marker="o", markersize=3, label=row["name"])
            axes.plot(sizes, [b["floor_ratio"] for b in batches], "k--", linewidth=1, label="byte floor")
            axes.axhline(1, color=LIGHT.muted, linewidth=1)
            axes.set_xscale("log", base=2)
            axes.set_xticks(sizes, [str(size) for size in sizes])
            axes.set(xlabel="batch", ylabel="TTNT / dense in the same engine")
            axes.legend(fontsize=7)
        else:
            rows = result["rows"]
            names = [row["name"] for row in rows]
            times = [row["ttnt_ms"] for row in rows]
            colors = [LIGHT.dense if n.startswith("dense") else LIGHT.recovered for n in names]
            axes.barh(names, times, color=colors, height=0.6)
            for i, row in enumerate(rows):
                floor = row["efficiency"] * row["ttnt_ms"]
                axes.plot([floor, floor], [i - 0.4, i + 0.4], color=LIGHT.efficient)
                axes.text(row["ttnt_ms"], i, f" {row['ttnt_ms']:.3g} ms", va="center", fontsize=7)
            axes.invert_yaxis()
            axes.set_xlabel("TTNT, ms; red: dense in the same engine times the byte floor ratio")
        axes.set_title(f"{result.get('shape', '')}  {result['method']}, rank {result['rank']}", fontsize=9)
        write_atomic(path, lambda tmp: figure.savefig(tmp, dpi=200, format="png"))
