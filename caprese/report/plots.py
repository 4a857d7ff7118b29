"""A report's plots: as PNG files beside it, and as SVG for the HTML page."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from caprese.files import write_bytes
from caprese.report.summary import VARIANTS, ratio

CAPTIONS = {
    "pareto": "Cost against fidelity to the dense model; the arrow is what the adapter does.",
    "layers": "Relative error of each layer's FFN output, without and with the adapter.",
    "training": "End-to-end distillation: training loss, and KL divergence on held-out samples after each stage.",
    "search": "What was measured to find the fastest methods: cost, before recovery, against time to next token.",
    "rank": "Error left after the closed-form fit, by the adapter's rank.",
}
MARKERS = {"dense": "s", "efficient": "X", "recovered": "o"}


@dataclass(frozen=True)
class Theme:
    """The colours of a plot; a background of "none" lets the page show through."""

    ink: str = "#24292b"
    muted: str = "#687076"
    grid: str = "#e4e7e8"
    background: str = "#ffffff"
    dense: str = "#24292b"
    efficient: str = "#d9482b"
    recovered: str = "#0b8577"

    def color(self, variant: str) -> str:
        """The colour that stands for a variant in every plot."""
        return str(getattr(self, variant))

    @property
    def style(self) -> Any:
        """The matplotlib settings of this theme; the salt makes the SVG the same from run to run."""
        text = dict.fromkeys(("text.color", "axes.labelcolor"), self.ink)
        lines = dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), self.muted)
        back = dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), self.background)
        frame = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True}
        rest = {"grid.color": self.grid, "font.size": 9, "legend.frameon": False, "svg.hashsalt": "caprese"}
        return {**text, **lines, **back, **frame, **rest}


LIGHT = Theme()
DARK = Theme(
    ink="#e6eaeb",
    muted="#98a2a6",
    grid="#343b3e",
    background="none",
    dense="#e6eaeb",
    efficient="#ff8063",
    recovered="#3cc7b5",
)


def write_plots(report: dict[str, Any], directory: Path) -> list[Path]:
    """Write the plots that `report` has data for as PNG files into `directory`."""
    images = {directory / f"{name}.png": image for name, image in _render(report, LIGHT, "png").items()}
    for path, image in images.items():
        write_bytes(path, image)
    return list(images)


def plot_uris(report: dict[str, Any], dark: bool = False) -> dict[str, str]:
    """The same plots as SVG data URIs by name, for embedding into a page."""
    images = _render(report, DARK if dark else LIGHT, "svg")
    return {name: "data:image/svg+xml;base64," + base64.b64encode(image).decode() for name, image in images.items()}


def plot_names(report: dict[str, Any]) -> list[str]:
    """The names of the plots that `report` has data for."""
    return [name for name, draw in _DRAWERS.items() if draw(report, LIGHT)]


def _render(report: dict[str, Any], theme: Theme, kind: str) -> dict[str, bytes]:
    images = {}
    metadata: dict[str, Any] = {"Date": None} if kind == "svg" else {}
    with matplotlib.rc_context(theme.style):
        for name, draw in _DRAWERS.items():
            if figure := draw(report, theme):
                figure.savefig(buffer := io.BytesIO(), format=kind, dpi=200, metadata=metadata)
                images[name] = buffer.getvalue()
    return images


def _known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _points(entries: Iterable[dict[str, Any]], *keys: str) -> list[tuple[Any, ...]]:
    """`keys` of the entries in which all of them are finite numbers."""
    return [tuple(e[k] for k in keys) for e in entries if all(_known(e.get(k)) for k in keys)]


def _figure(height: float) -> Figure:
    return Figure(figsize=(4.6, height), layout="constrained")  # narrow, so that the text stays legible on a phone


def _pareto(report: dict[str, Any], theme: Theme) -> Figure | None:
    parameters, latency = report["parameters"], report.get("latency") or {}
    quality = {v: report["quality"].get(v) or {} for v in VARIANTS}
    active = {v: ratio(parameters.get(f"active_{v}"), parameters.get("active_dense")) for v in VARIANTS}
    timed = {v: (latency.get(v) or {}).get("ttnt_ms") for v in VARIANTS}
    in_time = all(map(_known, timed.values()))
    cost = timed if in_time else active
    panels = (("kl", 1, "KL to dense"), ("top1_agreement", 100, "Top-1 agreement, %"))
    drawn = []
    for key, scale, label in panels:
        points = {v: (cost[v], q[key] * scale) for v, q in quality.items() if _known(q.get(key)) and _known(cost[v])}
        if len(points) > 1:
            drawn.append((label, points))
    if not drawn:
        return None
    figure = _figure(0.5 + 1.8 * len(drawn))
    grid = figure.subplots(len(drawn), 1, sharex=True, squeeze=False)
    for axes, (label, points) in zip(grid[:, 0], drawn, strict=True):
        _tradeoff(axes, points, active, theme)
        if in_time:
            for v, (x, y) in points.items():
                axes.errorbar(x, y, xerr=latency[v].get("spread_ms") or 0, color=theme.color(v), capsize=2, zorder=2)
        axes.set_ylabel(label)
    grid[-1, 0].set_xlabel("Time to next token, ms" if in_time else "Active parameters, fraction of dense")
    return figure


def _tradeoff(axes: Axes, points: dict[str, tuple[Any, Any]], active: dict[str, float | None], theme: Theme) -> None:
    """Draw the variants as labelled points, with an arrow from efficient to recovered."""
    costs = [x for x, _ in points.values()]
    middle = (min(costs) + max(costs)) / 2
    axes.margins(x=0.15, y=0.3)
    for v, (x, y) in points.items():
        axes.plot(x, y, MARKERS[v], color=theme.color(v), markersize=8, zorder=3)
        other = points.get({"efficient": "recovered", "recovered": "efficient"}.get(v, ""), (x, y))
        above, right = y >= other[1], x <= middle  # out of the way of the arrow, and inside the frame
        axes.annotate(
            f"{v}, {active[v]:.0%} active" if active[v] and v != "dense" else v,
            (x, y),
            (-4 if right else 4, 7 if above else -7),
            textcoords="offset points",
            ha="left" if right else "right",
            va="bottom" if above else "top",
            color=theme.color(v),
        )
    if "efficient" in points and "recovered" in points:
        arrow = {"arrowstyle": "-|>", "color": theme.muted, "shrinkA": 6, "shrinkB": 6}
        axes.annotate("", points["recovered"], points["efficient"], arrowprops=arrow)


def _layers(report: dict[str, Any], theme: Theme) -> Figure | None:
    entries = _points(report.get("layers_error") or [], "layer", "efficient", "recovered", "rank")
    if not entries:
        return None
    layers, before, after, ranks = zip(*entries, strict=True)
    varied = len(set(ranks)) > 1
    figure = _figure(3.6 if varied else 2.8)
    grid = figure.subplots(1 + varied, 1, sharex=True, squeeze=False, height_ratios=[3, 1][: 1 + varied])
    axes = grid[0, 0]
    axes.vlines(layers, after, before, color=theme.grid, linewidth=2, zorder=1)
    for variant, error in (("efficient", before), ("recovered", after)):
        axes.plot(layers, error, MARKERS[variant], color=theme.color(variant), markersize=5, label=variant)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("Relative FFN error")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=2)
    if varied:
        grid[1, 0].bar(layers, ranks, color=theme.muted)
        grid[1, 0].set_ylabel("Rank")
    grid[-1, 0].set_xlabel("Layer")
    grid[-1, 0].xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _training(report: dict[str, Any], theme: Theme) -> Figure | None:
    curves = report.get("curves") or {}
    loss = _points(curves.get("end_to_end") or [], "step", "loss")
    validation = [(e["stage"], e["step"], e["kl"]) for e in curves.get("validation") or [] if _known(e.get("kl"))]
    if not loss and not any(stage == "end_to_end" for stage, _, _ in validation):
        return None
    panels = [draw for draw, data in ((_loss, loss), (_validation, validation)) if data]
    figure = _figure(0.6 + 1.8 * len(panels))
    grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False)
    for axes, draw in zip(grid[:, 0], panels, strict=True):
        draw(axes, loss if draw is _loss else validation, theme)
    grid[-1, 0].set_xlabel("Step")
    grid[-1, 0].xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _loss(axes: Axes, loss: list[tuple[Any, ...]], theme: Theme) -> None:
    steps, values = zip(*loss, strict=True)
    window = max(1, len(values) // 20)  # a batch's loss is noisy: show it faint, and its trailing mean on top
    means = [sum(part) / len(part) for i in range(len(values)) if (part := values[max(0, i + 1 - window) : i + 1])]
    axes.plot(steps, values, color=theme.recovered, alpha=0.35 if window > 1 else 1, linewidth=1)
    if window > 1:
        axes.plot(steps, means, color=theme.recovered)
    axes.set_ylabel("Training loss")


def _validation(axes: Axes, validation: list[tuple[Any, ...]], theme: Theme) -> None:
    """The stages as one path: no adapter, closed form, then the steps of training."""
    first = [(stage, "efficient", "X") for stage in ("efficient", "aligned")]  # hybrids are aligned by then
    for stage, variant, marker in (*first, ("layerwise", "recovered", "D")):
        for step, kl in [(step, kl) for name, step, kl in validation if name == stage]:
            axes.axhline(kl, color=theme.color(variant), linestyle=":", linewidth=1)
            axes.plot(step, kl, marker, color=theme.color(variant), markersize=7, linestyle="none", label=stage)
    path = sorted((step, kl) for name, step, kl in validation if name == "end_to_end")
    if path:
        start = [(step, kl) for name, step, kl in validation if name == "layerwise"]
        axes.plot(*zip(*(start + path), strict=True), color=theme.recovered, linewidth=1)
        axes.plot(*zip(*path, strict=True), "o", color=theme.recovered, markersize=5, label="end to end")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("Held-out KL")
    axes.legend(fontsize=8)


def _rank(report: dict[str, Any], theme: Theme) -> Figure | None:
    curve = (report.get("curves") or {}).get("rank_error") or {}
    ranks, error = curve.get("ranks") or [], curve.get("error") or []
    if len(ranks) < 2:
        return None
    figure = _figure(2.6)
    axes = figure.subplots()
    axes.plot(ranks, error, "o-", color=theme.recovered, markersize=5)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("Rank")
    axes.set_ylabel("Error left")
    return figure


def _search(report: dict[str, Any], theme: Theme) -> Figure | None:
    search = report.get("search") or {}
    measured = [each for each in search.get("alternatives") or [] if _known(each.get("kl"))]
    if not measured:
        return None
    figure = _figure(3.4)
    axes = figure.subplots()
    for each in measured:
        method, time, kl = each["method"], each["ratio"], each["kl"]
        taken = method == search["chosen"]
        color = theme.recovered if taken else theme.efficient if kl > search["target_kl"] else theme.muted
        axes.plot(time, kl, "o", color=color, markersize=7 if taken else 5)
        axes.annotate(method, (time, kl), (3, 3), textcoords="offset points", color=color, fontsize=5)
    axes.axhline(search["target_kl"], color=theme.muted, linestyle=":", linewidth=1)
    axes.set_yscale("log")
    axes.margins(x=0.3, y=0.1)
    axes.set_xlabel(f"Time to next token, of dense in {search['dtype']}")
    axes.set_ylabel("KL to dense; dotted: the target")
    return figure


_DRAWERS = {"pareto": _pareto, "layers": _layers, "training": _training, "rank": _rank, "search": _search}
