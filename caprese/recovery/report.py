"""What a job says of itself: report.json."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from caprese import __version__
from caprese.adapters import Adapter, public_id
from caprese.data_gen import ENDPOINT, HERE, VLLM, Sample, describe, public_names
from caprese.distill import Fitted
from caprese.efficient_methods import applied_ffns, facts_of, phases_of, stand_ins
from caprese.evaluation import environment
from caprese.files import path_of
from caprese.models import base_of, base_terms, unwrap
from caprese.recipes import Recipe
from caprese.recovery.run import Run


def portable(recipe: Recipe, revision: str | None) -> Recipe:
    """The recipe without this machine's directories, memory and neighbours' addresses, and with the base's commit."""
    sources = recipe.samples.prompts
    names = public_names([one.source for one in sources])
    prompts = tuple(one.model_copy(update={"source": name}) for one, name in zip(sources, names, strict=True))
    teacher = recipe.samples.teacher if recipe.samples.teacher in (HERE, VLLM) else ENDPOINT
    samples = recipe.samples.model_copy(update={"prompts": prompts, "teacher": teacher, "teacher_model": None})
    places = {
        "model": public_id(recipe.model) if recipe.model else None,
        "output": path_of(recipe.output).resolve().name,
        "samples": samples,
        "residency": "whole",
    }
    return recipe.model_copy(update={**places, "revision": revision or recipe.revision})


def report_of(
    run: Run,
    recipe: Recipe,
    prints: Mapping[str, str],
    samples: Mapping[str, Sequence[Sample]],
    fitted: Fitted,
    measured: Mapping[str, Any],
    quick: bool,
) -> dict[str, Any]:
    """Everything that is known of a job whose adapter is saved.

    Args:
        recipe: as it is published.
        prints: the base's fingerprint.
        measured: what `evaluate` gave.
        quick: whether samples were drawn and branches trained with products in bfloat16.
    """
    model = fitted.model
    base, methods = base_of(model), phases_of(model).methods
    return {
        "caprese_version": __version__,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": "caprese recover --recipe recipe.yaml",
        "model": recipe.model,
        "model_id": public_id(base.model_id),
        "revision": base.revision,
        "fingerprint": ":".join(prints.values()),
        "license": None,
        **base_terms(Path(base.source)),
        "adapter_digest": Adapter.open(run.directory).digest,
        "method": "+".join(method.name for method in methods),
        "sparsity": getattr(methods[0], "sparsity", None) if len(methods) == 1 else None,
        "methods": [facts_of(method) for method in methods],
        "reselect_every": recipe.reselect_every,
        "prefill": recipe.prefill,
        "products": "bfloat16" if quick else str(unwrap(model).dtype).removeprefix("torch."),
        "rank": fitted.ranks[0] if len(set(fitted.ranks)) == 1 else fitted.ranks,
        "layers": [wrapper.layer for wrapper in applied_ffns(model).values()],
        "lost": sorted({what for at in stand_ins(model) for what in at.lost}),
        "seed": run.seed,
        **measured,
        "stages": run.stages(),
        "curves": fitted.curves,
        "samples": {split: describe(rows) for split, rows in samples.items()},
        "environment": environment(model),
        "recipe": recipe.model_dump(mode="json"),
        "identity": run.identity,
    }
