"""The report's page, card, plots and terminal table, from a report such as a run writes."""

from __future__ import annotations

import copy
import io
import math
import re
import struct
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from caprese.progress import show
from caprese.report.card import render_card
from caprese.report.html import render_html
from caprese.report.plots import plot_names, plot_uris, write_plots
from caprese.report.sources import source_warning
from caprese.report.summary import portable, summary_lines, summary_table
from caprese.report.tables import describe_recovery, figures_table

LAYERS = list(range(30))
VOID = {"meta", "img", "source", "br", "hr", "link", "input"}


def make_report() -> dict[str, Any]:
    """A report of smollm2-135m with griffin, as a run on a laptop would write it."""
    question = "Natalia sold 48 clips in April and half as many in May. How many did she sell altogether?"
    return {
        "caprese_version": "0.1.0",
        "created": "2025-06-01T12:00:00+00:00",
        "command": "caprese recover smollm2-135m --method griffin --sparsity 0.5 --out runs/smollm2-135m-griffin",
        "model": "smollm2-135m",
        "model_id": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "revision": "12fd25f77366fa6b3b4b768ec3050bf629380bac",
        "fingerprint": "sha256:0b1f4c57d2",
        "license": "apache-2.0",
        "method": "griffin",
        "sparsity": 0.5,
        "rank": [32 + 16 * (layer % 4) for layer in LAYERS],
        "layers": LAYERS,
        "seed": 0,
        "parameters": {
            "base": 134_515_008,
            "adapter": 1_935_360,
            "fraction": 0.01439,
            "active_dense": 134_515_008,
            "active_efficient": 94_701_888,
            "active_recovered": 96_637_248,
        },
        "quality": {
            "dense": {"kl": 0.0, "top1_agreement": 1.0, "perplexity": 2.31, "accuracy": 0.42, "mean_new_tokens": 118.2},
            "efficient": {
                "kl": 0.4127,
                "top1_agreement": 0.812,
                "perplexity": 3.58,
                "accuracy": 0.21,
                "mean_new_tokens": 131.0,
            },
            "recovered": {
                "kl": 0.1033,
                "top1_agreement": 0.903,
                "perplexity": 2.57,
                "accuracy": 0.36,
                "mean_new_tokens": 120.5,
            },
        },
        "recovered_fraction": {"kl": 0.7497, "accuracy": 0.714},
        "latency": {
            "dense": {"ttnt_ms": 41.8, "spread_ms": 1.1},
            "efficient": {"ttnt_ms": 30.9, "spread_ms": 0.8},
            "recovered": {"ttnt_ms": 31.6, "spread_ms": 0.9},
            "ratio": 0.756,
            "floor_ratio": 0.718,
        },
        "layers_error": [
            {
                "layer": layer,
                "rank": 32 + 16 * (layer % 4),
                "efficient": 0.35 + 0.1 * math.sin(layer / 3),
                "recovered": 0.2 + 0.05 * math.cos(layer / 4),
            }
            for layer in LAYERS
        ],
        "stages": [
            {"name": "samples", "seconds": 812.4, "kept": True, "note": "1,200 completions in 3 shards"},
            {"name": "layerwise", "seconds": 203.0, "peak_bytes": 3_214_000_000, "kept": True, "note": "closed form"},
            {"name": "end_to_end", "seconds": 4210.9, "kept": True, "note": "validation KL 0.2114 to 0.1033"},
            {"name": "evaluation", "seconds": 38.2, "kept": True, "note": ""},
        ],
        "curves": {
            "end_to_end": [
                {
                    "step": s,
                    "epoch": s / 100,
                    "loss": 0.1 + 0.2 * math.exp(-s / 80) + 0.03 * math.sin(s * s),
                    "lr": 1e-4,
                }
                for s in range(1, 301)
            ],
            "validation": [
                {"stage": "efficient", "step": 0, "kl": 0.4127},
                {"stage": "layerwise", "step": 0, "kl": 0.2114},
                {"stage": "end_to_end", "step": 100, "kl": 0.1404},
                {"stage": "end_to_end", "step": 200, "kl": 0.1122},
                {"stage": "end_to_end", "step": 300, "kl": 0.1033},
            ],
            "rank_error": {"ranks": [8, 16, 32, 64, 128], "error": [0.41, 0.36, 0.29, 0.22, 0.16]},
        },
        "samples": {
            "train": {"samples": 1000, "prompt_tokens": 94_210, "completion_tokens": 118_200},
            "validation": {"samples": 100, "prompt_tokens": 9_402, "completion_tokens": 11_811},
            "test": {"samples": 100, "prompt_tokens": 9_377, "completion_tokens": 11_903},
        },
        "environment": {
            "torch": "2.9.0",
            "transformers": "5.0.0",
            "peft": "0.18.0",
            "device": "cpu",
            "dtype": "float32",
            "threads": 8,
            "cpu": "AMD EPYC 7763",
        },
        "completions": [
            {
                "prompt": question,
                "answer": "72",
                "dense": "In May she sold 48 / 2 = 24 clips.\nAltogether 48 + 24 = 72.\n#### 72",
                "efficient": "In May she sold 48 * 2 = 96 clips.\n#### 144" + " and so on" * 40,
                "recovered": "Half of 48 is 24, so 48 + 24 = 72.\n#### 72",
            },
            {
                "prompt": "Write a page's markup.",
                "answer": None,
                "dense": "<script>alert('dense')</script>",
                "efficient": '</pre></main><img src="https://example.com/x.png" onerror="alert(1)">',
                "recovered": "<SCRIPT SRC=http://example.com/x.js></SCRIPT>" + "A" * 300,
            },
        ],
        "recipe": {
            "model": "smollm2-135m",
            "method": {"name": "griffin", "sparsity": 0.5},
            "adapter": {"rank": 64},
            "prompts": {"source": "openai/gsm8k", "stop": ["</s>"], "system": "/no_think"},
            "seed": 0,
        },
    }


@pytest.fixture
def report() -> dict[str, Any]:
    """A fresh report, free to be changed."""
    return make_report()


@pytest.fixture(scope="module")
def page() -> str:
    """The page of the full report."""
    return render_html(make_report())


@pytest.fixture
def bare(report: dict[str, Any]) -> dict[str, Any]:
    """The same run with all that may be missing left out: no answers, no training, no latency, no license."""
    for quality in report["quality"].values():
        quality.update(accuracy=None, mean_new_tokens=None)
    report["recovered_fraction"]["accuracy"] = None
    report.update(latency=None, license=None, revision=None, rank=64)
    report["curves"] = {"end_to_end": [], "validation": [], "rank_error": {"ranks": [], "error": []}}
    return report


class Page(HTMLParser):
    """Checks that tags nest, and keeps what a page is made of."""

    def __init__(self, text: str) -> None:
        """Parse the whole of `text`."""
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.handlers: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Count the tag and what it would load or run."""
        self.tags.append(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "srcset", "href", "data", "action")]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        """A tag closes the one opened last."""
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        """Keep the text."""
        self.texts.append(data)


def front_matter(card: str) -> dict[str, Any]:
    """The card's YAML header."""
    fields: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return fields


def test_page_is_well_formed_and_loads_nothing(page: str) -> None:
    parsed = Page(page)
    assert not parsed.open
    assert parsed.loads and all(uri.startswith("data:image/svg+xml;base64,") for uri in parsed.loads)
    assert not {"script", "link", "iframe"} & set(parsed.tags)
    assert not re.search(r"url\(|@import", page)


def test_page_escapes_what_models_wrote(page: str) -> None:
    parsed = Page(page)
    assert "script" not in parsed.tags and not parsed.handlers
    for completion in make_report()["completions"]:
        for variant in ("dense", "efficient", "recovered"):
            assert completion[variant] in parsed.texts


def test_page_order(page: str) -> None:
    body = page[page.index("<body>") :]
    marks = ["<h1>", "75% in KL divergence", '<table class="results">', "Key facts"]
    marks += [
        'id="pareto"',
        'id="layers"',
        'id="training"',
        ">Stages<",
        ">Sample completions<",
        ">Recipe<",
        ">Command<",
    ]
    places = [body.index(mark) for mark in marks]
    assert places == sorted(places)


def test_page_table_says_the_numbers(page: str) -> None:
    row = page[page.index('<tr class="recovered">') :].split("</tr>")[0]
    assert re.findall("<td>(.*?)</td>", row) == ["0.1033", "90.3%", "2.57", "36.0%", "120.5", "31.60 ± 0.90"]


def test_missing_parts(bare: dict[str, Any], tmp_path: Path) -> None:
    text = render_html(bare)
    assert not Page(text).open
    assert 'id="training"' not in text and "None" not in text
    card = render_card(bare)
    assert "license" not in front_matter(card) and "training.png" not in card and "None" not in card
    assert [path.name for path in write_plots(bare, tmp_path)] == ["pareto.png", "layers.png"]
    assert any("75% in KL divergence" in line for line in summary_lines(bare))


def test_numbers_that_are_not_finite(report: dict[str, Any]) -> None:
    report["quality"]["efficient"].update(kl=float("nan"), perplexity=float("inf"))
    report["curves"]["end_to_end"][5]["loss"] = float("nan")
    report["layers_error"][3]["recovered"] = None
    assert set(plot_uris(report)) == {"pareto", "layers", "training", "rank"}
    assert not Page(render_html(report)).open


def test_plots_are_images(report: dict[str, Any], tmp_path: Path) -> None:
    paths = write_plots(report, tmp_path / "plots")
    assert [path.stem for path in paths] == plot_names(report) == ["pareto", "layers", "training", "rank"]
    for path in paths:
        image = path.read_bytes()
        assert image.startswith(b"\x89PNG\r\n\x1a\n") and image[-8:-4] == b"IEND"
        width, height = struct.unpack(">II", image[16:24])
        assert width > 600 and height > 300 and len(image) > 5000


def test_plots_follow_the_theme(report: dict[str, Any]) -> None:
    light, dark = plot_uris(report), plot_uris(report, dark=True)
    assert light == plot_uris(report)  # the same report gives the same file
    assert all(light[name] != dark[name] for name in light)


def test_card_front_matter(report: dict[str, Any]) -> None:
    assert front_matter(render_card(report)) == {
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "base_model_revision": report["revision"],
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["caprese", "lora", "griffin"],
        "license": "apache-2.0",
    }


def test_card_body(report: dict[str, Any]) -> None:
    card = render_card(report)
    assert "| recovered | 0.1033 | 90.3% | 2.57 | 36.0% | 120.5 | 31.60 ± 0.90 |" in card
    assert all(f"(plots/{name}.png)" in card for name in plot_names(report))
    revision = report["revision"]
    assert f'caprese.load_base("HuggingFaceTB/SmolLM2-135M-Instruct", revision="{revision}")' in card
    assert report["command"] in card
    assert yaml.safe_load(card.split("```yaml\n")[1].split("```")[0]) == report["recipe"]


def test_no_local_path_is_published(report: dict[str, Any]) -> None:
    report["model"] = report["model_id"] = "/home/anna/models/my-llama/"
    report["command"] = (
        "/home/anna/bin/caprese recover /home/anna/models/my-llama --out='/home/anna/My Runs/one' -c ~/x/y"
    )
    report["recipe"]["out"] = Path("/home/anna/runs/one")
    report["recipe"]["prompts"]["cache"] = "file:///home/anna/cache"
    report["stages"][0]["note"] = "resumed from /home/anna/runs/one/shards"
    for text in (render_card(report), render_html(report), " ".join(summary_lines(report))):
        assert "anna" not in text and "/home" not in text
    card = render_card(report)
    assert front_matter(card)["base_model"] == "my-llama" and 'load_base("my-llama"' in card
    assert "caprese recover my-llama --out='one' -c y" in card


def test_portable_leaves_the_rest_alone(report: dict[str, Any]) -> None:
    report["recipe"]["url"] = "https://example.com/a/b"
    report["recipe"]["local"] = "runs/one/two"
    report["completions"][0]["dense"] = "cat /etc/hosts/x"
    before = copy.deepcopy(report)
    assert portable(report) == before == report


def test_terminal_table(
    report: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    report["method"] = "griffin[red]"  # not markup
    monkeypatch.setenv("COLUMNS", "120")
    show(report, False, lambda found: [summary_table(found)])
    text = capsys.readouterr().out
    assert "griffin[red]" in text
    rows = [line for line in text.splitlines() if "0.4127" in line or "0.1033" in line]
    assert "efficient" in rows[0] and "81.2%" in rows[0] and "recovered" in rows[1] and "31.60" in rows[1]


def test_stages_show_their_peak_memory_where_it_is_known(report: dict[str, Any]) -> None:
    page = render_html(report)
    assert "<td>3 min 23 s</td>\n<td>3.21 GB</td>" in page
    report["stages"][1]["peak_bytes"] = None
    assert "<td>3 min 23 s</td>\n<td>–</td>" in render_html(report)


def test_terminal_lines(report: dict[str, Any]) -> None:
    report["stages"][2]["kept"] = False
    text = "\n".join(summary_lines(report))
    assert "Recovered: 75% in KL divergence and 71% in accuracy" in text
    assert "1,935,360 parameters (1.44% of the base)" in text
    assert "0.76 (byte floor 0.72)" in text
    assert "end_to_end 1 h 10 min (not kept)" in text


def by_source(**fractions: float) -> dict[str, Any]:
    """A report's `sources` with these parts recovered."""
    return {
        name.replace("_", ":", 1): {
            "samples": 24,
            "quality": {"dense": {"kl": 0.0}, "efficient": {"kl": 2.0}, "recovered": {"kl": 2.0 * (1 - fraction)}},
            "recovered_fraction": fraction,
        }
        for name, fraction in fractions.items()
    }


def test_every_kind_of_prompts_is_said(report: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    report["sources"] = by_source(gym_gsm_symbolic=0.7, self=0.5, elsewhere=0.45)
    page, card = render_html(report), render_card(report)
    assert (
        "| gym:gsm_symbolic | 24 | 2.0000 | 0.6000 | 70% |" in card
        and "| elsewhere | 24 | 2.0000 | 1.1000 | 45% |" in card
    )
    assert "By kind of prompts" in page and "<td>45%</td>" in page
    assert "(45% in KL elsewhere)" in card
    show(report, False, describe_recovery)
    shown = capsys.readouterr().out
    assert "elsewhere" in shown and "45%" in shown
    assert source_warning(report) is None


@pytest.mark.parametrize(
    ("elsewhere", "says"),
    [(0.3, "on its own kinds 75%"), (-0.1, "makes it worse"), (0.38, None)],
)
def test_too_little_elsewhere_is_warned_of(report: dict[str, Any], elsewhere: float, says: str | None) -> None:
    report["sources"] = by_source(self=0.75, elsewhere=elsewhere)
    warning = source_warning(report)
    assert (warning is None) == (says is None) and (says is None or says in str(warning))
    for text in (render_html(report), render_card(report)):
        assert (says in text) if says else ("distil on more kinds" not in text and "makes it worse" not in text)


def test_a_report_without_kinds_has_no_such_table(report: dict[str, Any]) -> None:
    assert "By kind of prompts" not in render_html(report) and "elsewhere" not in render_card(report)


def test_figures_are_shown_as_what_they_are():
    console = Console(width=60, file=io.StringIO())
    console.print(figures_table("of", {"fits": True, "fused": False, "tokens": 12345, "why_not": None}))
    shown = console.file.getvalue()
    assert "yes" in shown and "no" in shown.split("fused")[1] and "12,345" in shown and "why" not in shown
