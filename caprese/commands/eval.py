"""`caprese eval`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import typer

from caprese.commands.options import Adapter, Device, Dtype, Json, Model, Prompts, Reselect, parse_reselect
from caprese.errors import CapreseError
from caprese.progress import show

TASKS = "Of lm-eval's tasks"


@dataclass(frozen=True)
class Flags:
    """What `caprese eval` takes."""

    model: Model
    adapter: Adapter
    prompts: Annotated[
        str | None, typer.Option(help="gym:TASK, chains:SPLIT, a .jsonl or .parquet file, or a dataset.")
    ] = None
    column: Annotated[str | None, typer.Option(help="Column that holds the prompt.")] = None
    samples: Annotated[int, typer.Option(help="Prompts to ask.", min=1)] = 32
    max_new_tokens: Annotated[int | None, typer.Option(help="Length limit of a completion.", min=2)] = None
    latency_tokens: Annotated[int, typer.Option(help="Tokens over which TTNT is measured; 0 skips it.", min=0)] = 64
    reselect_every: Reselect = None
    prefill: Prompts = None
    tasks: Annotated[
        str | None,
        typer.Option(
            help="lm-eval tasks instead: names or YAML files, with commas (needs caprese\\[eval]).",
            rich_help_panel=TASKS,
        ),
    ] = None
    include_path: Annotated[
        str | None, typer.Option(help="A directory with more task YAMLs.", rich_help_panel=TASKS)
    ] = None
    limit: Annotated[int | None, typer.Option(help="Problems of each.", min=1, rich_help_panel=TASKS)] = None
    num_fewshot: Annotated[int | None, typer.Option(help="Examples in the context.", min=0, rich_help_panel=TASKS)] = (
        None
    )
    chat_template: Annotated[bool, typer.Option("--chat-template", help="As a chat.", rich_help_panel=TASKS)] = False
    batch_size: Annotated[int, typer.Option(help="Sequences together.", min=1, rich_help_panel=TASKS)] = 8
    output: Annotated[
        str, typer.Option("--output", "-o", help="Directory for lm-eval's results.", rich_help_panel=TASKS)
    ] = "eval"
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace results of other settings.", rich_help_panel=TASKS)
    ] = False
    seed: Annotated[
        int, typer.Option(help="Seed of which prompts are asked and of sampling.", min=0, max=2**32 - 1)
    ] = 1
    dtype: Dtype = "auto"
    device: Device = "auto"
    as_json: Json = False


def eval(flags: Flags) -> None:
    """Measure an adapter: dense, efficient and recovered side by side, on prompts, or on lm-eval's --tasks.

    What is not said is as in the recipe.yaml beside a local adapter; prompts it was trained on, by the samples/ there,
    are not asked.
    """
    from caprese.recovery.finished import evaluate_adapter, evaluate_tasks

    how: dict[str, Any] = {
        "reselect_every": parse_reselect(flags.reselect_every),
        "prefill": flags.prefill or "saved",
        "dtype": flags.dtype,
        "device": flags.device,
    }
    if flags.tasks is not None:
        from caprese.report.tasks import describe_tasks
        from caprese.studies.tasks import Tasks

        if flags.prompts is not None or flags.max_new_tokens is not None:
            raise CapreseError("--tasks brings its own prompts and lengths; leave out --prompts and --max-new-tokens")
        names = flags.tasks.split(",")
        asked = Tasks(
            names, flags.include_path, flags.limit, flags.num_fewshot, flags.batch_size, flags.chat_template, flags.seed
        )
        scores = evaluate_tasks(flags.adapter, flags.model, asked, flags.output, overwrite=flags.overwrite, **how)
        show(scores, flags.as_json, lambda found: [describe_tasks(found)])
        return
    from caprese.report.tables import describe_evaluation

    given = {
        "prompts": flags.prompts,
        "column": flags.column,
        "max_new_tokens": flags.max_new_tokens,
        "test": flags.samples,
    }
    report = evaluate_adapter(
        flags.adapter, flags.model, given, latency_tokens=flags.latency_tokens, seed=flags.seed, **how
    )
    show(report, flags.as_json, describe_evaluation)
