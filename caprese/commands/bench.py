"""`caprese bench`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from caprese.commands.options import Device, Json, QuickDtype, parse_layers, parse_quick
from caprese.commands.pair import make_draft, put_method
from caprese.errors import CapreseError
from caprese.progress import say, show


@dataclass(frozen=True)
class Flags:
    """What `caprese bench` takes."""

    model: Annotated[str | None, typer.Option("--model", "-m", help="Alias, hub id or local directory.")] = None
    random_weights: Annotated[
        str | None, typer.Option(help="A known shape, such as llama-3.2-1b, with random weights: no download.")
    ] = None
    method: Annotated[str, typer.Option(help="NAME[:SPARSITY][:key=value], or several joined by +.")] = "griffin"
    sparsity: Annotated[
        float | None, typer.Option(help="Fraction removed, where --method does not say; 0.5 if neither does.")
    ] = None
    layers: Annotated[str, typer.Option(help="all, first-half, or numbers like 0,1,4-7.")] = "all"
    rank: Annotated[int, typer.Option(min=1, help="Rank of each branch.")] = 256
    prompt_tokens: Annotated[int, typer.Option(help="Length of the prompt.")] = 128
    new_tokens: Annotated[int, typer.Option(help="Tokens timed in each row.")] = 64
    batch: Annotated[str, typer.Option(help="Sequences decoded together; several, 1,2,4,8,16, for a sweep.")] = "1"
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Also the compiled rows.")] = True
    rows: Annotated[str | None, typer.Option(help="Only these rows, with commas.")] = None
    form: Annotated[str, typer.Option(help="auto, packed or indexed (see caprese.fuse).")] = "auto"
    engine: Annotated[
        str | None,
        typer.Option(
            help="llama.cpp or vllm, or both with a comma: the dense model as their --engine-types beside ours, at "
            "batch 1."
        ),
    ] = None
    engine_types: Annotated[
        str | None,
        typer.Option(
            help="Of the dense model, with commas; q8_0,q4_0,q4_k_m for llama.cpp and bfloat16,w4a16,w8a8 for vLLM "
            "without."
        ),
    ] = None
    gguf: Annotated[
        list[str] | None, typer.Option(help="A GGUF file that llama.cpp runs beside ours; several by repeating.")
    ] = None
    checkpoint: Annotated[
        list[str] | None,
        typer.Option(help="A checkpoint's directory that vLLM runs beside ours; several by repeating."),
    ] = None
    lossless: Annotated[
        bool, typer.Option("--lossless", help="Draft and verify instead: acceptance, costs, speed-up over dense.")
    ] = False
    adapter: Annotated[
        str | None, typer.Option("--adapter", "-a", help="With --lossless: an adapter that drafts, and not --method.")
    ] = None
    draft: Annotated[
        str | None, typer.Option(help="With --lossless: own (the method or adapter), lookup, or a model.")
    ] = None
    draft_tokens: Annotated[
        int | None, typer.Option(help="With --lossless: drafted each round; as many as pay without.", min=0, max=64)
    ] = None
    prompts: Annotated[
        str | None,
        typer.Option(
            help="With --lossless: where prompts come from, as in a recipe; everyday language of kinds that no recipe "
            "trains on without."
        ),
    ] = None
    count: Annotated[int, typer.Option(help="With --lossless: how many prompts.", min=1)] = 12
    temperature: Annotated[float, typer.Option(help="With --lossless; 0 is greedy.", min=0)] = 0.0
    output: Annotated[str | None, typer.Option("--output", "-o", help="Directory for bench.json and bench.png.")] = None
    revision: Annotated[str | None, typer.Option(help="Hub revision of the model.")] = None
    dtype: QuickDtype = "auto"
    device: Device = "auto"
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print bytes and byte floor; time no row.")] = False
    as_json: Json = False


def bench(flags: Flags) -> None:
    """Time to next token, side by side: dense, efficient, LoRA of equal size, recovered, fused; eager and compiled."""
    import shlex
    import sys
    import tempfile

    import torch

    from caprese.efficient_methods import describe_methods
    from caprese.exports import dense_checkpoints, dense_ggufs
    from caprese.files import check_writable, write_json
    from caprese.models import load_base, load_config, random_model, shape_config
    from caprese.models.loading import pick_device, pick_dtype
    from caprese.recipes import resolve_recipe
    from caprese.report.bench import describe_bench, plot_bench
    from caprese.report.tables import figures_table
    from caprese.studies.bench import bench as measure
    from caprese.studies.bench import bench_plan
    from caprese.studies.engines import engine_types
    from caprese.studies.rows import rows_of

    name = flags.model or flags.random_weights
    if name is None or (flags.model and flags.random_weights):
        raise CapreseError("which model? give --model, or --random-weights with a known shape, and not both")
    try:
        batches = [int(part) for part in flags.batch.split(",")]
    except ValueError:
        raise CapreseError(f"--batch {flags.batch!r}: use a number, or several like 1,2,4") from None
    dtype = parse_quick(flags.dtype)
    if flags.lossless:
        _lossless(flags, name, batches)
        return
    methods = resolve_recipe(method=flags.method, sparsity=flags.sparsity, layers=parse_layers(flags.layers)).methods
    if flags.dry_run:
        config = shape_config(flags.random_weights) if flags.random_weights else load_config(name, flags.revision)
        figures = bench_plan(
            config, methods, flags.rank, pick_dtype(dtype, pick_device(flags.device), config) or torch.bfloat16, batches
        )
        show(figures, flags.as_json, lambda found: [figures_table("bench", found)])
        return
    if flags.output is not None:
        check_writable(Path(flags.output))
    if flags.random_weights and "llama.cpp" in (flags.engine or ""):
        raise CapreseError("--engine llama.cpp wants a tokenizer, which --random-weights has not; give --model")
    if flags.engine_types and not flags.engine:
        raise CapreseError("--engine-types are those of an engine; give --engine too")
    if 1 not in batches and (flags.engine or flags.gguf or flags.checkpoint):
        raise CapreseError("other engines run at batch 1; add it to --batch")
    types, others = engine_types(flags.engine, flags.engine_types), _given(flags)
    tokenizer: Any = None
    if flags.random_weights:
        place = pick_device(flags.device)
        config = shape_config(flags.random_weights)
        say(f"random weights in the shape of {flags.random_weights}, {describe_methods(methods)}, rank {flags.rank}")
        kind = pick_dtype(dtype, place, config) or torch.bfloat16
        loaded = random_model(config, kind, place)
    else:
        loaded, tokenizer = load_base(name, revision=flags.revision, dtype=dtype, device=flags.device)
    with tempfile.TemporaryDirectory(prefix="caprese-bench-") as made:
        for engine, kinds in types.items():
            say(f"the dense model as {', '.join(kinds)} for {engine}")
            if engine == "vllm":
                found = dense_checkpoints(loaded, kinds, Path(made))
            else:
                found = dense_ggufs(loaded, tokenizer, kinds, Path(made))
            others = {f"{engine} {kind}": path for kind, path in found.items()} | others
        result = measure(
            loaded,
            methods,
            batches,
            rank=flags.rank,
            prompt_tokens=flags.prompt_tokens,
            new_tokens=flags.new_tokens,
            rows=flags.rows.split(",")
            if flags.rows
            else rows_of(methods, flags.compiled, dtype=loaded.dtype, device=loaded.device.type),
            form=flags.form,
            others=others,
        )
    result = {"command": shlex.join(["caprese", *sys.argv[1:]]), "shape": name, **result}
    if flags.output is not None:
        write_json(Path(flags.output) / "bench.json", result)
        plot_bench(result, Path(flags.output) / "bench.png")
    show(result, flags.as_json, describe_bench)


def _lossless(flags: Flags, name: str, batches: list[int]) -> None:
    """Dense and lossless decoding side by side.

    Raises:
        CapreseError: flags that do not go together, or prompts that cannot be read.
    """
    import shlex
    import sys

    import torch

    from caprese.adapters import Adapter
    from caprese.evaluation.evaluate import environment
    from caprese.files import check_writable, write_json
    from caprese.inference import load
    from caprese.inference.lossless import Lossless, rule_of
    from caprese.models import device_of, load_base, random_model, shape_config
    from caprese.models.loading import pick_device, pick_dtype
    from caprese.report.lossless import describe_lossless
    from caprese.studies.lossless import LEAST, bench_lossless
    from caprese.studies.prompts import EVERYDAY, some_prompts

    if flags.dry_run or (flags.random_weights and flags.adapter):
        raise CapreseError("--lossless times real tokens: leave out --dry-run, and --adapter with --random-weights")
    if len(batches) > 1 or flags.engine or flags.gguf or flags.checkpoint:
        raise CapreseError("--lossless is measured at one --batch, and in no other engine (see docs/lossless.md)")
    if batches[0] < 1 or flags.new_tokens < LEAST:
        raise CapreseError(f"--lossless is measured with a --batch of 1 or more and {LEAST} --new-tokens or more")
    if flags.output is not None:
        check_writable(Path(flags.output))
    how: dict[str, Any] = {"dtype": parse_quick(flags.dtype), "device": flags.device}
    opened = None if flags.adapter is None else Adapter.open(flags.adapter)
    tokenizer: Any = None
    model: Any
    if flags.random_weights:
        config, place = shape_config(name), pick_device(flags.device)
        model = random_model(config, pick_dtype(how["dtype"], place, config) or torch.bfloat16, place)
    elif opened is not None:
        model, tokenizer = opened.load_base(name, **how)
        model = load(model, opened, fused=True)
    else:
        model, tokenizer = load_base(name, revision=flags.revision, **how)
    draft = make_draft(flags.draft, tokenizer, **how)
    who = flags.adapter or flags.method
    if draft != "own":
        who = flags.draft or ""
    elif opened is None:
        put_method(model, flags.method, flags.sparsity, parse_layers(flags.layers))
    if tokenizer is None:
        length = flags.prompt_tokens
        prompts = torch.randint(
            config.vocab_size, (flags.count, length), generator=torch.Generator().manual_seed(0)
        ).tolist()
        source = "random tokens"
    else:
        prompts = some_prompts(flags.prompts, flags.count, model, tokenizer, flags.new_tokens)
        source = flags.prompts or EVERYDAY
    say(f"{who} drafts for {name}, {len(prompts)} prompts ({source})")
    rule = rule_of(flags.temperature, device=device_of(model))
    pair = Lossless(draft, tokens=flags.draft_tokens)
    result = bench_lossless(model, pair, prompts, flags.new_tokens, rule, batches[0])
    here = environment(model)
    facts = {"draft": who, "source": source, "temperature": flags.temperature, "dtype": here["dtype"]}
    result = {"command": shlex.join(["caprese", *sys.argv[1:]]), "shape": name, **facts, **result, "environment": here}
    if flags.output is not None:
        write_json(Path(flags.output) / "lossless.json", result)
    show(result, flags.as_json, describe_lossless)


def _given(flags: Flags) -> dict[str, Path]:
    """What other engines run of what is there already, by the names of their rows.

    Raises:
        CapreseError: a file or directory that there is not, or an engine.
    """
    from caprese.data_gen.vllm import find_vllm
    from caprese.exports.gguf import check_llama_cpp

    given: dict[str, Path] = {}
    for name in flags.gguf or []:
        if not Path(name).is_file():
            raise CapreseError(f"--gguf {name}: there is no such file")
        check_llama_cpp()
        _name(given, Path(name).stem, Path(name))
    for name in flags.checkpoint or []:
        if not name or not (Path(name) / "config.json").is_file():
            raise CapreseError(f"--checkpoint {name}: there is no config.json in such a directory")
        find_vllm()
        _name(given, Path(name).resolve().name, Path(name))
    return given


def _name(given: dict[str, Path], name: str, path: Path) -> None:
    """Add what another engine runs as the row of this name."""
    if name in given:
        raise CapreseError(f"{given[name]} and {path} would both be the row {name}; rename one of them")
    given[name] = path
