"""The README.md of an exported checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from caprese.adapters import public_id
from caprese.efficient_methods import describe_methods, phases_of, stand_ins
from caprese.exports.compressed import DESCRIBED, SCHEMES
from caprese.models import base_of, base_terms


def card(model: nn.Module, facts: Mapping[str, Any]) -> str:
    """What the checkpoint is, from the facts that `export` gives."""
    base = base_of(model)
    name = public_id(base.model_id)
    matter: dict[str, Any] = {
        "base_model": name,
        "library_name": "gguf" if facts["gguf"] else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["caprese", *(method.name for method in phases_of(model).methods)],
        **base_terms(Path(base.source)),
    }
    what = describe_methods(phases_of(model).methods)
    changed = (
        f"{name} with {facts['ffn_width']} instead of {facts['base_ffn_width']} neurons in each FFN, the recovery "
        "adapter among them, on prompts too"
    )
    if replaced := [str(at.layer) for at in stand_ins(model)]:
        trained = " and ".join(method.trains for method in phases_of(model).methods if method.trains)
        changed = f"{name} with {trained} in layers {', '.join(replaced)}"
    alone = "transformers"
    if facts["outtype"] in SCHEMES:
        changed += f", {DESCRIBED[facts['outtype']]}"
        alone += " and compressed-tensors"
    return (
        f"---\n{yaml.safe_dump(matter, sort_keys=False)}---\n\n# {name}, {what}\n\n"
        f"{changed}; {facts['parameters']:,} instead of {facts['base_parameters']:,} parameters. Exported by "
        f"caprese as an ordinary {facts['architecture']}: it needs caprese no more. Read back by {alone} alone, "
        f"its logits differ from the caprese model's by {facts['largest_logit_difference']:.1e} at most (the largest "
        f"is {facts['largest_logit']:.1f}).\n" + _fidelity(model, facts)
    )


def _fidelity(model: nn.Module, facts: Mapping[str, Any]) -> str:
    """What was measured of the checkpoint, as part of its card."""
    by_kind: Mapping[str, Any] | None = facts["fidelity"]
    if not by_kind:
        return ""
    head = "| Prompts | Samples | KL | Top-1 | Perplexity |\n| --- | ---: | ---: | ---: | ---: |\n"
    rows = ""
    for kind, f in by_kind.items():
        perplexity = f["perplexity"] or float("inf")
        rows += f"| {kind} | {f['samples']} | {f['kl']:.4f} | {f['top1_agreement']:.1%} | {perplexity:.2f} |\n"
    phases = phases_of(model)
    how = "with prompts as stored" if phases.stored_prompts else "as it runs here"
    how = "with dense prompts" if phases.dense_prompts else how
    which = "this checkpoint" if facts["gguf"] is None else "this checkpoint before it became a GGUF,"
    rounded = ", weights and inputs rounded as they are stored" if facts["outtype"] in SCHEMES else ""
    return (
        f"\n## Fidelity\n\nAgainst the dense model's greedy answers, measured on {which} in plain "
        f"transformers{rounded}, which runs prompts through what is left, too; it was distilled {how}.\n\n{head}{rows}"
    )
