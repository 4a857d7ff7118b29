"""Run an experiment: a YAML of cells, each measured alike, and a table of what came out.

    python benchmarks/run.py methods                          every table of benchmarks/experiments/methods.yaml
    python benchmarks/run.py reasoner ranks epochs            only these of its tables
    python benchmarks/run.py curves --set samples=out/samples --set rank=16 --output mine.json

An experiment names what measures it (a file of benchmarks/measures), the settings that its cells share, and its
tables: lists of cells, which say what is theirs. A cell that the output has already is not measured again, so an
interrupted run goes on; with other settings it is. The output is out-benchmarks/EXPERIMENT.json if not said;
benchmarks/results keeps what the pages cite.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from caprese.files import write_atomic, write_json

HERE = Path(__file__).parent
Cell = dict[str, Any]
Row = dict[str, Any]


def read(name: str, changes: list[str]) -> dict[str, Any]:
    """An experiment, with settings changed by `key=value`."""
    path = HERE / "experiments" / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml")))
        sys.exit(f"no experiment {name!r}; there are {known}")
    experiment: dict[str, Any] = yaml.safe_load(path.read_text())
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals or key not in experiment["settings"]:
            sys.exit(f"--set {change}: this experiment's settings are {', '.join(experiment['settings'])}")
        experiment["settings"][key] = yaml.safe_load(value)
    return experiment


def cells_of(experiment: dict[str, Any], table: str) -> list[Cell]:
    """The cells of a table, each with all of its settings; a list among the values stands for each of them."""
    cells = []
    for own in experiment["tables"][table]:
        values = {**experiment["settings"], **(own or {})}
        lists = [value if isinstance(value, list) else [value] for value in values.values()]
        cells += [dict(zip(values, each, strict=True)) for each in itertools.product(*lists)]
    return cells


def key_of(cell: Cell) -> str:
    return json.dumps(cell, sort_keys=True)


def look_up(row: Row, path: str) -> Any:
    """A value by its dotted path, such as efficient.kl; None where there is none."""
    found: Any = row
    for part in path.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found


def shown(row: Row, column: str) -> str:
    """A value as a column asks for it: "path format", or several of them joined by text in quotes."""
    words = []
    for word in shlex.split(column):
        path, _, spec = word.partition(":")
        value = look_up(row, path)
        if word.startswith("'") or (value is None and not path.replace(".", "").replace("_", "").isalnum()):
            words.append(word)
        else:
            words.append("-" if value is None else format(value, spec) if spec else str(value))
    return " ".join(words)


def markdown(columns: dict[str, str], rows: list[Row]) -> str:
    """Rows as a Markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(shown(row, column) for column in columns.values()) + " |" for row in rows]
    return "\n".join(lines)


def plot(experiment: dict[str, Any], found: dict[str, Row], path: Path) -> None:
    """A panel for each of `plot`: lines over a setting's values, with their intervals where there are some."""
    import matplotlib
    from matplotlib.figure import Figure

    from caprese.report.plots import LIGHT

    panels = experiment["plot"]
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    with matplotlib.rc_context(LIGHT.style):
        figure = Figure(figsize=(3.2 * across + 1, 2.7 * down + 0.3), layout="constrained")
        grid = figure.subplots(down, across, squeeze=False).flatten()
        for ax, panel in zip(grid, panels, strict=False):
            for label, line in panel["lines"].items():
                table, value = line.split()
                rows = [found[k] for c in cells_of(experiment, table) if (k := key_of(c)) in found]
                points = [
                    (r["cell"].get(panel["x"], r.get(panel["x"])), r) for r in rows if look_up(r, value) is not None
                ]
                if panel.get("curve"):  # one row holds its own points
                    for row in rows:
                        own = [(p[panel["x"]], p[value]) for p in row[panel["curve"]]]
                        ax.plot(*zip(*own, strict=True), "o-", markersize=3, label=shown(row, label))
                    continue
                if not points:
                    continue
                at = [x if isinstance(x, int | float) and not panel.get("names") else str(x) for x, _ in points]
                (drawn,) = ax.plot(at, [look_up(r, value) for _, r in points], "o-", markersize=3, label=label)
                bounds = [look_up(r, f"{value.rpartition('.')[0]}.interval") for _, r in points]
                if all(bounds):
                    low, high = zip(*bounds, strict=True)
                    ax.fill_between(at, low, high, color=drawn.get_color(), alpha=0.12)
            ax.set(xlabel=panel["x"].replace("_", " "), ylabel=panel["y"], **panel.get("axes", {}))
            ax.legend(fontsize=6)
        write_atomic(path, lambda tmp: figure.savefig(tmp, dpi=150, format="png"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", nargs="?", help="a file of benchmarks/experiments; none: list them")
    parser.add_argument("tables", nargs="*", help="only these of its tables")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="another setting, for all cells"
    )
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if args.experiment is None:
        for path in sorted((HERE / "experiments").glob("*.yaml")):
            print(f"{path.stem:12} {yaml.safe_load(path.read_text())['about'].strip().splitlines()[0]}")
        return
    experiment = read(args.experiment, args.set)
    if unknown := set(args.tables) - set(experiment["tables"]):
        sys.exit(f"no table {', '.join(sorted(unknown))}; there are {', '.join(experiment['tables'])}")
    output = args.output or Path("out-benchmarks") / f"{args.experiment}.json"
    known = json.loads(output.read_text()) if output.exists() else {}
    rows = known.get("rows", []) if isinstance(known, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "cell" in row for row in rows):
        sys.exit(f"{output} holds something else; choose another --output")
    sys.path.insert(0, str(HERE))
    measure = importlib.import_module(f"measures.{experiment['measure']}").Measure()
    found: dict[str, Row] = {key_of(row["cell"]): row for row in rows}
    for table in args.tables or experiment["tables"]:
        cells = cells_of(experiment, table)
        for cell in cells:
            key = key_of(cell)
            if key not in found:
                begin = time.perf_counter()
                row = {"cell": cell, **measure(cell)}
                found[key] = {**row, "seconds": round(time.perf_counter() - begin, 1)}
                command = shlex.join(["python", "benchmarks/run.py", *sys.argv[1:]])
                facts = {"command": command, "rows": list(found.values()), "environment": measure.environment()}
                write_json(output, facts)
                print(markdown(experiment["columns"], [found[key]]).splitlines()[-1], flush=True)
        print(f"\n{table}\n" + markdown(experiment["columns"], [found[key_of(cell)] for cell in cells]))
    if "plot" in experiment:
        plot(experiment, found, output.with_suffix(".png"))


if __name__ == "__main__":
    main()
