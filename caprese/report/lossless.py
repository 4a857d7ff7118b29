"""What `bench --lossless` measured, as a table."""

from __future__ import annotations

from typing import Any

from rich.table import Table


def describe_lossless(result: dict[str, Any]) -> list[Any]:
    """The result as a table."""
    title = f"{result['shape']}, {result['draft']} drafts, {result['dtype']}, batch {result['batch']}"
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column("", no_wrap=True)
    table.add_column("", justify="right")
    verify, even, accepted = result["verify_cost"], result["break_even"], result["acceptance"]
    at = verify.get(str(result["tokens"] + 1))
    rows = {
        "drafts a round": str(result["tokens"]),
        "accepted": "none drafted" if accepted is None else f"{accepted:.3f}",
        "tokens a round": "" if result["tokens_per_round"] is None else f"{result['tokens_per_round']:.2f}",
        "draft, dense steps": f"{result['draft_cost']:.3f}",
        "verify, dense steps": "" if at is None else f"{at:.2f}",
        "pays from acceptance": "never" if even is None else f"{even:.2f}",
        "speed-up, predicted": f"{result['predicted']:.2f}x",
        "speed-up, measured": f"{result['measured']:.2f}x",
        "adapting, down to none": "" if result["adapting"] is None else f"{result['adapting']:.2f}x",
        "dense, ms a token": f"{result['dense_ms']:.1f}",
        "lossless, ms a token": f"{result['lossless_ms']:.1f}",
        "the dense text": "" if result["identical"] is None else result["identical"],
    }
    for name, value in rows.items():
        table.add_row(name, value)
    wide = ", ".join(f"{width}: {cost:.2f}" for width, cost in verify.items())
    return [
        table,
        f"{result['prompts']} prompts ({result['source']}), {result['new_tokens']} new tokens each. A dense pass over "
        f"so many tokens takes so many dense steps: {wide}",
    ]
