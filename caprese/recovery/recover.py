"""The main job, told in one page: samples -> distil -> evaluate -> save.

Every stage leaves its result in OUTPUT/.state (samples in OUTPUT/samples) and is skipped if it is there, so a run that
was stopped goes on where it was. A stage that does not help on held-out samples is not kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import nn
from transformers import PreTrainedTokenizerBase

from caprese.adapters import fingerprint, save
from caprese.data_gen import ELSEWHERE, Completer, make_samples, shard_settings, teacher_of
from caprese.distill import Distillation, fit
from caprese.distill.precision import is_quicker, kept_casts, quick_products
from caprese.efficient_methods import Method, apply, remove, stand_ins
from caprese.errors import CapreseError
from caprese.evaluation import evaluate
from caprese.files import at_work, path_of
from caprese.models import base_of, device_of, residency_of
from caprese.progress import say
from caprese.recipes import Recipe, resolve_recipe
from caprese.recovery.report import portable, report_of
from caprese.recovery.run import Run, identity_of
from caprese.recovery.search import find_fastest
from caprese.recovery.stages import Calibrating, check_job, check_residency, check_samples, choose
from caprese.report.write import write_report


def recover(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe | None = None,
    *,
    overwrite: bool = False,
    teacher: Completer | None = None,
) -> dict[str, Any]:
    """Distil a recovery adapter for a cheaper `model` from the dense `model` itself.

    The adapter, the recipe, the samples and the report are written to `recipe.output`; the model itself comes back as
    it was. A second call with the same recipe goes on where the first one stopped, or returns its report.

    Args:
        overwrite: replace what another recipe left in the output directory.
        teacher: draws the samples; `recipe.samples.teacher` is then to be "endpoint", unless it is `Here`.

    Returns: the report, as in report.json.

    Raises:
        CapreseError: anything wrong with model, recipe, prompts or output, in one line with the remedy.
    """
    # the first to ask decides for all: without cpu=True, processes without an accelerator would not find each other
    PartialState(cpu=device_of(model).type == "cpu")
    recipe = recipe or Recipe()
    if recipe.model is None:
        # what it leaves open comes from the recipe shipped for this model, if there is one
        recipe = resolve_recipe(model=base_of(model).name, **recipe.model_dump(exclude_unset=True, exclude={"model"}))
    each = [
        check_job(model, methods, recipe.branches, recipe.layerwise, recipe.samples.sources)
        for methods in recipe.compositions
    ]
    check_residency(residency_of(model), recipe)
    out = path_of(recipe.output)
    with at_work(out) if PartialState().is_main_process else nullcontext():
        return _recover(model, tokenizer, recipe, each, out, overwrite, teacher)


def _recover(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    each: Sequence[Mapping[int, Sequence[Method]]],
    out: Path,
    overwrite: bool,
    teacher: Completer | None,
) -> dict[str, Any]:
    prints = fingerprint(model)
    run = Run(out, identity_of(recipe, each, prints), recipe.seed)
    if (finished := run.finished()) is not None:
        return finished
    run.claim(overwrite)

    quick = (
        recipe.autocast
        and run.once("precision", lambda: ({}, {"quick": _is_quick(model, out / "samples")}))[1]["quick"]
    )
    drawing = teacher_of(recipe.samples, model, tokenizer, teacher)
    with run.stage("samples") as stage, kept_casts(model, quick), drawing as teacher:
        replacing = run.unmark if overwrite else None
        made_by = {**prints, **({"products": "bfloat16"} if quick else {})}
        samples = make_samples(model, tokenizer, recipe.samples, out / "samples", run.seed, made_by, replacing, teacher)
        counts = [f"{len(samples[split])} {split}" for split in ("train", "validation", "test")]
        stage.update(note=", ".join([*counts, teacher.note] if teacher.note else counts))
    check_samples(samples)
    limit, size = recipe.end_to_end.cache_gigabytes, recipe.layerwise.batch_size
    calibrating = Calibrating(
        recipe.calibration_samples, size, limit, recipe.target_kl, recipe.target_active, recipe.prefill
    )
    methods = recipe.methods
    if recipe.alternatives:
        methods, calibrating = find_fastest(model, recipe.compositions, samples, calibrating, run)
    methods, calibration = choose(model, methods, samples, calibrating, recipe.alignment, run)
    adapted: nn.Module = apply(
        model, methods, calibration=calibration, reselect_every=recipe.reselect_every, prefill=recipe.prefill
    )
    if lost := sorted({what for at in stand_ins(model) for what in at.lost}):
        say(f"stand-ins start without the {', '.join(lost)} of what they replace")
    try:
        distillation = Distillation(recipe.branches, recipe.alignment, recipe.layerwise, recipe.end_to_end)
        with quick_products(model, quick):
            fitted = fit(model, samples["train"], samples["validation"], distillation, run)
        adapted = fitted.model
        with run.stage("evaluation") as stage:
            settings = {"seed": run.seed, "identity": run.identity}
            measured = evaluate(
                adapted,
                tokenizer,
                samples["test"],
                recipe.samples,
                recipe.evaluation,
                run.state / "answers",
                settings,
                samples.get(ELSEWHERE, ()),
            )
            stage.update(note=f"{len(samples['test'])} test samples")
        measured["search"] = (run.load("search") or ({}, None))[1]  # every process asks
        if not run.main:
            return measured
        run.unmark()
        save(adapted, out)
        published = portable(recipe, base_of(model).revision)
        report = write_report(report_of(run, published, prints, samples, fitted, measured, quick), out)
        run.close()
        return report
    finally:
        remove(adapted)


def _is_quick(model: nn.Module, directory: Path) -> bool:
    """Whether products are in bfloat16: as samples that are there were drawn, else as this machine is faster."""
    for path in sorted(directory.glob("*.parquet")):
        with suppress(CapreseError):  # it is damaged, and will be named where it is read
            return "products" in shard_settings(path).get("model", ())
    return is_quicker(model)
