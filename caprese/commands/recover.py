"""`caprese recover`."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from caprese.commands.options import (
    MADE_FOR,
    Json,
    Private,
    parse_bytes,
    parse_keep_attention,
    parse_layers,
    parse_rank,
    parse_sparsity,
)
from caprese.commands.verb import is_main
from caprese.errors import CapreseError
from caprese.files import path_of
from caprese.progress import say, show


def _set(overrides: dict[str, Any], path: str, value: Any) -> None:
    if value is None:
        return
    *sections, key = path.split(".")
    for section in sections:
        overrides = overrides.setdefault(section, {})
    overrides[key] = value


def _machine(flags: Flags) -> dict[str, Any]:
    """What `plan` is told of where the run will be."""
    told = {} if flags.like is None else {"like": _report(flags.like)}
    if flags.gpus is None and flags.gpu_memory is None:
        return told
    if flags.gpus is not None and not 1 <= flags.gpus <= 1 << 20:
        raise CapreseError(f"--gpus {flags.gpus}: give a number from 1")
    memory = parse_bytes("80GB" if flags.gpu_memory is None else flags.gpu_memory)
    if memory < 10**8:
        raise CapreseError(f"--gpu-memory {flags.gpu_memory}: no GPU has {memory:,} bytes; give it like 80GB")
    return {**told, "gpus": flags.gpus or 1, "gpu_memory": memory}


def _report(run: str) -> dict[str, Any]:
    """Of a finished run.

    Raises:
        CapreseError: it is none, or damaged.
    """
    from caprese.adapters import Adapter

    found = Adapter.open(run).report()
    if found is None:
        raise CapreseError(f"{run} holds an adapter without the report.json of its run; give another run to --like")
    return found


MODEL, METHOD, SAMPLES, TRAINING, OUTPUT = "Model", "Method", "Samples", "Training", "Output"


@dataclass(frozen=True)
class Flags:
    """What `caprese recover` takes."""

    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Alias, hub id or local directory.", rich_help_panel=MODEL)
    ] = None
    recipe: Annotated[
        str | None, typer.Option("--recipe", "-r", help="Shipped recipe or YAML file; flags override it.")
    ] = None
    method: Annotated[
        str | None,
        typer.Option(
            help="A method, NAME[:SPARSITY][:key=value], or several joined by +; caprese methods lists them.",
            rich_help_panel=METHOD,
        ),
    ] = None
    sparsity: Annotated[
        str | None,
        typer.Option(
            help="Fraction removed, in (0, 1); one for each layer, 0.3,0.5,...; or auto.", rich_help_panel=METHOD
        ),
    ] = None
    target_kl: Annotated[
        float | None,
        typer.Option(help="--sparsity auto, --for speed: the largest KL before recovery.", rich_help_panel=METHOD),
    ] = None
    target_active: Annotated[
        float | None,
        typer.Option(help="--sparsity auto: the fraction of active parameters to keep.", rich_help_panel=METHOD),
    ] = None
    threshold: Annotated[str | None, typer.Option(help="cats: prompt or calibrated.", rich_help_panel=METHOD)] = None
    shared_choice: Annotated[
        bool | None,
        typer.Option(
            "--shared-choice/--own-choice", help="One choice for all sequences of a batch.", rich_help_panel=METHOD
        ),
    ] = None
    keep_attention: Annotated[
        str | None,
        typer.Option(
            help="Of a hybrid: fraction of layers that keep attention, or which: 0,5,11.", rich_help_panel=METHOD
        ),
    ] = None
    reselect_every: Annotated[
        int | None, typer.Option(help="Generated tokens after which the choice is made anew.", rich_help_panel=METHOD)
    ] = None
    made_for: Annotated[
        Literal["caprese", "export", "speed", "lossless"] | None,
        typer.Option(
            "--for",
            help="caprese (prompts dense); export: any engine, prompts through what is left; speed: the methods that "
            "are fastest here within --target-kl, measured; lossless: drafts, trained on how often they are accepted.",
            rich_help_panel=METHOD,
        ),
    ] = None
    layers: Annotated[
        str | None, typer.Option(help="all, first-half, or numbers like 0,1,4-7.", rich_help_panel=METHOD)
    ] = None
    rank: Annotated[str | None, typer.Option(help="Rank of each branch, or auto.", rich_help_panel=TRAINING)] = None
    bias: Annotated[
        bool | None,
        typer.Option("--bias/--no-bias", help="Also learn a bias on each branch.", rich_help_panel=TRAINING),
    ] = None
    prompts: Annotated[
        str | None,
        typer.Option(
            help="gym:TASK, chains:SPLIT, a .jsonl or .parquet file, a dataset, self (the model writes them), or "
            "several with shares: gym:gsm_symbolic=0.5,self=0.5.",
            rich_help_panel=SAMPLES,
        ),
    ] = None
    column: Annotated[str | None, typer.Option(help="Column that holds the prompt.", rich_help_panel=SAMPLES)] = None
    samples: Annotated[int | None, typer.Option(help="Training samples.", rich_help_panel=SAMPLES)] = None
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Length limit of a completion.", rich_help_panel=SAMPLES)
    ] = None
    teacher: Annotated[
        str | None,
        typer.Option(
            "--teacher",
            "--teacher-url",
            help="What draws the samples: here; vllm (started for it); or the address of an OpenAI-compatible endpoint "
            "that serves MODEL, http://HOST:PORT/v1.",
            rich_help_panel=SAMPLES,
        ),
    ] = None
    teacher_model: Annotated[
        str | None, typer.Option(help="Which of an endpoint's models.", rich_help_panel=SAMPLES)
    ] = None
    teacher_concurrency: Annotated[
        int | None, typer.Option(help="Requests to an endpoint at once.", rich_help_panel=SAMPLES)
    ] = None
    layerwise: Annotated[
        str | None, typer.Option(help="closed, sequential, adam or none.", rich_help_panel=TRAINING)
    ] = None
    objective: Annotated[str | None, typer.Option(help="End to end: kl, hidden or tv.", rich_help_panel=TRAINING)] = (
        None
    )
    epochs: Annotated[
        int | None, typer.Option(help="End-to-end epochs; 0 skips the stage.", rich_help_panel=TRAINING)
    ] = None
    learning_rate: Annotated[
        float | None, typer.Option(help="End-to-end peak learning rate.", rich_help_panel=TRAINING)
    ] = None
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.", rich_help_panel=TRAINING)] = None
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Directory for the result.", rich_help_panel=OUTPUT)
    ] = None
    revision: Annotated[str | None, typer.Option(help="Hub revision of the base model.", rich_help_panel=MODEL)] = None
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.", rich_help_panel=MODEL)] = None
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, ...", rich_help_panel=MODEL)] = None
    residency: Annotated[
        str | None,
        typer.Option(
            help="Where decoder layers are while they do not run: whole; sharded over processes; streamed from disk.",
            rich_help_panel=MODEL,
        ),
    ] = None
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace another recipe's result in --output.", rich_help_panel=OUTPUT)
    ] = False
    full: Annotated[
        bool,
        typer.Option(
            "--full",
            help="Also keep the base in OUTPUT/base, so that the directory runs by itself.",
            rich_help_panel=OUTPUT,
        ),
    ] = False
    push_to_hub: Annotated[
        str | None, typer.Option(help="Push the result to this repository, user/name.", rich_help_panel=OUTPUT)
    ] = None
    private: Private = None
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the plan: parameters, bytes, time estimate.", rich_help_panel=OUTPUT),
    ] = False
    gpus: Annotated[
        int | None, typer.Option(help="--dry-run: plan for so many GPUs, by where the base is.", rich_help_panel=OUTPUT)
    ] = None
    gpu_memory: Annotated[
        str | None, typer.Option(help="--dry-run: of each of --gpus; 80GB without saying.", rich_help_panel=OUTPUT)
    ] = None
    like: Annotated[
        str | None,
        typer.Option(
            help="--dry-run: a finished run on such a machine; hours are planned by its own.", rich_help_panel=OUTPUT
        ),
    ] = None
    as_json: Json = False


def recover(flags: Flags) -> None:
    """Make MODEL cheaper and distil an adapter that gives its quality back. Goes on where a stopped run was."""
    from caprese.efficient_methods import describe_methods
    from caprese.models import check_keepable, load_base, resolve, save_base
    from caprese.recipes import resolve_recipe
    from caprese.report.tables import describe_recovery, figures_table

    if not flags.dry_run and any(each is not None for each in (flags.gpus, flags.gpu_memory, flags.like)):
        raise CapreseError(
            "--gpus, --gpu-memory and --like are for a plan; add --dry-run, or start processes with torchrun"
        )
    overrides: dict[str, Any] = {}
    made_for = {} if flags.made_for is None else MADE_FOR[flags.made_for]
    given = {
        "method": flags.method,
        "sparsity": parse_sparsity(flags.sparsity),
        "target_kl": flags.target_kl,
        "target_active": flags.target_active,
        "threshold": flags.threshold,
        "shared_choice": flags.shared_choice,
        "keep_attention": parse_keep_attention(flags.keep_attention),
        "reselect_every": flags.reselect_every,
        "layers": parse_layers(flags.layers),
        "rank": parse_rank(flags.rank),
        "bias": flags.bias,
        "samples.prompts": flags.prompts,
        "samples.column": flags.column,
        "samples.train": flags.samples,
        "samples.max_new_tokens": flags.max_new_tokens,
        "samples.teacher": flags.teacher,
        "samples.teacher_model": flags.teacher_model,
        "samples.teacher_concurrency": flags.teacher_concurrency,
        "layerwise.how": flags.layerwise,
        "end_to_end.objective": flags.objective,
        "end_to_end.epochs": flags.epochs,
        "end_to_end.learning_rate": flags.learning_rate,
        "seed": flags.seed,
        "output": flags.output,
        "revision": flags.revision,
        "dtype": flags.dtype,
        "device": flags.device,
        "residency": flags.residency,
    }
    for path, value in (*made_for.items(), *given.items()):
        _set(overrides, path, value)
    resolved = resolve_recipe(flags.recipe, flags.model, **overrides)
    if resolved.model is None:
        raise CapreseError("which model? give --model, or a recipe that names one (caprese recipes ls)")
    base = resolve(resolved.model, resolved.revision)
    count = len(resolved.alternatives)
    told = f"the fastest of {count}" if count else describe_methods(resolved.methods)
    say(
        (str(base), "bold"),
        f"  {told}, rank {resolved.rank}, seed {resolved.seed} -> {resolved.output}",
    )
    if flags.dry_run:
        from caprese.plan import config_of, plan

        figures = plan(config_of(resolved), resolved, **_machine(flags))
        show(figures, flags.as_json, lambda found: [figures_table("plan", found)])
        return
    from caprese.adapters import hub
    from caprese.recovery.recover import recover as run

    if flags.push_to_hub is not None:
        hub.prepare(flags.push_to_hub, flags.private)
    loaded, tokenizer = load_base(
        resolved.model,
        revision=resolved.revision,
        dtype=resolved.dtype,
        device=resolved.device,
        residency=resolved.residency,
    )
    whole = path_of(resolved.output) / "base"
    if flags.full:
        check_keepable(loaded, whole, flags.overwrite)
    report = run(loaded, tokenizer, resolved, overwrite=flags.overwrite)
    if not is_main():
        return
    if flags.full:
        save_base(loaded, tokenizer, whole)
    if flags.push_to_hub is not None:
        from caprese.publish import push as publish

        published = publish(resolved.output, flags.push_to_hub, private=flags.private)
        report = {**report, "hub": {key: published[key] for key in ("repo", "url", "commit")}}
        say(f"pushed to {published['url']}")
    show(report, flags.as_json, describe_recovery)
    say(f"\nreport: {Path(resolved.output) / 'report.html'}")
    name = whole if flags.full else resolved.model
    words = ["caprese", "generate", "--model", str(name), "--adapter", resolved.output, "--prompt", "..."]
    say(f"try it: {shlex.join(words)}")
