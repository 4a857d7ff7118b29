"""`caprese eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from caprese.commands.options import Adapter, Device, Dtype, Json, Model, Reselect, parse_reselect
from caprese.errors import CapreseError
from caprese.progress import show

TASKS = "Of lm-eval's tasks"


def eval(
    model: Model,
    adapter: Adapter,
    prompts: Annotated[
        str | None, typer.Option(help="gym:TASK, chains:SPLIT, a .jsonl or .parquet file, or a dataset.")
    ] = None,
    column: Annotated[str | None, typer.Option(help="Column that holds the prompt.")] = None,
    samples: Annotated[int, typer.Option(help="Prompts to ask.", min=1)] = 32,
    max_new_tokens: Annotated[int | None, typer.Option(help="Length limit of a completion.", min=2)] = None,
    latency_tokens: Annotated[int, typer.Option(help="Tokens over which TTNT is measured; 0 skips it.", min=0)] = 64,
    reselect_every: Reselect = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="lm-eval tasks instead: names or YAML files, with commas (needs caprese\\[eval]).",
            rich_help_panel=TASKS,
        ),
    ] = None,
    include_path: Annotated[
        str | None, typer.Option(help="A directory with more task YAMLs.", rich_help_panel=TASKS)
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Problems of each.", min=1, rich_help_panel=TASKS)] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Examples in the context.", min=0, rich_help_panel=TASKS)
    ] = None,
    chat_template: Annotated[bool, typer.Option("--chat-template", help="As a chat.", rich_help_panel=TASKS)] = False,
    batch_size: Annotated[int, typer.Option(help="Sequences together.", min=1, rich_help_panel=TASKS)] = 8,
    output: Annotated[
        str, typer.Option("--output", "-o", help="Directory for lm-eval's results.", rich_help_panel=TASKS)
    ] = "eval",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace results of other settings.", rich_help_panel=TASKS)
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of which prompts are asked and of sampling.")] = 1,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Measure an adapter: dense, efficient and recovered side by side, on prompts, or on lm-eval's --tasks.

    What is not said is as in the recipe.yaml beside a local adapter; prompts it was trained on, by the samples/ there,
    are not asked.
    """
    from caprese import adapters
    from caprese.efficient_methods import facts_of, phases_of
    from caprese.evaluation import Evaluation, measure
    from caprese.inference import load
    from caprese.recovery.run import beside
    from caprese.report.tables import describe_evaluation

    if tasks is not None and (prompts is not None or max_new_tokens is not None):
        raise CapreseError("--tasks brings its own prompts and lengths; leave out --prompts and --max-new-tokens")
    opened = adapters.Adapter.open(adapter)
    base, tokenizer = opened.load_base(model, dtype=dtype, device=device)
    if tasks is not None:
        from caprese.report.tasks import describe_tasks
        from caprese.studies.tasks import run_tasks

        fused = load(base, opened, fused=True, reselect_every=parse_reselect(reselect_every))
        scores = run_tasks(
            fused,
            tokenizer,
            tasks.split(","),
            Path(output),
            identity=[opened.digest, phases_of(fused).reselect_every, str(base.dtype)],
            include=include_path,
            limit=limit,
            num_fewshot=num_fewshot,
            batch_size=batch_size,
            chat_template=chat_template,
            seed=seed,
            overwrite=overwrite,
        )
        show(scores, as_json, lambda found: [describe_tasks(found)])
        return
    lm = load(base, opened, reselect_every=parse_reselect(reselect_every))
    asked, trained = beside(opened)
    if prompts is not None and column is None:
        column = "prompt"
    given = {"prompts": prompts, "column": column, "max_new_tokens": max_new_tokens, "test": samples}
    asked = asked.model_copy(update={key: value for key, value in given.items() if value is not None})
    measured = measure(lm, tokenizer, asked, Evaluation(latency_tokens=latency_tokens, examples=0), seed, trained)
    methods = [facts_of(method) for method in opened.methods]
    report = {
        "model": model,
        "adapter": adapter,
        "method": "+".join(m["name"] for m in methods),
        "methods": methods,
        "reselect_every": phases_of(lm).reselect_every,
        "seed": seed,
        "samples": asked.model_dump(mode="json", exclude={"train", "validation"}),
        **measured,
    }
    show(report, as_json, describe_evaluation)
