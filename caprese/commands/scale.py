"""`caprese scale`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from caprese.commands.options import Adapter, Device, Dtype, Json, Model, Seed
from caprese.progress import say, show


def scale(
    model: Model,
    adapter: Adapter,
    samples: Annotated[int, typer.Option(help="N: completions of each problem.", min=1)] = 64,
    problems: Annotated[int, typer.Option(help="Problems.", min=1)] = 32,
    prompts: Annotated[
        str | None, typer.Option(help="gym:TASK, chains:test, a file or a dataset; with answers.")
    ] = None,
    column: Annotated[str | None, typer.Option(help="Column that holds the prompt.")] = None,
    contenders: Annotated[
        str | None, typer.Option(help="Only these, with commas: dense, efficient, recovered.")
    ] = None,
    reselect_every: Annotated[
        int | None,
        typer.Option(help="One more contender: recovered, choosing anew so often; 0 none.", min=0, show_default="32"),
    ] = None,
    reward: Annotated[
        str | None,
        typer.Option(help="What weights best-of-N: a sequence classifier, causal:MODEL, oracle, or chains (verifier)."),
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Length limit of a completion.", min=2)] = None,
    temperature: Annotated[float | None, typer.Option(help="As in the adapter's recipe if not given.")] = None,
    revision: Annotated[str | None, typer.Option(help="Hub revision of the model.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace samples of other settings.")] = False,
    output: Annotated[
        str, typer.Option("--output", "-o", help="Directory for samples, scale.json and plot.")
    ] = "scale",
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be drawn; draw nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Accuracy at equal time: many samples of a cheaper model against fewer of the dense one. Goes on where it was."""
    import shlex
    import sys

    from caprese.recovery.finished import Sampling, plan_scaling, scale_adapter
    from caprese.report.scaling import describe_scaling
    from caprese.report.tables import figures_table

    given = {"prompts": prompts, "column": column, "max_new_tokens": max_new_tokens, "temperature": temperature}
    only = contenders.split(",") if contenders else None
    sampling = Sampling(samples, problems, given, only, reselect_every, reward, seed)
    if dry_run:
        show(plan_scaling(adapter, sampling), as_json, lambda found: [figures_table("scale", found)])
        return
    how: dict[str, Any] = {"revision": revision, "dtype": dtype, "device": device}
    command = shlex.join(["caprese", *sys.argv[1:]])
    result = scale_adapter(adapter, model, sampling, output, command=command, overwrite=overwrite, **how)
    show(result, as_json, describe_scaling)
    say(f"{Path(output) / 'scale.json'}, scale.png")
