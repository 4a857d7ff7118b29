"""`caprese export`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, cast

import typer

from caprese.commands.options import Device, Json
from caprese.errors import CapreseError
from caprese.progress import show


@dataclass(frozen=True)
class Flags:
    """What `caprese export` takes."""

    adapter: Annotated[
        str, typer.Argument(help="An adapter whose method a checkpoint can hold: a directory, or a hub id.")
    ]
    to: Annotated[str, typer.Option(help="Directory for the checkpoint.")]
    model: Annotated[str | None, typer.Option("--model", "-m", help="The base, where it was a local directory.")] = None
    format: Annotated[str, typer.Option(help="hf, or gguf for llama.cpp.")] = "hf"
    outtype: Annotated[
        str | None,
        typer.Option(
            help="gguf: f32, f16 (as it is without), bf16, q8_0, q4_0, q4_k_m, q5_k_m, q6_k. hf: w4a16, w8a8, w8a16, "
            "fp8, for vLLM; without, all bits."
        ),
    ] = None
    dtype: Annotated[str, typer.Option(help="Of the weights: auto (the checkpoint's), float32, bfloat16.")] = "auto"
    samples: Annotated[
        int, typer.Option(help="Prompts of each kind that the checkpoint is measured on; 0 skips it.", min=0)
    ] = 24
    device: Device = "auto"
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in --to.")] = False
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what it would be; write nothing.")] = False
    as_json: Json = False


def export(flags: Flags) -> None:
    """Write a recovered model as an ordinary checkpoint that needs no caprese: for transformers, vLLM, llama.cpp."""
    from caprese.report.tables import figures_table

    if flags.format not in ("hf", "gguf"):
        raise CapreseError(f"--format {flags.format}: hf or gguf")
    if flags.dry_run:
        from caprese.adapters import Adapter
        from caprese.exports import check_target, plan_export
        from caprese.exports.gguf import check_outtype
        from caprese.models import load_config

        opened = Adapter.open(flags.adapter)
        name = flags.model or opened.sidecar.base.name
        check_target(flags.to, name, flags.overwrite)
        ranks = opened.ranks if opened.has_branches() else {}
        config = load_config(name, opened.base_revision(name))
        if flags.format == "gguf":
            check_outtype(flags.outtype or "f16")
        outtype = flags.outtype if flags.format == "hf" else None
        figures = plan_export(config, opened.methods, lambda layer: ranks.get(layer, 0), outtype)
    else:
        from caprese.models.loading import pick_dtype
        from caprese.recovery.finished import export_adapter

        figures = export_adapter(
            flags.adapter,
            flags.to,
            flags.model,
            samples=flags.samples,
            device=flags.device,
            format=cast(Any, flags.format),
            dtype=None if flags.dtype == "auto" else pick_dtype(flags.dtype, "cpu"),
            outtype=flags.outtype,
            overwrite=flags.overwrite,
        )
    show(figures, flags.as_json, lambda found: [figures_table("would write" if flags.dry_run else "written", found)])
