"""What a report says in words and rows; the terminal, the HTML page and the model card all take it from here."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import yaml
from rich import box
from rich.table import Table

from caprese.efficient_methods import known_methods, make_method
from caprese.errors import CapreseError

VARIANTS = ("dense", "efficient", "recovered")
COLUMNS = ("KL ↓", "Top-1 ↑", "Perplexity ↓", "Accuracy ↑", "New tokens", "TTNT ms ↓")
LEGEND = (
    "KL divergence and top-1 agreement compare next-token predictions with the dense model's. "
    "New tokens is the mean length of a completion; TTNT is the time to the next token. – is not measured."
)
MISSING = "–"

# An absolute path: of two parts at least, since a lone "/word" is more often a prompt's switch than a place.
_PART = r"""[^\s'"/\\=,;<>|]+"""
_PATH = re.compile(
    rf"""(?<![^\s'"=,(\[:])(?:(?:file://|~[\w.-]*|[A-Za-z]:)(?:[/\\]{_PART})+|(?:/{_PART}){{2,}})[/\\]?"""
)
_QUOTED_PATH = re.compile(r"""(['"])(?:file://|~|[A-Za-z]:[/\\]|/)[^'"\n]*[/\\]([^'"/\\\n]+)[/\\]?\1""")


def portable(report: dict[str, Any]) -> dict[str, Any]:
    """The report as it may be published: each absolute path cut down to its last part, and so is a local model."""
    # what a model wrote is quoted as it is: a path in there is not ours
    out = {key: value if key == "completions" else _without_paths(value) for key, value in report.items()}
    for key in ("model", "model_id"):
        if str(report.get(key, "")).startswith((".", "/", "~")):
            out[key] = _last_part(report[key])
    return out


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_paths(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_without_paths(v) for v in value]
    if not isinstance(value, str):
        return value
    return _PATH.sub(lambda match: _last_part(match[0]), _QUOTED_PATH.sub(r"\1\2\1", value))


def _last_part(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def number(value: float | None, spec: str = ".2f") -> str:
    """`value` by the format `spec`, or a dash where there is none."""
    return MISSING if value is None or math.isnan(value) else format(value, spec)


def ratio(part: float | None, whole: float | None) -> float | None:
    """`part / whole` where both are known."""
    return part / whole if part is not None and whole else None


def duration(seconds: float) -> str:
    """Seconds as a person would say them."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def memory(nbytes: int | None) -> str:
    """Bytes in gigabytes, where they are known."""
    return MISSING if nbytes is None else f"{nbytes / 1e9:.2f} GB"


def spans(numbers: list[int]) -> str:
    """`[0, 1, 2, 5]` as `0–2, 5`."""
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in runs)


def rank_text(rank: int | list[int]) -> str:
    """One rank, or the range of the layers' ranks."""
    if isinstance(rank, int):
        return str(rank)
    return str(rank[0]) if len(set(rank)) == 1 else f"{min(rank)}–{max(rank)} (mean {sum(rank) / len(rank):.1f})"


def rows(report: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """The result table: for each variant its name and a cell for each of `COLUMNS`."""
    table = []
    for variant in VARIANTS:
        quality = report["quality"].get(variant) or {}
        latency = (report.get("latency") or {}).get(variant) or {}
        ttnt = number(latency.get("ttnt_ms"))
        if latency.get("spread_ms") is not None:
            ttnt += f" ± {number(latency['spread_ms'])}"
        cells = [
            number(quality.get("kl"), ".4f"),
            number(quality.get("top1_agreement"), ".1%"),
            number(quality.get("perplexity")),
            number(quality.get("accuracy"), ".1%"),
            number(quality.get("mean_new_tokens"), ".1f"),
            ttnt,
        ]
        table.append((variant, cells))
    return table


def recovered(report: dict[str, Any]) -> str | None:
    """How much of the lost quality came back, or None where that was not measured."""
    names = {"kl": "KL divergence", "accuracy": "accuracy"}
    fractions = report.get("recovered_fraction") or {}
    known = {name: fractions[key] for key, name in names.items() if fractions.get(key) is not None}
    text = " and ".join(f"{number(fraction, '.0%')} in {name}" for name, fraction in known.items()) or None
    elsewhere = ((report.get("sources") or {}).get("elsewhere") or {}).get("recovered_fraction")
    return text if text is None or elsewhere is None else f"{text} ({number(elsewhere, '.0%')} in KL elsewhere)"


def headline(report: dict[str, Any]) -> str:
    """The run in a sentence or two."""
    report = portable(report)
    share = number(report["parameters"]["fraction"], ".2%")
    what = f"a low-rank adapter of {share} of its parameters"
    if count := report["parameters"].get("mixers"):
        what = f"distilling {count:,} parameters of {trained(report['method'].split('+'))}"
    sentence = f"{report['model_id']} made cheaper with {method_text(report)}, then repaired by {what}"
    fraction = recovered(report)
    return f"{sentence}. Of the quality lost, it recovers {fraction}." if fraction else f"{sentence}."


def method_text(report: dict[str, Any]) -> str:
    """The methods with their sparsity: "griffin 50%", "static 30% + cats 50%", and when it reselects."""
    methods = report.get("methods") or [{"name": report["method"], "sparsity": report.get("sparsity")}]
    every = report.get("reselect_every")
    prompts = ", on prompts too" if report.get("prefill") == "efficient" else ""
    return " + ".join(map(_in_words, methods)) + prompts + (f", reselected every {every} tokens" if every else "")


def _in_words(facts: Mapping[str, Any]) -> str:
    """A method by its name and settings; the name alone where it is not known here."""
    try:
        return make_method({key: value for key, value in facts.items() if value is not None}).in_words()
    except CapreseError:
        return str(facts["name"])


def trained(methods: Iterable[str]) -> str:
    """What methods of these names train beside the adapter, in words; empty for nothing."""
    known = known_methods()
    return " and ".join(filter(None, (known[name].trains for name in methods if name in known)))


def title(report: dict[str, Any]) -> str:
    """Model, method and sparsity: what tells one run from another."""
    report = portable(report)
    return f"{report['model']}, {method_text(report)}"


def facts(report: dict[str, Any]) -> list[tuple[str, str]]:
    """The run's key facts as (label, text)."""
    report = portable(report)
    parameters, latency, environment = report["parameters"], report.get("latency") or {}, report["environment"]
    revision = report.get("revision")
    dense = parameters.get("active_dense")
    active = []
    for variant in VARIANTS:
        count = parameters.get(f"active_{variant}")
        share = "" if variant == "dense" else f" ({number(ratio(count, dense), '.1%')})"
        active.append(f"{variant} {number(count, ',')}{share}")
    samples = [
        f"{split} {number(s['samples'], ',')} ({number(s['completion_tokens'], ',')} completion tokens)"
        for split, s in report["samples"].items()
    ]
    out = [
        ("Model", report["model_id"] + (f" @ {revision[:12]}" if revision else "")),
        ("Method", method_text(report)),
        ("Rank", rank_text(report["rank"])),
        ("Layers", f"{len(report['layers'])} ({spans(report['layers'])})"),
        ("Adapter", f"{parameters['adapter']:,} parameters ({number(parameters['fraction'], '.2%')} of the base)"),
        (trained(report["method"].split("+")), _trained(report)),
        ("Active parameters", "; ".join(active)),
        ("Samples", "; ".join(samples)),
        ("Seed", str(report["seed"])),
        ("Environment", ", ".join(_setting(k, v) for k, v in environment.items() if v is not None)),
        ("Base fingerprint", report["fingerprint"]),
        ("Created", f"{report['created']} by caprese {report['caprese_version']}"),
    ]
    if latency.get("ratio") is not None:
        out.insert(6, ("TTNT ratio", f"{number(latency['ratio'])} (byte floor {number(latency.get('floor_ratio'))})"))
    return [(label, text) for label, text in out if text]


def _trained(report: dict[str, Any]) -> str:
    if not (count := report["parameters"].get("mixers")):
        return ""
    without = f", started without their attention's {', '.join(lost)}" if (lost := report.get("lost")) else ""
    return f"{count:,} parameters, trained{without}"


def _setting(name: str, value: Any) -> str:
    if name == "threads":
        return f"{value} threads"
    return str(value) if name in ("device", "dtype", "cpu") else f"{name} {value}"


def recipe_yaml(report: dict[str, Any]) -> str:
    """The resolved recipe as YAML."""
    plain = json.loads(json.dumps(report["recipe"], default=str))  # paths and enums to strings
    text: str = yaml.safe_dump(_without_paths(plain), sort_keys=False, allow_unicode=True, width=100)
    return text


def summary_table(report: dict[str, Any]) -> Table:
    """The result table for the terminal."""
    table = Table(title=title(report), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    # the spread of TTNT stays with the report: a terminal has 80 columns
    filled = [(name, [*cells[:-1], cells[-1].split(" ±")[0]]) for name, cells in rows(report)]
    table.add_column("", no_wrap=True, min_width=max(map(len, VARIANTS)))
    for i, column in enumerate(COLUMNS):  # on a narrow terminal headings wrap, figures do not
        table.add_column(column, justify="right", min_width=max(len(cells[i]) for _, cells in filled))
    for variant, cells in filled:
        table.add_row(variant, *cells, style="bold" if variant == "recovered" else None)
    return table


def summary_lines(report: dict[str, Any]) -> list[str]:
    """The few lines below the table, without markup."""
    wanted = ("Adapter", trained(report["method"].split("+")), "Active parameters", "TTNT ratio")
    lines = [f"Recovered: {recovered(report) or 'not measured'}"]
    lines += [f"{label}: {text}" for label, text in facts(report) if label in wanted]
    if stages := report["stages"]:
        each = ", ".join(f"{s['name']} {duration(s['seconds'])}{'' if s['kept'] else ' (not kept)'}" for s in stages)
        lines.append(f"Time: {duration(sum(s['seconds'] for s in stages))} ({each})")
    return lines
