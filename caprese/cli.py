"""The command line: one function a verb. Parse, call, print."""

from __future__ import annotations

import functools
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from caprese import __version__
from caprese.errors import CapreseError

# peft imports it, and it reports on kernels nobody asked for
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
recipes_app = typer.Typer(no_args_is_help=True, help="List, show, copy and check recipes.")
app.add_typer(recipes_app, name="recipes")

Model = Annotated[str, typer.Option("--model", "-m", help="Alias, hub id or local directory.")]
Adapter = Annotated[
    str, typer.Option("--adapter", "-a", help="Recovery adapter: a directory, or a hub id, user/name or user/name@rev.")
]
Private = Annotated[
    bool | None,
    typer.Option("--private/--public", help="Of a repository that is made new; default as the account's."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON to stdout, nothing else.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, ...")]
Reselect = Annotated[
    int | None,
    typer.Option(help="Generated tokens between two reselections; 0 never; default as the adapter was made."),
]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]


def _verb(function: Callable[..., None]) -> Callable[..., None]:
    """One clear line instead of a traceback for what a user can mend."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        from caprese.progress import console

        try:
            function(*args, **kwargs)
        except CapreseError as error:
            console.print(f"[red]error:[/red] {_escaped(error)}", highlight=False, soft_wrap=True)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            console.print("\n[yellow]stopped.[/yellow] Finished work is kept: run the same command again to go on.")
            raise typer.Exit(130) from None

    return run


def _escaped(error: Exception) -> str:
    from rich.markup import escape

    return escape(" ".join(str(error).split()))


def _quiet(on: bool) -> None:
    """With --json, nothing but JSON on stdout, and no progress at all."""
    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils import logging as transformers_logging

    from caprese import progress

    # of several processes only the first speaks
    progress.quiet = on or not _first()
    if progress.quiet:
        disable_progress_bars()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    import warnings

    warnings.filterwarnings("ignore", category=UserWarning, module="peft")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def _first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _version(on: bool) -> None:
    if on:
        print(f"caprese {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Make a causal LM's inference cheaper, and give back what that cost."""


def _layers(text: str | None) -> str | list[int] | None:
    """all, first-half, or numbers and ranges."""
    if text is None or text in ("all", "first-half"):
        return text
    return _numbers(text, f"--layers {text!r}: use all, first-half, or numbers like 0,1,4-7")


def _numbers(text: str, remedy: str) -> list[int]:
    """Numbers and ranges: 0,1,4-7."""
    numbers: list[int] = []
    try:
        for part in text.split(","):
            low, _, high = part.strip().partition("-")
            if int(high or low) < int(low):
                raise ValueError
            numbers += range(int(low), int(high or low) + 1)
    except ValueError:
        raise CapreseError(remedy) from None
    return numbers


def _reselect(every: int | None) -> Any:
    return "saved" if every is None else every or None


def _set(overrides: dict[str, Any], path: str, value: Any) -> None:
    if value is None:
        return
    *sections, key = path.split(".")
    for section in sections:
        overrides = overrides.setdefault(section, {})
    overrides[key] = value


def _sparsity(text: str | None) -> float | list[float] | str | None:
    if text is None or text == "auto":
        return text
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        raise CapreseError(f"--sparsity {text!r}: use a number in (0, 1), a list 0.3,0.5,..., or auto") from None
    return numbers if len(numbers) > 1 else numbers[0]


def _keep_attention(text: str | None) -> Any:
    """A fraction, or numbers and ranges."""
    if text is None:
        return None
    remedy = f"--keep-attention {text!r}: use a fraction from 0 to below 1, like 0.5, or numbers like 0,5,11"
    if "." not in text and text != "0":
        return _numbers(text, remedy)
    try:
        return float(text)
    except ValueError:
        raise CapreseError(remedy) from None


def _rank(text: str | None) -> int | str | None:
    if text is None or text == "auto":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise CapreseError(f"--rank {text}: use a number from 1, or auto")
    return int(text)


@app.command()
@_verb
def recover(
    model: Annotated[str | None, typer.Option("--model", "-m", help="Alias, hub id or local directory.")] = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", "-r", help="Shipped recipe or YAML file; flags override it.")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help="A method, NAME[:SPARSITY][:key=value], or several joined by +; caprese methods lists them."),
    ] = None,
    sparsity: Annotated[
        str | None, typer.Option(help="Fraction removed, in (0, 1); one for each layer, 0.3,0.5,...; or auto.")
    ] = None,
    target_kl: Annotated[float | None, typer.Option(help="--sparsity auto: the largest KL before recovery.")] = None,
    target_active: Annotated[
        float | None, typer.Option(help="--sparsity auto: the fraction of active parameters to keep.")
    ] = None,
    threshold: Annotated[str | None, typer.Option(help="cats: prompt or calibrated.")] = None,
    shared_choice: Annotated[
        bool | None, typer.Option("--shared-choice/--own-choice", help="One choice for all sequences of a batch.")
    ] = None,
    keep_attention: Annotated[
        str | None, typer.Option(help="mamba: fraction of layers that keep attention, or which: 0,5,11.")
    ] = None,
    reselect_every: Annotated[
        int | None, typer.Option(help="Generated tokens after which the choice is made anew.")
    ] = None,
    layers: Annotated[str | None, typer.Option(help="all, first-half, or numbers like 0,1,4-7.")] = None,
    rank: Annotated[str | None, typer.Option(help="Rank of each branch, or auto.")] = None,
    bias: Annotated[bool | None, typer.Option("--bias/--no-bias", help="Also learn a bias on each branch.")] = None,
    prompts: Annotated[
        str | None, typer.Option(help="gym:TASK, chains:SPLIT, a .jsonl or .parquet file, or a dataset.")
    ] = None,
    column: Annotated[str | None, typer.Option(help="Column that holds the prompt.")] = None,
    samples: Annotated[int | None, typer.Option(help="Training samples.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Length limit of a completion.")] = None,
    layerwise: Annotated[str | None, typer.Option(help="closed, sequential, adam or none.")] = None,
    objective: Annotated[str | None, typer.Option(help="End to end: kl or hidden.")] = None,
    epochs: Annotated[int | None, typer.Option(help="End-to-end epochs; 0 skips the stage.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="End-to-end peak learning rate.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Directory for the result.")] = None,
    revision: Annotated[str | None, typer.Option(help="Hub revision of the base model.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, ...")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace another recipe's result in --output.")
    ] = False,
    full: Annotated[
        bool, typer.Option("--full", help="Also keep the base in OUTPUT/base, so that the directory runs by itself.")
    ] = False,
    push_to_hub: Annotated[str | None, typer.Option(help="Push the result to this repository, user/name.")] = None,
    private: Private = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan: parameters, bytes, time estimate.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make MODEL cheaper and distil an adapter that gives its quality back. Goes on where a stopped run was."""
    from caprese.efficient_methods import describe_methods
    from caprese.models import check_keepable, load_base, resolve, save_base
    from caprese.progress import say
    from caprese.recipes import resolve_recipe

    _quiet(as_json)
    overrides: dict[str, Any] = {}
    for path, value in {
        "method": method,
        "sparsity": _sparsity(sparsity),
        "target_kl": target_kl,
        "target_active": target_active,
        "threshold": threshold,
        "shared_choice": shared_choice,
        "keep_attention": _keep_attention(keep_attention),
        "reselect_every": reselect_every,
        "layers": _layers(layers),
        "rank": _rank(rank),
        "bias": bias,
        "samples.prompts": prompts,
        "samples.column": column,
        "samples.train": samples,
        "samples.max_new_tokens": max_new_tokens,
        "layerwise.how": layerwise,
        "end_to_end.objective": objective,
        "end_to_end.epochs": epochs,
        "end_to_end.learning_rate": learning_rate,
        "seed": seed,
        "output": output,
        "revision": revision,
        "dtype": dtype,
        "device": device,
    }.items():
        _set(overrides, path, value)
    resolved = resolve_recipe(recipe, model, **overrides)
    if resolved.model is None:
        raise CapreseError("which model? give --model, or a recipe that names one (caprese recipes ls)")
    base = resolve(resolved.model, resolved.revision)
    methods = resolved.make_methods()
    say(
        f"[bold]{base}[/bold]  {describe_methods(methods)}, rank {resolved.rank}, "
        f"seed {resolved.seed} -> {resolved.output}"
    )
    if dry_run:
        from caprese.plan import config_of, plan

        figures = plan(config_of(resolved), resolved)
        print(json.dumps(figures, indent=2)) if as_json else _print_table("plan", figures)
        return
    from caprese.adapters import hub
    from caprese.recovery.recover import recover as run

    if push_to_hub is not None:
        hub.prepare(push_to_hub, private)
    loaded, tokenizer = load_base(
        resolved.model, revision=resolved.revision, dtype=resolved.dtype, device=resolved.device
    )
    whole = Path(resolved.output).expanduser() / "base"
    if full:
        check_keepable(loaded, whole, overwrite)
    report = run(loaded, tokenizer, resolved, overwrite=overwrite)
    if not _first():
        return
    if full:
        save_base(loaded, tokenizer, whole)
    if push_to_hub is not None:
        from caprese.publish import push as publish

        published = publish(resolved.output, push_to_hub, private=private)
        report = {**report, "hub": {key: published[key] for key in ("repo", "url", "commit")}}
        say(f"pushed to {published['url']}")
    if as_json:
        print(json.dumps(report, indent=2))
        return
    _print_report(report)
    say(f"\nreport: {Path(resolved.output) / 'report.html'}")
    name = whole if full else resolved.model
    say(f"try it: caprese generate --model {name} --adapter {resolved.output} --prompt '...'")


def _print_report(report: dict[str, Any]) -> None:
    from rich.console import Console

    from caprese.report.summary import summary_lines, summary_table

    console = Console()
    console.print(summary_table(report))
    for line in summary_lines(report):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _print_table(title: str, figures: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from caprese.report.summary import duration

    def shown(key: str, value: Any) -> str:
        if isinstance(value, list):
            return "\n".join(map(str, value))
        if isinstance(value, dict):
            return "\n".join(f"{name} {shown(key, each)}" for name, each in value.items())
        if key.endswith("seconds"):
            return duration(value)
        return f"{value:,}" if isinstance(value, int) else str(value)

    table = Table(title=title, show_header=False)
    for key, value in figures.items():
        table.add_row(key.replace("_", " ").replace(" seconds", " time"), shown(key, value))
    Console().print(table)


@app.command()
@_verb
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to answer.")],
    adapter: Annotated[
        str | None, typer.Option("--adapter", "-a", help="Recovery adapter; without one the model runs dense.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Length limit of the answer.", min=1)] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0)] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1)] = 1.0,
    instruction: Annotated[str, typer.Option(help="Put before the prompt.")] = "",
    reselect_every: Reselect = None,
    fused: Annotated[bool, typer.Option("--fused/--unfused", help="Run FFN and adapter as one step.")] = True,
    seed: int = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Answer a prompt, streaming, and show the time to next token."""
    from caprese.adapters import fingerprint, load_base_for, read_sidecar
    from caprese.inference import load, stream
    from caprese.models import load_base
    from caprese.progress import say

    _quiet(as_json)
    if not prompt.strip():
        raise CapreseError("the prompt is empty; give --prompt some text")
    if reselect_every is not None and adapter is None:
        raise CapreseError("--reselect-every goes with --adapter: without one the model runs dense")
    lm: Any
    if adapter:
        base, tokenizer = load_base_for(read_sidecar(adapter), model, dtype=dtype, device=device)
        lm = load(base, adapter, fused=fused, reselect_every=_reselect(reselect_every))
    else:
        lm, tokenizer = load_base(model, dtype=dtype, device=device)
        fingerprint(lm)  # refuses damaged weights, as `load` does
    result = stream(
        lm,
        tokenizer,
        prompt,
        instruction=instruction,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        emit=None if as_json else lambda text: print(text, end="", flush=True),
    )
    if as_json:
        print(json.dumps(result, indent=2))
        return
    print()
    ttnt = "" if result["ttnt_ms"] is None else f", TTNT {result['ttnt_ms']:.1f} ms (median)"
    say(f"[dim]{result['new_tokens']} tokens, first after {result['first_token_ms']:.0f} ms{ttnt}[/dim]")


@app.command("eval")
@_verb
def evaluate(
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
        typer.Option(help="lm-eval tasks instead: names or YAML files, with commas (needs caprese\\[eval])."),
    ] = None,
    include_path: Annotated[str | None, typer.Option(help="--tasks: a directory with more task YAMLs.")] = None,
    limit: Annotated[int | None, typer.Option(help="--tasks: problems of each.", min=1)] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="--tasks: examples in the context.", min=0)] = None,
    chat_template: Annotated[bool, typer.Option("--chat-template", help="--tasks: as a chat.")] = False,
    batch_size: Annotated[int, typer.Option(help="--tasks: sequences together.", min=1)] = 8,
    output: Annotated[str, typer.Option("--output", "-o", help="--tasks: directory for lm-eval's results.")] = "eval",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="--tasks: replace results of other settings.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of which prompts are asked and of sampling.")] = 1,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Measure an adapter: dense, efficient and recovered side by side, on prompts, or on lm-eval's --tasks.

    What is not said is as in the recipe.yaml beside a local adapter; prompts it was trained on, by the samples/ there,
    are not asked.
    """
    from caprese.adapters import load, load_base_for, read_sidecar
    from caprese.efficient_methods import phases_of
    from caprese.evaluation import Evaluation
    from caprese.inference import load as load_fused
    from caprese.recovery.recover import beside, measure

    _quiet(as_json)
    if tasks is not None and (prompts is not None or max_new_tokens is not None):
        raise CapreseError("--tasks brings its own prompts and lengths; leave out --prompts and --max-new-tokens")
    sidecar = read_sidecar(adapter)
    base, tokenizer = load_base_for(sidecar, model, dtype=dtype, device=device)
    if tasks is not None:
        from rich.console import Console

        from caprese.studies.tasks import describe_tasks, run_tasks

        fused = load_fused(base, adapter, fused=True, reselect_every=_reselect(reselect_every))
        scores = run_tasks(
            fused,
            tokenizer,
            tasks.split(","),
            Path(output),
            identity=[sidecar.digest, phases_of(fused).reselect_every, str(base.dtype)],
            include=include_path,
            limit=limit,
            num_fewshot=num_fewshot,
            batch_size=batch_size,
            chat_template=chat_template,
            seed=seed,
            overwrite=overwrite,
        )
        print(json.dumps(scores, indent=2)) if as_json else Console().print(describe_tasks(scores))
        return
    lm = load(base, adapter, reselect_every=_reselect(reselect_every))
    asked, trained = beside(adapter)
    if prompts is not None and column is None:
        column = "prompt"
    given = {"prompts": prompts, "column": column, "max_new_tokens": max_new_tokens, "test": samples}
    asked = asked.model_copy(update={key: value for key, value in given.items() if value is not None})
    measured = measure(lm, tokenizer, asked, Evaluation(latency_tokens=latency_tokens, examples=0), seed, trained)
    methods = [{"name": m.name, **m.model_dump(mode="json")} for m in sidecar.make_methods()]
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
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        from rich.console import Console

        from caprese.report.summary import recovered, summary_table

        Console().print(summary_table(report))
        print(f"Recovered: {recovered(report) or 'not measured'}")


@app.command()
@_verb
def bench(
    model: Annotated[str | None, typer.Option("--model", "-m", help="Alias, hub id or local directory.")] = None,
    random_weights: Annotated[
        str | None, typer.Option(help="A known shape, such as llama-3.2-1b, with random weights: no download.")
    ] = None,
    method: Annotated[str, typer.Option(help="NAME[:SPARSITY][:key=value], or several joined by +.")] = "griffin",
    sparsity: Annotated[
        float | None, typer.Option(help="Fraction removed, where --method does not say; 0.5 if neither does.")
    ] = None,
    layers: Annotated[str, typer.Option(help="all, first-half, or numbers like 0,1,4-7.")] = "all",
    rank: Annotated[int, typer.Option(min=1, help="Rank of each branch.")] = 256,
    prompt_tokens: Annotated[int, typer.Option(help="Length of the prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(help="Tokens timed in each row.")] = 64,
    batch: Annotated[str, typer.Option(help="Sequences decoded together; several, 1,2,4,8,16, for a sweep.")] = "1",
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Also the compiled rows.")] = True,
    rows: Annotated[str | None, typer.Option(help="Only these rows, with commas.")] = None,
    form: Annotated[str, typer.Option(help="auto, packed or indexed (see caprese.fuse).")] = "auto",
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Directory for bench.json and bench.png.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Hub revision of the model.")] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print bytes and byte floor; time nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Time to next token, side by side: dense, efficient, LoRA of equal size, recovered, fused; eager and compiled."""
    import shlex
    import sys

    import torch

    from caprese.efficient_methods import describe_methods
    from caprese.files import check_writable, write_json
    from caprese.models import load_base, load_config, random_model, shape_config
    from caprese.models.loading import pick_device, pick_dtype
    from caprese.progress import say
    from caprese.recipes import resolve_recipe
    from caprese.studies.bench import bench as measure
    from caprese.studies.bench import bench_plan, describe_bench, plot_bench

    _quiet(as_json)
    name = model or random_weights
    if name is None or (model and random_weights):
        raise CapreseError("which model? give --model, or --random-weights with a known shape, and not both")
    try:
        batches = [int(part) for part in batch.split(",")]
    except ValueError:
        raise CapreseError(f"--batch {batch!r}: use a number, or several like 1,2,4") from None
    methods = resolve_recipe(method=method, sparsity=sparsity, layers=_layers(layers)).make_methods()
    if dry_run:
        config = shape_config(random_weights) if random_weights else load_config(name, revision)
        figures = bench_plan(config, methods, rank, pick_dtype(dtype, pick_device(device)) or torch.bfloat16, batches)
        print(json.dumps(figures, indent=2)) if as_json else _print_table("bench", figures)
        return
    if output is not None:
        check_writable(Path(output))
    if random_weights:
        place = pick_device(device)
        config = shape_config(random_weights)
        say(f"random weights in the shape of {random_weights}, {describe_methods(methods)}, rank {rank}")
        kind = pick_dtype(dtype, place) or (torch.float32 if place == "cpu" else torch.bfloat16)
        loaded = random_model(config, kind, place)
    else:
        loaded, _ = load_base(name, revision=revision, dtype=dtype, device=device)
    result = measure(
        loaded,
        methods,
        batches,
        rank=rank,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        rows=rows.split(",") if rows else None,
        compiled=compiled,
        form=form,
    )
    result = {"command": shlex.join(["caprese", *sys.argv[1:]]), "shape": name, **result}
    if output is not None:
        write_json(Path(output) / "bench.json", result)
        plot_bench(result, Path(output) / "bench.png")
    if as_json:
        print(json.dumps(result, indent=2))
        return
    from rich.console import Console

    for part in describe_bench(result):
        Console().print(part)


@app.command()
@_verb
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

    from caprese.adapters import load_base_for, read_sidecar
    from caprese.data_gen import load_prompts
    from caprese.evaluation import environment
    from caprese.evaluation.rewards import reward_scorer
    from caprese.files import check_writable, write_json
    from caprese.inference import load
    from caprese.progress import say
    from caprese.recipes.recipe import explain
    from caprese.recovery.recover import beside
    from caprese.studies.scaling import Scaling, describe_scaling, plot_scaling
    from caprese.studies.scaling import contenders as choose

    _quiet(as_json)
    sidecar = read_sidecar(adapter)
    mixes = any(facts["name"] == "mamba" for facts in sidecar.methods)
    if mixes and reselect_every:
        raise CapreseError(
            "a hybrid does not choose anew, since a state cannot be taken back; leave out --reselect-every"
        )
    if reselect_every is None:
        reselect_every = 0 if mixes else 32
    over = choose(reselect_every or None, contenders.split(",") if contenders else None)
    asked, trained = beside(adapter)
    if prompts is not None and column is None:
        column = "prompt"
    given = {"prompts": prompts, "max_new_tokens": max_new_tokens, "temperature": temperature, "column": column}
    try:
        config = asked.model_validate(asked.model_dump() | {key: v for key, v in given.items() if v is not None})
    except ValidationError as error:
        raise explain(error, "scale") from error
    rows = load_prompts(config.prompts, problems, seed + 1, config.column, trained)
    if dry_run:
        facts = {
            "contenders": [c.name for c in over],
            "problems": len(rows),
            "completions": len(rows) * samples * len(over),
            "tokens_at_most": len(rows) * samples * len(over) * config.max_new_tokens,
            "first_prompt": rows[0].text,
        }
        print(json.dumps(facts, indent=2)) if as_json else _print_table("scale", facts)
        return
    check_writable(Path(output))
    base, tokenizer = load_base_for(sidecar, model, revision=revision, dtype=dtype, device=device)
    say(f"{model}, {adapter}: {len(over)} contenders, {len(rows)} problems of {config.prompts}, {samples} samples each")
    # samples of one problem share its choice, so its rows are gathered once for all of them
    lm = load(base, adapter, fused=True, form="packed", reselect_every=None)
    scorer = None if reward is None else reward_scorer(reward, device)
    scaling = Scaling(lm, tokenizer, rows, config, samples, Path(output), seed, scorer)
    identity = {
        "adapter": sidecar.digest,
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
    if as_json:
        print(json.dumps(result, indent=2))
        return
    from rich.console import Console

    for part in describe_scaling(result):
        Console().print(part)
    say(f"{Path(output) / 'scale.json'}, scale.png")


@app.command()
@_verb
def push(
    directory: Annotated[str, typer.Argument(help="What caprese recover wrote.")],
    repo: Annotated[str, typer.Argument(help="user/name on the hub; made if it is not there.")],
    private: Private = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be sent; send nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Put an adapter with its report on the model hub, in one commit. The token is `hf auth login`'s, or HF_TOKEN."""
    from caprese.publish import push as publish

    _quiet(as_json)
    facts = publish(directory, repo, private=private, dry_run=dry_run)
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    _print_table("would push" if dry_run else "pushed", {k: v for k, v in facts.items() if v is not None})
    if not dry_run:
        print(f"load it: caprese.load(model, {repo!r})")


@app.command()
@_verb
def info(
    adapter: Annotated[str, typer.Argument(help="Directory or hub id, user/name or user/name@revision.")],
    model: Annotated[str | None, typer.Option("--model", "-m", help="A base: does the adapter fit it?")] = None,
    revision: Annotated[str | None, typer.Option(help="Hub revision of the adapter.")] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """What an adapter is, what it needs, and whether it fits a base (by its weights, not its name)."""
    from caprese.publish import info as look

    _quiet(as_json)
    facts = look(adapter, revision=revision, model=model, dtype=dtype, device=device)
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        _print_table(adapter, {k: v for k, v in facts.items() if v is not None and k != "quality"})
    if facts.get("fits") is False:
        raise typer.Exit(1)


@app.command()
@_verb
def export(
    adapter: Annotated[
        str, typer.Argument(help="An adapter made with static, none or mamba: a directory, or a hub id.")
    ],
    to: Annotated[str, typer.Option(help="Directory for the checkpoint.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="The base, where it was a local directory.")
    ] = None,
    format: Annotated[str, typer.Option(help="hf, or gguf for llama.cpp.")] = "hf",
    outtype: Annotated[str, typer.Option(help="Of a GGUF: f32, f16, bf16, q8_0.")] = "f16",
    dtype: Annotated[str, typer.Option(help="Of the weights: auto (the checkpoint's), float32, bfloat16.")] = "auto",
    device: Device = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in --to.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what it would be; write nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Write a recovered model as an ordinary checkpoint that needs no caprese: for transformers, vLLM, llama.cpp."""
    from caprese.adapters import base_revision, has_branches, load_base_for, ranks_of, read_sidecar
    from caprese.export import export as write
    from caprese.export import plan_export
    from caprese.inference import load
    from caprese.models import load_config
    from caprese.models.loading import pick_dtype
    from caprese.progress import say

    _quiet(as_json)
    if format not in ("hf", "gguf"):
        raise CapreseError(f"--format {format}: hf or gguf")
    sidecar = read_sidecar(adapter)
    name = model or sidecar.base.name
    if dry_run:
        rank, others = ranks_of(adapter) if has_branches(adapter) else (0, {})
        config = load_config(name, base_revision(sidecar, name))
        figures = plan_export(config, sidecar.make_methods(), lambda layer: others.get(layer, rank))
    else:
        kind = None if dtype == "auto" else pick_dtype(dtype, "cpu")
        base, tokenizer = load_base_for(sidecar, name, device=device)
        lm = load(base, adapter)
        figures = write(
            lm, tokenizer, to, format=cast(Any, format), dtype=kind, outtype=outtype, overwrite=overwrite, say=say
        )
    shown = {key: value for key, value in figures.items() if value is not None}
    print(json.dumps(figures, indent=2)) if as_json else _print_table("would write" if dry_run else "written", shown)


@app.command("methods")
@_verb
def list_methods(as_json: Json = False) -> None:
    """The methods, the model families, and which methods go together."""
    from caprese.efficient_methods import Reads, compose, known_methods, refusal
    from caprese.models import FAMILIES

    kinds = known_methods()
    gated, plain = Reads(1, 1, 1), Reads(0, 1, 1)

    def together(one: str, other: str) -> dict[str, Any]:
        """Why not, or the fraction of an FFN's weights that a token still reads at default settings."""
        methods = [kinds[name]() for name in dict.fromkeys((one, other))]
        if len(methods) > 1 and (reason := refusal(*methods)):
            return {"composes": False, "reason": reason}
        left = {}
        for shape, reads in (("gated", gated), ("plain", plain)):
            whole = reads.gate + reads.up + reads.down
            for method in compose(methods):
                reads = method.reads(reads)
            left[shape] = round((reads.gate + reads.up + reads.down) / whole, 3)
        return {"composes": True, "ffn_weights_read": left}

    pairs = {one: {other: together(one, other) for other in kinds} for one in kinds}
    facts: dict[str, Any] = {
        "methods": {
            name: {
                "summary": kind.summary,
                "acts_on": sorted(kind().acts_on),
                "learns_from": sorted(kind().learns),
                "settings": {key: field.default for key, field in kind.model_fields.items()},
            }
            for name, kind in kinds.items()
        },
        "families": {name: "gated" if family.gate else "plain" for name, family in FAMILIES.items()},
        "composition": pairs,
    }
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table("method", "what it does", "chooses from", "settings", title="methods")
    for name, fact in facts["methods"].items():
        settings = ", ".join(f"{k}={v}" for k, v in fact["settings"].items() if k != "layers")
        table.add_row(name, fact["summary"], ", ".join(fact["learns_from"]) or "-", settings)
    console.print(table)
    table = Table("", *kinds, title="alone and together: weights of a gated FFN still read, at default settings")
    for one in kinds:
        cells = [pairs[one][other].get("ffn_weights_read") for other in kinds]
        table.add_row(one, *("-" if cell is None else f"{cell['gated']:.0%}" for cell in cells))
    console.print(table)
    reasons = dict.fromkeys(
        f"{one} with {other}: {pairs[one][other]['reason']}"
        for i, one in enumerate(kinds)
        for other in list(kinds)[i + 1 :]
        if not pairs[one][other]["composes"] and "none" not in (one, other)
    )
    print("not together:", *(f"  {reason}" for reason in reasons), sep="\n")
    print("  none with any: it takes nothing away")
    print("  teal acts on FFN and attention; teal:where=attention or teal:where=ffn on one of them alone")
    print(f"families, all with every method: {', '.join(f'{k} ({v} FFN)' for k, v in facts['families'].items())}")


@recipes_app.command("ls")
@_verb
def recipes_ls(as_json: Json = False) -> None:
    """The recipes that come with caprese."""
    from caprese.efficient_methods import describe_methods
    from caprese.models import ALIASES
    from caprese.recipes import names, resolve_recipe

    rows = {name: resolve_recipe(name) for name in names()}
    if as_json:
        print(json.dumps({name: r.model_dump(mode="json") for name, r in rows.items()}, indent=2))
        return
    for name, r in rows.items():
        print(
            f"{name:32} {ALIASES.get(r.model or '', r.model):44} {describe_methods(r.make_methods())} on {r.layers}, "
            f"rank {r.rank}, {r.samples.train} samples"
        )


@recipes_app.command("show")
@_verb
def recipes_show(name: str, as_json: Json = False) -> None:
    """A recipe with every default filled in."""
    from caprese.recipes import resolve_recipe

    recipe = resolve_recipe(name)
    print(
        json.dumps(recipe.model_dump(mode="json"), indent=2) if as_json else recipe.to_yaml(),
        end="\n" if as_json else "",
    )


@recipes_app.command("cp")
@_verb
def recipes_cp(name: str, target: Path) -> None:
    """Copy a recipe to a file of your own."""
    from caprese.files import write_text
    from caprese.recipes import resolve_recipe

    if target.is_dir():
        target = target / f"{name}.yaml"
    if target.exists():
        raise CapreseError(f"{target} exists; choose another name")
    write_text(target, resolve_recipe(name).to_yaml())
    print(target)


@recipes_app.command("validate")
@_verb
def recipes_validate(name: str, as_json: Json = False) -> None:
    """Check a recipe: keys, values, method and model name."""
    from caprese.models import resolve
    from caprese.recipes import resolve_recipe

    recipe = resolve_recipe(name)
    recipe.make_methods()
    if recipe.model is not None:
        resolve(recipe.model)
    print(json.dumps({"valid": True}) if as_json else f"{name}: valid")


def run() -> None:
    """Entry point."""
    app()


if __name__ == "__main__":
    run()
