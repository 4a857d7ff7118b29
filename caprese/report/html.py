"""The report as one HTML file that needs nothing else: no network, no script, plots embedded."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, StrictUndefined

from caprese.report import sources, summary
from caprese.report.plots import CAPTIONS, plot_uris

# Completions are whatever a model wrote: autoescape quotes them, and the policy below lets nothing run or load.
_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{{ title }} · caprese</title>
<style>
:root { --ink: #24292b; --muted: #5f686d; --line: #dfe3e4; --page: #f6f7f6; --card: #fff; --code: #f1f3f3;
  --shade: #0003; --efficient: #c23e22; --recovered: #0a7a6d; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaeb; --muted: #a0a9ad; --line: #343b3e; --page: #14181a;
  --card: #1c2124; --code: #14181a; --shade: #000c; --efficient: #ff8063; --recovered: #3cc7b5; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 2rem 1rem 4rem; }
h1 { font-size: clamp(1.45rem, 4vw, 2rem); line-height: 1.2; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; }
h3 { font-size: .8rem; margin: 0 0 .35rem; color: var(--muted); }
p { margin: 0 0 1rem; overflow-wrap: anywhere; }
.lead { font-size: 1.08rem; max-width: 46rem; margin-bottom: 1.5rem; }
.note { color: var(--muted); font-size: .85rem; max-width: 46rem; margin-top: .6rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
/* a shade on the right edge for as long as there is more to scroll to */
.scroll { overflow-x: auto; background: linear-gradient(to right, transparent, var(--card) 60%) right / 3rem 100%
  no-repeat local, linear-gradient(to left, var(--shade), transparent) right / 1rem 100% no-repeat, var(--card); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .6rem .9rem; text-align: right; white-space: nowrap; border-top: 1px solid var(--line); }
thead th { border-top: 0; color: var(--muted); font-size: .82rem; font-weight: 600; }
th:first-child, td:first-child { text-align: left; }
.results th:first-child { position: sticky; left: 0; background: var(--card); }
.stages :is(th, td):nth-child(n+4) { text-align: left; }
.stages td:last-child { white-space: normal; min-width: 13rem; }
.efficient { color: var(--efficient); }
.recovered { color: var(--recovered); }
.results tr.recovered td { font-weight: 600; }
dl { display: grid; grid-template-columns: 10rem 1fr; margin: 0; padding: .4rem 1rem; }
dt, dd { margin: 0; padding: .4rem 0; }
dt { color: var(--muted); }
dd { overflow-wrap: anywhere; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 1rem; }
figure { margin: 0; padding: .9rem; }
figure img { display: block; width: 100%; max-width: 560px; margin: 0 auto; height: auto; }
figcaption { color: var(--muted); font-size: .88rem; margin-top: .6rem; }
details { margin-bottom: .8rem; padding: .7rem 1rem; }
summary { cursor: pointer; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
details[open] summary { margin-bottom: .8rem; }
.three { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 1rem; margin-top: .8rem; }
pre { margin: 0; padding: .7rem .8rem; background: var(--code); border-radius: 6px; font: .84rem/1.5 ui-monospace,
  monospace; white-space: pre-wrap; overflow-wrap: anywhere; max-height: 24rem; overflow-y: auto; }
pre.whole { max-height: none; border: 1px solid var(--line); }
@media (max-width: 640px) {
  main { padding: 1.25rem .8rem 3rem; }
  th, td { padding: .55rem .6rem; font-size: .92rem; }
  dl { grid-template-columns: 1fr; } dt { padding-bottom: 0; font-size: .85rem; } dd { padding-top: 0; }
  .three { grid-template-columns: 1fr; }
  figure { padding: .6rem; }
}
</style>
</head>
<body>
<main>
<h1>{{ title }}</h1>
<p class="lead">{{ headline }}</p>

<div class="card scroll" tabindex="0" role="region" aria-label="Results">
<table class="results">
<thead><tr><th></th>{% for column in columns %}<th scope="col">{{ column }}</th>{% endfor %}</tr></thead>
<tbody>
{%- for variant, cells in rows %}
<tr class="{{ variant }}"><th scope="row">{{ variant }}</th>{% for cell in cells %}<td>{{ cell }}</td>{% endfor %}</tr>
{%- endfor %}
</tbody>
</table>
</div>
<p class="note">{{ legend }}</p>
{% if sources %}
<h2>By kind of prompts</h2>
<div class="card scroll" tabindex="0" role="region" aria-label="By kind of prompts">
<table>
<thead><tr>{% for column in source_columns %}<th scope="col">{{ column }}</th>{% endfor %}</tr></thead>
<tbody>
{%- for cells in sources %}
<tr><th scope="row">{{ cells[0] }}</th>{% for cell in cells[1:] %}<td>{{ cell }}</td>{% endfor %}</tr>
{%- endfor %}
</tbody>
</table>
</div>
{% if source_warning %}<p class="note efficient">{{ source_warning }}</p>{% endif %}
<p class="note">{{ source_legend }}</p>
{% endif %}
<h2>Key facts</h2>
<dl class="card">
{%- for label, text in facts %}
<dt>{{ label }}</dt><dd>{{ text }}</dd>
{%- endfor %}
</dl>
{% if plots %}
<h2>Plots</h2>
<div class="plots">
{%- for name, uri in plots.items() %}
<figure class="card" id="{{ name }}">
<picture><source media="(prefers-color-scheme: dark)" srcset="{{ dark_plots[name] }}">
<img src="{{ uri }}" alt="{{ captions[name] }}"></picture>
<figcaption>{{ captions[name] }}</figcaption>
</figure>
{%- endfor %}
</div>
{% endif %}{% if stages %}
<h2>Stages</h2>
<div class="card scroll" tabindex="0" role="region" aria-label="Stages">
<table class="stages">
<thead><tr><th scope="col">Stage</th><th scope="col">Time</th><th scope="col">Peak memory</th>
<th scope="col">Result</th><th scope="col">Note</th></tr></thead>
<tbody>
{%- for stage in stages %}
<tr><th scope="row">{{ stage.name | replace("_", " ") }}</th><td>{{ duration(stage.seconds) }}</td>
<td>{{ memory(stage.peak_bytes | default(none)) }}</td>
<td>{{ "kept" if stage.kept else "not kept" }}</td><td>{{ stage.note }}</td></tr>
{%- endfor %}
</tbody>
</table>
</div>
{% endif %}{% if completions %}
<h2>Sample completions</h2>
{%- for c in completions %}
<details class="card"{% if loop.index <= 3 %} open{% endif %}>
<summary dir="auto">{{ loop.index }}. {{ c.prompt[:120] }}</summary>
<h3>Prompt</h3><pre dir="auto">{{ c.prompt }}</pre>
{%- if c.answer is not none %}
<p class="note">Expected answer: {{ c.answer }}</p>
{%- endif %}
<div class="three">
{%- for variant in variants %}
<div><h3 class="{{ variant }}">{{ variant }}</h3><pre dir="auto">{{ c[variant] }}</pre></div>
{%- endfor %}
</div>
</details>
{%- endfor %}
{% endif %}
<h2>Recipe</h2>
<pre class="whole">{{ recipe }}</pre>
<h2>Command</h2>
<pre class="whole">{{ command }}</pre>
</main>
</body>
</html>
"""


def render_html(report: dict[str, Any]) -> str:
    """The whole report as a self-contained page."""
    report = summary.portable(report)
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(_TEMPLATE)
    return template.render(
        title=summary.title(report),
        headline=summary.headline(report),
        columns=summary.COLUMNS,
        rows=summary.rows(report),
        legend=summary.LEGEND,
        sources=sources.source_rows(report),
        source_columns=sources.COLUMNS,
        source_warning=sources.source_warning(report),
        source_legend=sources.LEGEND,
        facts=summary.facts(report),
        plots=plot_uris(report),
        dark_plots=plot_uris(report, dark=True),
        captions=CAPTIONS,
        stages=report["stages"],
        duration=summary.duration,
        memory=summary.memory,
        completions=report["completions"],
        variants=summary.VARIANTS,
        recipe=summary.recipe_yaml(report),
        command=report["command"],
    )
