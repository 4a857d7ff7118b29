"""`caprese generate`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import typer

from caprese.commands.options import (
    Device,
    Json,
    Model,
    Prompts,
    QuickDtype,
    Reselect,
    Seed,
    parse_quick,
    parse_reselect,
)
from caprese.errors import CapreseError
from caprese.progress import say, show, write


@dataclass(frozen=True)
class Flags:
    """What `caprese generate` takes."""

    model: Model
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to answer.")]
    adapter: Annotated[
        str | None, typer.Option("--adapter", "-a", help="Recovery adapter; without one the model runs dense.")
    ] = None
    max_new_tokens: Annotated[int, typer.Option(help="Length limit of the answer.", min=1)] = 256
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0)] = 0.0
    top_p: Annotated[float, typer.Option(min=0, max=1)] = 1.0
    instruction: Annotated[str, typer.Option(help="Put before the prompt.")] = ""
    reselect_every: Reselect = None
    prefill: Prompts = None
    fused: Annotated[bool, typer.Option("--fused/--unfused", help="Run FFN and adapter as one step.")] = True
    seed: Seed = 0
    dtype: QuickDtype = "auto"
    device: Device = "auto"
    as_json: Json = False


def generate(flags: Flags) -> None:
    """Answer a prompt, streaming, and show the time to next token."""
    from caprese.adapters import Adapter, fingerprint
    from caprese.inference import load, stream
    from caprese.inference.sampling import greedy, nucleus
    from caprese.models import device_of, load_base

    if not flags.prompt.strip():
        raise CapreseError("the prompt is empty; give --prompt some text")
    if flags.reselect_every is not None and flags.adapter is None:
        raise CapreseError("--reselect-every goes with --adapter: without one the model runs dense")
    if flags.prefill is not None and flags.adapter is None:
        raise CapreseError("--prefill goes with --adapter: without one the model runs dense")
    lm: Any
    if flags.adapter is not None:
        opened = Adapter.open(flags.adapter)
        base, tokenizer = opened.load_base(flags.model, dtype=parse_quick(flags.dtype), device=flags.device)
        prefill = flags.prefill or opened.sidecar.prefill
        how: dict[str, Any] = {"reselect_every": parse_reselect(flags.reselect_every), "prefill": prefill}
        lm = load(base, opened, fused=flags.fused, keep_dense=prefill == "dense", **how)
    else:
        lm, tokenizer = load_base(flags.model, dtype=parse_quick(flags.dtype), device=flags.device)
        fingerprint(lm)  # refuses damaged weights, as `load` does
    result = stream(
        lm,
        tokenizer,
        flags.prompt,
        nucleus(1, flags.temperature, flags.top_p, flags.seed, device_of(lm)) if flags.temperature else greedy,
        instruction=flags.instruction,
        max_new_tokens=flags.max_new_tokens,
        emit=None if flags.as_json else lambda text: write(text, end=""),
    )
    show(result, flags.as_json, lambda _: [""])  # the text itself has been streamed
    ttnt = "" if result["ttnt_ms"] is None else f", TTNT {result['ttnt_ms']:.1f} ms (median)"
    dtype = str(lm.dtype).removeprefix("torch.")
    say((f"{result['new_tokens']} tokens in {dtype}, first after {result['first_token_ms']:.0f} ms{ttnt}", "dim"))
