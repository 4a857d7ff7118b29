"""The model card: the README.md that an adapter is published with."""

from __future__ import annotations

from typing import Any

import yaml

from caprese.evaluation import summary
from caprese.evaluation.plots import CAPTIONS, plot_names

LOAD_SNIPPET = """\
import caprese
model, tokenizer = caprese.load_base("{model}")
model = caprese.load(model, "<this directory or repo>")"""

_CARD = """\
---
{front_matter}---

# {title}

{headline}

An ordinary PEFT LoRA adapter, distilled with caprese from the dense model's own completions.

## Results

{table}

{legend}

{plots}

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


def render_card(report: dict[str, Any]) -> str:
    """The model card of a run, with its plots expected in `plots/` beside it."""
    report = summary.portable(report)
    return _CARD.format(
        front_matter=_front_matter(report),
        title=summary.title(report),
        headline=summary.headline(report),
        table=_table(report),
        legend=summary.LEGEND,
        plots="\n\n".join(f"![{CAPTIONS[name]}](plots/{name}.png)" for name in plot_names(report)),
        snippet=LOAD_SNIPPET.format(model=report["model_id"]),
        facts="\n".join(f"- {label}: {text}" for label, text in summary.facts(report)),
        command=report["command"],
        recipe=summary.recipe_yaml(report),
    )


def _front_matter(report: dict[str, Any]) -> str:
    fields = {
        "base_model": report["model_id"],
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["caprese", "lora", *report["method"].split("+")],
    }
    if report.get("license"):
        fields["license"] = report["license"]
    text: str = yaml.safe_dump(fields, sort_keys=False)
    return text


def _table(report: dict[str, Any]) -> str:
    lines = [["", *summary.COLUMNS], ["---", *("---:" for _ in summary.COLUMNS)]]
    lines += [[variant, *cells] for variant, cells in summary.rows(report)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
