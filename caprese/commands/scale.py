"""`caprese scale`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from caprese.commands.options import Adapter, Device, Dtype, Json, Model, Seed, parse_numbers
from caprese.progress import say, show


@dataclass(frozen=True)
class Flags:
    """What `caprese scale` takes."""

    model: Model
    adapter: Adapter
    samples: Annotated[
        str, typer.Option(help="N: completions of each problem, 1, 2, 4, ... of them timed; or several N, with commas.")
    ] = "64"
    problems: Annotated[int, typer.Option(help="Problems.", min=1)] = 32
    prompts: Annotated[str | None, typer.Option(help="gym:TASK, chains:test, a file or a dataset; with answers.")] = (
        None
    )
    column: Annotated[str | None, typer.Option(help="Column that holds the prompt.")] = None
    contenders: Annotated[
        str | None,
        typer.Option(help="Only these, with commas: dense, efficient, recovered, or other adapters of this base."),
    ] = None
    reselect_every: Annotated[
        int | None,
        typer.Option(help="One more contender: recovered, choosing anew so often; 0 none.", min=0, show_default="32"),
    ] = None
    reward: Annotated[
        str | None,
        typer.Option(help="What weights best-of-N: a sequence classifier, causal:MODEL, oracle, or chains (verifier)."),
    ] = None
    memory: Annotated[
        float | None,
        typer.Option(help="GB that the caches of samples drawn at once may take; 64 samples if not given."),
    ] = None
    max_new_tokens: Annotated[int | None, typer.Option(help="Length limit of a completion.", min=2)] = None
    temperature: Annotated[float | None, typer.Option(help="As in the adapter's recipe if not given.")] = None
    revision: Annotated[str | None, typer.Option(help="Hub revision of the model.")] = None
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace samples of other settings.")] = False
    output: Annotated[str, typer.Option("--output", "-o", help="Directory for samples, scale.json and plot.")] = "scale"
    seed: Seed = 0
    dtype: Dtype = "auto"
    device: Device = "auto"
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be drawn; draw nothing.")] = False
    as_json: Json = False


def scale(flags: Flags) -> None:
    """Accuracy at equal time: many samples of a cheaper model against fewer of the dense one. Goes on where it was."""
    import shlex
    import sys

    from caprese.recovery.finished import Sampling, plan_scaling, scale_adapter
    from caprese.report.scaling import describe_scaling
    from caprese.report.tables import figures_table

    given = {
        "prompts": flags.prompts,
        "column": flags.column,
        "max_new_tokens": flags.max_new_tokens,
        "temperature": flags.temperature,
    }
    only = flags.contenders.split(",") if flags.contenders else None
    numbers = parse_numbers(flags.samples, "give --samples N, or several with commas")
    sampling = Sampling(
        numbers if len(numbers) > 1 else numbers[0],
        flags.problems,
        given,
        only,
        flags.reselect_every,
        flags.reward,
        flags.memory,
        flags.seed,
    )
    if flags.dry_run:
        show(plan_scaling(flags.adapter, sampling), flags.as_json, lambda found: [figures_table("scale", found)])
        return
    how: dict[str, Any] = {"revision": flags.revision, "dtype": flags.dtype, "device": flags.device}
    command = shlex.join(["caprese", *sys.argv[1:]])
    result = scale_adapter(
        flags.adapter, flags.model, sampling, flags.output, command=command, overwrite=flags.overwrite, **how
    )
    show(result, flags.as_json, describe_scaling)
    say(f"{Path(flags.output) / 'scale.json'}, scale.png")
