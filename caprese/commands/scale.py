"""`caprese scale`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from caprese.commands.options import Adapter, Device, Dtype, Json, Model
from caprese.errors import CapreseError
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
    seed: int = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be drawn; draw nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Accuracy at equal time: many samples of a cheaper model against fewer of the dense one. Goes on where it was."""
    import shlex
    import sys

    from pydantic import ValidationError

    from caprese import adapters
    from caprese.data_gen import load_prompts
    from caprese.evaluation import environment
    from caprese.evaluation.rewards import reward_scorer
    from caprese.files import check_writable, write_json
    from caprese.inference import load
    from caprese.recipes.recipe import explain
    from caprese.recovery.run import beside
    from caprese.report.scaling import describe_scaling, plot_scaling
    from caprese.report.tables import figures_table
    from caprese.studies.scaling import Scaling
    from caprese.studies.scaling import contenders as choose

    opened = adapters.Adapter.open(adapter)
    refused = next((why for method in opened.methods if (why := method.no_reselection)), None)
    if refused and reselect_every:
        raise CapreseError(f"{refused}; leave out --reselect-every")
    if reselect_every is None:
        reselect_every = 0 if refused else 32
    over = choose(reselect_every or None, contenders.split(",") if contenders else None)
    asked, trained = beside(opened)
    if prompts is not None and column is None:
        column = "prompt"
    given = {"prompts": prompts, "max_new_tokens": max_new_tokens, "temperature": temperature, "column": column}
    try:
        config = asked.model_validate(asked.model_dump() | {key: v for key, v in given.items() if v is not None})
    except ValidationError as error:
        raise explain(error, "scale") from error
    asks = (config.prompts, problems, seed + 1, config.column, trained)
    if dry_run:
        rows = load_prompts(*asks)
        facts = {
            "contenders": [c.name for c in over],
            "problems": len(rows),
            "completions": len(rows) * samples * len(over),
            "tokens_at_most": len(rows) * samples * len(over) * config.max_new_tokens,
            "first_prompt": rows[0].text,
        }
        show(facts, as_json, lambda found: [figures_table("scale", found)])
        return
    check_writable(Path(output))
    base, tokenizer = opened.load_base(model, revision=revision, dtype=dtype, device=device)
    rows = load_prompts(*asks, config.encode(tokenizer))
    say(f"{model}, {adapter}: {len(over)} contenders, {len(rows)} problems of {config.prompts}, {samples} samples each")
    # samples of one problem share its choice, so its rows are gathered once for all of them
    lm = load(base, opened, fused=True, form="packed", reselect_every=None)
    scorer = None if reward is None else reward_scorer(reward, device)
    scaling = Scaling(lm, tokenizer, rows, config, samples, Path(output), seed, scorer)
    identity = {
        "adapter": opened.digest,
        "type": f"{base.dtype} on {base.device.type}",
        "settings": config.model_dump(mode="json", exclude={"train", "validation", "test", "batch_size", "shard_size"}),
    }
    result = {
        "command": shlex.join(["caprese", *sys.argv[1:]]),
        "model": model,
        **scaling.run(over, identity, overwrite),
    }
    result["environment"] = environment(lm)
    write_json(Path(output) / "scale.json", result)
    plot_scaling(result, Path(output) / "scale.png")
    show(result, as_json, describe_scaling)
    say(f"{Path(output) / 'scale.json'}, scale.png")
