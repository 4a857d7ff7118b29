"""`caprese generate`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

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
from caprese.commands.pair import check_draft, make_draft, put_method
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
    method: Annotated[
        str | None,
        typer.Option(
            help="Without an adapter: a method that needs neither samples nor training, such as q8 or griffin:0.3."
        ),
    ] = None
    max_new_tokens: Annotated[int, typer.Option(help="Length limit of the answer.", min=1)] = 256
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0)] = 0.0
    top_p: Annotated[float, typer.Option(min=0, max=1)] = 1.0
    instruction: Annotated[str, typer.Option(help="Put before the prompt.")] = ""
    reselect_every: Reselect = None
    prefill: Prompts = None
    fused: Annotated[bool, typer.Option("--fused/--unfused", help="Run FFN and adapter as one step.")] = True
    lossless: Annotated[
        bool, typer.Option("--lossless", help="The dense model's own text, sooner: the adapter drafts, it verifies.")
    ] = False
    draft: Annotated[
        str | None,
        typer.Option(
            help="Who drafts with --lossless: own (the adapter), lookup (the text before), or a model with the same "
            "tokenizer."
        ),
    ] = None
    draft_tokens: Annotated[
        int | None, typer.Option(help="Tokens drafted each round; as many as pay without.", min=0, max=64)
    ] = None
    target: Annotated[
        Literal["dense", "hybrid"], typer.Option(help="Whose text: dense, or hybrid: attention replaced, FFNs dense.")
    ] = "dense"
    top_k: Annotated[int, typer.Option(help="With --lossless; 0 is all.", min=0)] = 0
    repetition_penalty: Annotated[float, typer.Option(help="With --lossless; 1 is none.", min=0.01)] = 1.0
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
    if flags.method is not None and flags.adapter is not None:
        raise CapreseError("--method goes without --adapter, which has a method of its own")
    _check_lossless(flags)
    lm: Any
    if flags.adapter is not None:
        opened = Adapter.open(flags.adapter)
        base, tokenizer = opened.load_base(flags.model, dtype=parse_quick(flags.dtype), device=flags.device)
        prefill = flags.prefill or opened.sidecar.prefill
        how: dict[str, Any] = {"reselect_every": parse_reselect(flags.reselect_every), "prefill": prefill}
        lm = load(base, opened, fused=flags.fused, keep_dense=flags.lossless or prefill == "dense", **how)
    else:
        lm, tokenizer = load_base(flags.model, dtype=parse_quick(flags.dtype), device=flags.device)
        fingerprint(lm)  # refuses damaged weights, as `load` does
        if flags.method is not None:
            put_method(lm, flags.method, fused=flags.fused)
    pair = _lossless(flags, tokenizer)
    result = stream(
        lm,
        tokenizer,
        flags.prompt,
        nucleus(1, flags.temperature, flags.top_p, flags.seed, device_of(lm)) if flags.temperature else greedy,
        instruction=flags.instruction,
        max_new_tokens=flags.max_new_tokens,
        emit=None if flags.as_json else lambda text: write(text, end=""),
        lossless=None if pair is None else (pair, _rule(flags, device_of(lm))),
    )
    show(result, flags.as_json, lambda _: [""])  # the text itself has been streamed
    ttnt = (
        ""
        if result["ttnt_ms"] is None
        else f", TTNT {result['ttnt_ms']:.1f} ms ({'median' if pair is None else 'mean'})"
    )
    if pair is not None and result["acceptance"] is not None:
        ttnt += f", {result['acceptance']:.0%} of drafts accepted, {result['tokens_per_round']:.1f} tokens a round"
    dtype = str(lm.dtype).removeprefix("torch.")
    say((f"{result['new_tokens']} tokens in {dtype}, first after {result['first_token_ms']:.0f} ms{ttnt}", "dim"))


def _check_lossless(flags: Flags) -> None:
    """Raise CapreseError for flags that do not go together."""
    if flags.lossless:
        return check_draft(flags.draft, flags.adapter is not None or flags.method is not None)
    given = {
        "--draft": flags.draft is not None,
        "--draft-tokens": flags.draft_tokens is not None,
        "--top-k": flags.top_k > 0,
        "--repetition-penalty": flags.repetition_penalty != 1,
        "--target": flags.target != "dense",
    }
    if alone := [name for name, said in given.items() if said]:
        raise CapreseError(f"{alone[0]} goes with --lossless")


def _lossless(flags: Flags, tokenizer: Any) -> Any:
    """What drafts and verifies, if that is asked for."""
    from caprese.inference.lossless import Lossless

    if not flags.lossless:
        return None
    draft = make_draft(flags.draft, tokenizer, dtype=parse_quick(flags.dtype), device=flags.device)
    return Lossless(draft, target=flags.target, tokens=flags.draft_tokens)


def _rule(flags: Flags, device: Any) -> Any:
    from caprese.inference.lossless import rule_of

    return rule_of(flags.temperature, flags.top_k, flags.top_p, flags.repetition_penalty, flags.seed, device)
