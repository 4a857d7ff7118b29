"""The model card: the README.md that an adapter is published with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from caprese.models import TERMS
from caprese.report import sources, summary
from caprese.report.plots import CAPTIONS, plot_names

LOAD_SNIPPET = """\
import caprese
model, tokenizer = caprese.load_base({base})
model = caprese.load(model, "{adapter}")"""

_CARD = """\
---
{front_matter}---

# {title}

{headline}

{kind}, distilled with caprese from the dense model's own completions.

## Results

{table}

{legend}

{sources}{plots}

## Use

```python
{snippet}
```

## Facts

{facts}

## Reproduce

```sh
{command}
```

The resolved recipe:

```yaml
{recipe}```
"""


def render_card(report: dict[str, Any], repo: str | None = None) -> str:
    """The model card of a run, with its plots expected in `plots/` beside it.

    Args:
        repo: where on the hub it is published.
    """
    report = summary.portable(report)
    base, revision = report["model_id"], report.get("revision")
    command = report["command"]
    if repo is not None:
        command = f"hf download {repo} recipe.yaml --local-dir .\n{command}"
    return _CARD.format(
        front_matter=front_matter(base, revision, report["method"].split("+"), report),
        title=summary.title(report),
        headline=summary.headline(report),
        kind=f"{trained} and a recovery adapter, which caprese loads together"
        if (trained := summary.trained(report["method"].split("+")))
        else "An ordinary PEFT LoRA adapter",
        table=_table(report),
        legend=summary.LEGEND,
        sources=_sources(report),
        plots="\n\n".join(f"![{CAPTIONS[name]}](plots/{name}.png)" for name in plot_names(report)),
        snippet=LOAD_SNIPPET.format(base=load_arguments(base, revision), adapter=repo or "<this directory or repo>"),
        facts="\n".join(f"- {label}: {text}" for label, text in summary.facts(report)),
        command=command,
        recipe=summary.recipe_yaml(report),
    )


def load_arguments(base: str, revision: str | None) -> str:
    return f'"{base}"' + (f', revision="{revision}"' if revision else "")


def front_matter(base: str, revision: str | None, methods: list[str], terms: Mapping[str, Any]) -> str:
    """The card's YAML: what the hub shows, filters and links by.

    Args:
        terms: license, license_name and license_link, as far as they are known.
    """
    fields: dict[str, Any] = {
        "base_model": base,
        **({"base_model_revision": revision} if revision else {}),
        "base_model_relation": "adapter",
        # PEFT alone would load the adapter without what else was trained
        "library_name": "caprese" if summary.trained(methods) else "peft",
        "pipeline_tag": "text-generation",
        "tags": ["caprese", *([] if summary.trained(methods) else ["lora"]), *methods],
        **{key: terms[key] for key in TERMS if terms.get(key)},
    }
    text: str = yaml.safe_dump(fields, sort_keys=False)
    return text


def _table(report: dict[str, Any]) -> str:
    return _markdown(["", *summary.COLUMNS], [[variant, *cells] for variant, cells in summary.rows(report)])


def _sources(report: dict[str, Any]) -> str:
    rows = sources.source_rows(report)
    if not rows:
        return ""
    parts = [_markdown(list(sources.COLUMNS), rows), sources.LEGEND, sources.source_warning(report)]
    return "".join(f"{part}\n\n" for part in parts if part)


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *("---:" for _ in head[1:])], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
