"""`caprese export`."""

from __future__ import annotations

from typing import Annotated, Any, cast

import typer

from caprese.commands.options import Device, Json
from caprese.errors import CapreseError
from caprese.progress import say, show


def export(
    adapter: Annotated[
        str, typer.Argument(help="An adapter whose method a checkpoint can hold: a directory, or a hub id.")
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
    from caprese.adapters import Adapter
    from caprese.exports import export as write
    from caprese.exports import plan_export
    from caprese.inference import load
    from caprese.models import load_config
    from caprese.models.loading import pick_dtype
    from caprese.report.tables import figures_table

    if format not in ("hf", "gguf"):
        raise CapreseError(f"--format {format}: hf or gguf")
    opened = Adapter.open(adapter)
    if dry_run:
        name = model or opened.sidecar.base.name
        ranks = opened.ranks if opened.has_branches() else {}
        config = load_config(name, opened.base_revision(name))
        figures = plan_export(config, opened.methods, lambda layer: ranks.get(layer, 0))
    else:
        kind = None if dtype == "auto" else pick_dtype(dtype, "cpu")
        base, tokenizer = opened.load_base(model, device=device)
        lm = load(base, opened)
        figures = write(
            lm, tokenizer, to, format=cast(Any, format), dtype=kind, outtype=outtype, overwrite=overwrite, say=say
        )
    show(figures, as_json, lambda found: [figures_table("would write" if dry_run else "written", found)])
