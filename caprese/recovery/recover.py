"""The main job, told in one page: samples -> distil layer by layer -> distil end to end -> evaluate -> save.

Every stage leaves its result in OUTPUT/.state (samples in OUTPUT/samples) and is skipped if it is there, so a run that
was stopped goes on where it was. A stage that does not help on held-out samples is not kept.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, reduce
from torch import nn
from transformers import PreTrainedTokenizerBase

from caprese import __version__
from caprese.adapters import (
    attach_adapter,
    empty_slots,
    fingerprint,
    get_branches,
    locate,
    public_id,
    read_sidecar,
    save,
    set_branch,
    set_branches,
)
from caprese.data_gen import (
    VERSION,
    Sample,
    Samples,
    complete_in_shards,
    describe,
    load_prompts,
    make_samples,
    trained_prompts,
)
from caprese.distill import (
    HeldOut,
    accumulate,
    align,
    alignment,
    allocate_ranks,
    fit_layer,
    hidden_alignment,
    make_batches,
    match_scale,
    new_moments,
)
from caprese.distill.adam import fit_adam
from caprese.distill.batches import Batch
from caprese.distill.end_to_end import train
from caprese.distill.layerwise import Fit, Moments
from caprese.distill.sensitivity import LEVELS, Sensitivity, allocate_sparsity, select_attention
from caprese.distill.sequential import check_sequential, fit_sequential
from caprese.efficient_methods import (
    Mamba,
    Method,
    Sparse,
    applied_ffns,
    apply,
    calibrate,
    compose,
    describe_methods,
    idle_branches,
    make_method,
    methods_by_layer,
    needs_calibration,
    only,
    phases_of,
    remove,
    replacements,
    settle_mixers,
)
from caprese.errors import CapreseError
from caprese.evaluation import Evaluation, environment, evaluate, finite, variant
from caprese.files import check_writable, read_tensors, write_json, write_tensors, write_text
from caprese.models import (
    base_of,
    base_terms,
    check_context,
    count_parameters,
    device_of,
    encode_prompt,
    find_ffns,
    unwrap,
)
from caprese.progress import bar, say
from caprese.recipes import Recipe, resolve_recipe
from caprese.report.write import write_report

STATE = ".state"
_AGAIN = "delete it and run again to repeat this stage"


def recover(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe | None = None,
    *,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Distil a recovery adapter for a cheaper `model` from the dense `model` itself.

    The adapter, the recipe, the samples and the report are written to `recipe.output`; the model itself comes back as
    it was. A second call with the same recipe goes on where the first one stopped, or returns its report.

    Args:
        overwrite: replace what another recipe left in the output directory.

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
    methods = recipe.make_methods()
    for method in methods:
        method.check()
    sites = find_ffns(model)
    chosen = list(methods_by_layer(methods, len(sites)))
    hidden = sites[0].ffn.hidden_size
    if isinstance(recipe.rank, int) and recipe.rank > hidden and not idle_branches(methods):
        raise CapreseError(f"rank {recipe.rank} exceeds the hidden size {hidden}; choose 1 to {hidden}, or auto")
    if recipe.layerwise.how == "sequential":
        check_sequential(model)
    out = Path(recipe.output).expanduser()
    check_writable(out)
    state = out / STATE
    prints = fingerprint(model)
    identity = _identity(recipe, prints)
    finished = _finished(out, identity)
    if finished is not None:
        shutil.rmtree(state, ignore_errors=True)
        say(f"[green]{out} already holds this run's result[/green]; nothing to do")
        return finished
    _claim(out, state, identity, overwrite)

    with _stage(state, "samples", 1) as stage:
        samples = make_samples(model, tokenizer, recipe.samples, out / "samples", recipe.seed, prints, overwrite)
        stage.update(
            note=f"{len(samples['train'])} train, {len(samples['validation'])} validation, {len(samples['test'])} test"
        )
    methods, calibration = _prepare(model, methods, samples, recipe, state, identity)
    chosen = list(methods_by_layer(methods, len(sites)))
    adapted: nn.Module = apply(model, methods, calibration=calibration, reselect_every=recipe.reselect_every)
    lost = sorted({what for at in replacements(model) for what in at.lost})
    if lost:
        say(f"mixers start without their attention's {', '.join(lost)}")
    try:
        aligned = _alignment(model, samples, recipe, state, identity)
        validation = make_batches(samples["validation"], recipe.layerwise.batch_size, phases_of(model).mixes)
        held_out = HeldOut(model, validation, recipe.end_to_end.cache_gigabytes)
        with _stage(state, "layerwise", 2) as stage:
            adapted, fitted = _layerwise(model, samples, held_out, recipe, state, identity)
            kept = fitted["kl"]["layerwise"] < fitted["kl"]["efficient"]
            stage.update(
                kept=kept, note=f"held-out KL {fitted['kl']['efficient']:.4f} -> {fitted['kl']['layerwise']:.4f}"
            )
        start = min(fitted["kl"].values())
        with _stage(state, "end_to_end", 3) as stage:
            best, curve, checks = _end_to_end(adapted, samples, held_out, recipe, state, identity, start)
            stage.update(kept=best < start, note=f"held-out KL {start:.4f} -> {best:.4f}")
        settle_mixers(adapted)  # what is evaluated is what is saved
        with _stage(state, "evaluation", 4) as stage:
            settings = {"seed": recipe.seed, "identity": identity}
            measured = evaluate(
                adapted, tokenizer, samples["test"], recipe.samples, recipe.evaluation, state / "answers", settings
            )
            stage.update(note=f"{len(samples['test'])} test samples")
        if not PartialState().is_main_process:
            return measured
        save(adapted, out)
        stages = [
            {key: value for key, value in stage.items() if key != "done"}
            for stage in json.loads((state / "stages.json").read_text())
        ]
        base = base_of(model)
        ranks = fitted["ranks"]
        portable = _portable_recipe(recipe, base.revision)
        write_text(out / "recipe.yaml", portable.to_yaml())
        report = {
            "caprese_version": __version__,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": "caprese recover --recipe recipe.yaml",
            "model": portable.model,
            "model_id": public_id(base.model_id),
            "revision": base.revision,
            "fingerprint": ":".join(prints.values()),
            "license": None,
            **base_terms(Path(base.source)),
            "adapter_digest": read_sidecar(out).digest,
            "method": "+".join(method.name for method in methods),
            "sparsity": getattr(methods[0], "sparsity", None) if len(methods) == 1 else None,
            "methods": [{"name": method.name, **method.model_dump(mode="json")} for method in methods],
            "reselect_every": recipe.reselect_every,
            "rank": ranks[0] if len(set(ranks)) == 1 else ranks,
            "layers": chosen,
            "lost": lost,
            "seed": recipe.seed,
            **measured,
            "stages": stages,
            "curves": {
                **aligned,
                "end_to_end": curve,
                "validation": [
                    {"stage": "aligned" if aligned else "efficient", "step": 0, "kl": fitted["kl"]["efficient"]},
                    {"stage": "layerwise", "step": 0, "kl": fitted["kl"]["layerwise"]},
                    *({"stage": "end_to_end", **point} for point in checks),
                ],
                "rank_error": fitted["rank_error"],
            },
            "samples": {split: describe(rows) for split, rows in samples.items()},
            "environment": environment(model),
            "recipe": portable.model_dump(mode="json"),
            "identity": identity,
        }
        final = write_report(report, out)
        shutil.rmtree(state, ignore_errors=True)
        return final
    finally:
        if adapted is model:  # stopped after the adapter went in, before it came back: take it out of the slots
            empty_slots(model)
        remove(adapted)


def _identity(recipe: Recipe, prints: Mapping[str, str]) -> str:
    """What a result depends on, as one digest: the recipe without its places, the base's weights, how samples are
    made."""
    places = {"output", "model", "revision", "device"}
    mixing = set() if "mamba" in recipe.method else {"alignment", "keep_attention"}
    facts = recipe.model_dump(mode="json", exclude=places | mixing)
    if recipe.end_to_end.rounds == 1:  # as before there were any
        del facts["end_to_end"]["rounds"]
    return hashlib.sha256(json.dumps([facts, dict(prints), VERSION], sort_keys=True).encode()).hexdigest()[:32]


def _portable_recipe(recipe: Recipe, revision: str | None) -> Recipe:
    """The recipe without this machine's directories, and with the base's commit."""
    samples = recipe.samples.model_copy(update={"prompts": public_id(recipe.samples.prompts)})
    places = {
        "model": public_id(recipe.model) if recipe.model else None,
        "output": Path(recipe.output).expanduser().resolve().name,
        "samples": samples,
    }
    return recipe.model_copy(update={**places, "revision": revision or recipe.revision})


def _finished(out: Path, identity: str) -> dict[str, Any] | None:
    """The report of a finished run of the same recipe, if that is what `out` holds."""
    try:
        report = json.loads((out / "report.json").read_text())
    except (OSError, ValueError):
        return None
    if report.get("identity") != identity or not (out / "caprese_config.json").exists():
        return None
    return report


def _claim(out: Path, state: Path, identity: str, overwrite: bool) -> None:
    """Mark `out` as this recipe's, unless it is another's."""
    mark = state / "identity.json"
    if not overwrite:
        held = "is half way through" if mark.exists() else "holds the result of"
        path = mark if mark.exists() else out / "report.json"
        if path.exists() and _identity_in(path) != identity:
            raise CapreseError(f"{out} {held} another recipe or base; choose another --output, or give --overwrite")
    elif PartialState().is_main_process and mark.exists() and _identity_in(mark) != identity:
        shutil.rmtree(state)
    if PartialState().is_main_process:
        write_json(mark, {"identity": identity})
    PartialState().wait_for_everyone()


def _identity_in(path: Path) -> str | None:
    """Whose result it is; nobody's if the file is damaged."""
    try:
        return json.loads(path.read_text()).get("identity")
    except ValueError:
        return None


@contextmanager
def _stage(state: Path, name: str, number: int) -> Iterator[dict[str, Any]]:
    """Time a stage and note it in stages.json: the work of all attempts; a stage done keeps the time it took.

    Of an attempt that was killed, the time up to the last file it left counts.
    """
    path = state / "stages.json"
    try:
        known = {s["name"]: s for s in json.loads(path.read_text())} if path.exists() else {}
    except (ValueError, TypeError, KeyError) as error:
        raise CapreseError(f"{path} is damaged ({error}); delete it and run again") from error
    others = [s for s in known.values() if s["name"] != name]
    stage: dict[str, Any] = {"name": name, "seconds": 0.0, "kept": True, "note": "", "done": False}
    before = known.get(name, stage)
    spent, done = before["seconds"], before.get("done", True)
    if "begun" in before and PartialState().is_main_process:
        spent += max(0.0, _last_write(state) - before["begun"])
    begin = time.perf_counter()

    def note(**more: Any) -> None:
        stage["seconds"] = round(spent if done else spent + time.perf_counter() - begin, 2)
        if PartialState().is_main_process:
            write_json(path, [*others, {**stage, **more}])

    if not done:
        note(begun=time.time())
    try:
        yield stage
    except BaseException:
        with suppress(CapreseError):
            note(done=done)
        raise
    note(done=True)
    say(f"{number}/4 {name}: {stage['note']}" + ("" if stage["kept"] else " [yellow](not kept)[/yellow]"))


def _last_write(state: Path) -> float:
    """When the newest of a run's unfinished files was written."""
    files = (path for place in (state, state.parent / "samples") for path in place.rglob("[!.]*.*"))
    return max((path.stat().st_mtime for path in files), default=0.0)


def _prepare(
    model: nn.Module,
    methods: tuple[Method, ...],
    samples: Mapping[str, list[Sample]],
    recipe: Recipe,
    state: Path,
    identity: str,
) -> tuple[tuple[Method, ...], dict[str, torch.Tensor] | None]:
    """What the methods learn from samples: their calibration, with sparsity auto how much each layer gets, and which
    layers keep their attention where that is to be measured.

    Every process goes on from what the main one wrote, which its own may miss by a rounding.
    """
    measured = recipe.sparsity == "auto" or any(_selects(method) for method in methods)
    if not measured and not needs_calibration(methods):
        return methods, None
    path = state / "methods.safetensors"
    exists = path.exists()
    PartialState().wait_for_everyone()  # all have looked before the first can write
    with _stage(state, "calibration", 2) as stage:
        if not exists:
            _learn(model, methods, samples, recipe, path, identity)
        tensors, facts = read_tensors(path, _AGAIN)
        if facts["identity"] != identity:
            raise CapreseError(f"{path} belongs to another recipe; delete it and run again")
        methods = compose([make_method(f) for f in facts["methods"]])
        stage.update(note=describe_methods(methods))
    return methods, tensors or None


def _learn(
    model: nn.Module,
    methods: tuple[Method, ...],
    samples: Mapping[str, list[Sample]],
    recipe: Recipe,
    path: Path,
    identity: str,
) -> None:
    """Write what `_prepare` reads."""
    methods = tuple(
        _select(model, method, samples, recipe, path.parent, identity) if _selects(method) else method
        for method in methods
    )
    rows = make_batches(samples["train"][: recipe.calibration_samples], recipe.layerwise.batch_size)
    if recipe.sparsity == "auto":
        one = methods[0]
        assert isinstance(one, Sparse)
        held_out = make_batches(samples["validation"], recipe.layerwise.batch_size)
        sensitivity = Sensitivity(model, one, rows, held_out, recipe.end_to_end.cache_gigabytes)
        with bar("2/4 sensitivity", len(LEVELS) * len(sensitivity.sites), "layers") as advance:
            target = {"target_kl": recipe.target_kl, "target_active": recipe.target_active}
            methods = (allocate_sparsity(sensitivity, advance=advance, **target),)
    calibration: dict[str, torch.Tensor] = {}
    rows = rows[len(rows) // 2 :] + rows[: len(rows) // 2]  # sorted by length; the first, a method may look at closely
    if needs_calibration(methods):
        learners = sum("samples" in m.learns for m in methods)
        with bar("2/4 calibration", learners * len(rows), "batches") as advance:
            calibration = calibrate(model, methods, [batch.whole() for batch in rows], advance)
    if PartialState().is_main_process:
        chosen = [{"name": m.name, **m.model_dump(mode="json")} for m in methods]
        write_tensors(path, calibration, {"identity": identity, "methods": chosen})
    PartialState().wait_for_everyone()


def _moments(
    model: nn.Module, batches: Mapping[str, list[Batch]], path: Path, identity: str, every: int
) -> dict[str, list[Moments]]:
    """One pass over train and validation samples, saved every `every` batches."""
    world = PartialState()
    sums = {split: new_moments(model) for split in batches}
    work = [(split, batch) for split, group in batches.items() for batch in group]
    done = 0
    if path.exists():
        tensors, facts = read_tensors(path, _AGAIN)
        if facts["identity"] == identity:
            done = facts["done"]
            for split, group in sums.items():
                for i, moments in enumerate(group):
                    for field, tensor in moments.tensors().items():
                        tensor.copy_(tensors[f"{split}.{i}.{field}"])
    with bar("2/4 layer-wise", len(work), "batches", done) as advance:
        while done < len(work):
            part = work[done : done + every]
            fresh = {split: new_moments(model) for split in batches} if world.num_processes > 1 else sums
            for split, batch in part[world.process_index :: world.num_processes]:
                accumulate(model, [batch], fresh[split])
                advance(world.num_processes)
            if world.num_processes > 1:
                for split in sums:
                    for total, new in zip(sums[split], fresh[split], strict=True):
                        for field, tensor in new.tensors().items():
                            getattr(total, field).add_(reduce(tensor, "sum"))
            done += len(part)
            if world.is_main_process:
                tensors = {
                    f"{split}.{i}.{field}": tensor
                    for split, group in sums.items()
                    for i, moments in enumerate(group)
                    for field, tensor in moments.tensors().items()
                }
                write_tensors(path, tensors, {"identity": identity, "done": done})
    return sums


def _layerwise(
    model: nn.Module,
    samples: Mapping[str, list[Sample]],
    held_out: HeldOut,
    recipe: Recipe,
    state: Path,
    identity: str,
) -> tuple[nn.Module, dict[str, Any]]:
    """Stage 2: the model with its adapter, and {"ranks", "kl": {"efficient", "layerwise"}, "rank_error"}.

    Every process goes on from the main one's branches and figures, which its own may miss by a rounding.
    """
    path = state / "layerwise.safetensors"
    exists = path.exists()
    PartialState().wait_for_everyone()  # all have looked before the first can write
    config = recipe.layerwise
    count = len(applied_ffns(model))
    if idle_branches(phases_of(model).methods):  # the smallest branch there is, at zero
        config, recipe = config.model_copy(update={"how": "none"}), recipe.model_copy(update={"rank": 1})
    hidden = next(iter(applied_ffns(model).values())).view.hidden_size
    if exists:
        tensors, facts = read_tensors(path, _AGAIN)
        adapted = _attach(model, facts["ranks"], recipe)
        set_branches(adapted, tensors)
        return adapted, facts
    batches = {split: make_batches(samples[split], config.batch_size) for split in ("validation", "train")}
    budget = max(count, int(recipe.budget * count_parameters(model) / (2 * hidden)))
    mean_rank = recipe.rank if isinstance(recipe.rank, int) else max(1, min(hidden, budget // count))
    ranks = [mean_rank] * count
    fits: list[Fit] = []
    rank_error: dict[str, list[float]] = {"ranks": [], "error": []}
    if config.how == "closed" or recipe.rank == "auto":
        every = max(1, recipe.samples.shard_size // config.batch_size)
        sums = _moments(model, batches, state / "moments.safetensors", identity, every)
        pairs = list(zip(sums["train"], sums["validation"], strict=True))
        with bar("2/4 layer-wise: solve", count, "layers") as advance:
            for fitted_on, held in pairs:
                fits.append(fit_layer(fitted_on, held, mean_rank, config.ridge, recipe.bias))
                advance(1)
        curves = [fit.curve.clamp_min(0).sqrt() for fit in fits]
        rank_error = _rank_error(curves)
        if recipe.rank == "auto":
            ranks = broadcast_object_list([allocate_ranks([fit.curve for fit in fits], budget)])[0]
    adapted = _attach(model, ranks, recipe)
    zero = get_branches(adapted)
    kl = {"efficient": held_out.kl()}
    if config.how == "closed":
        for wrapper, fit, rank in zip(applied_ffns(adapted).values(), fits, ranks, strict=True):
            set_branch(wrapper.recovery, *fit.at(rank))
    elif config.how == "sequential":
        with bar("2/4 layer-wise: sequential", count, "layers") as advance:
            fit_sequential(adapted, batches["train"], batches["validation"], ranks, config.ridge, recipe.bias, advance)
    elif config.how == "adam":
        with bar("2/4 layer-wise: Adam", config.epochs, "epochs") as advance:
            fit_adam(adapted, batches["train"], config, recipe.seed, advance)
    kl["layerwise"] = held_out.kl() if config.how != "none" else kl["efficient"]
    if not kl["layerwise"] < kl["efficient"]:
        set_branches(adapted, zero)
    if PartialState().is_main_process:
        write_tensors(path, get_branches(adapted), {"ranks": ranks, "kl": kl, "rank_error": rank_error})
    PartialState().wait_for_everyone()
    tensors, facts = read_tensors(path, _AGAIN)
    set_branches(adapted, tensors)
    return adapted, facts


def _selects(method: Method) -> bool:
    return isinstance(method, Mamba) and method.selected == "sensitivity"


def _select(
    model: nn.Module,
    method: Method,
    samples: Mapping[str, list[Sample]],
    recipe: Recipe,
    state: Path,
    identity: str,
) -> Mamba:
    """Which layers keep their attention, by what their mixers cost alone."""
    assert isinstance(method, Mamba)
    config = recipe.alignment
    rows = make_batches(samples["train"][: recipe.calibration_samples], config.micro_batch)
    held_out = make_batches(samples["validation"], config.micro_batch, first=True)
    path, limit = state / "sensitivity.safetensors", recipe.end_to_end.cache_gigabytes
    selected, cost = select_attention(model, method, rows, held_out, config, recipe.seed, path, identity, limit)
    say("KL of each layer's mixer alone: " + ", ".join(f"{layer} {kl:.3f}" for layer, kl in cost.items()))
    return selected


def _alignment(
    model: nn.Module, samples: Mapping[str, list[Sample]], recipe: Recipe, state: Path, identity: str
) -> dict[str, list[dict[str, float]]]:
    """Before anything else, mixers learn what the attentions gave that they replace, from its size on; the training
    curves."""
    if not phases_of(model).mixes:
        return {}
    config = recipe.alignment
    curves = {}
    parts = (
        ("alignment", config.epochs, functools.partial(alignment, matrices=config.matrices), "error of mixers"),
        ("hidden_states", config.hidden_epochs, hidden_alignment, "error of hidden states"),
    )
    train, held_out = (make_batches(samples[s], config.micro_batch) for s in ("train", "validation"))
    if train:
        match_scale(model, train[len(train) // 2].to(device_of(model)))
    for name, epochs, measure, what in parts:
        if not epochs:
            continue
        with _stage(state, name, 2) as stage:
            how = config.model_copy(update={"epochs": epochs})
            path, label = state / f"{name}.safetensors", f"2/4 {name.replace('_', ' ')}"
            before, after, curves[name] = align(
                model, measure, train, held_out, how, recipe.seed, path, identity, label
            )
            stage.update(kept=after < before, note=f"held-out {what} {before:.4f} -> {after:.4f}")
    return curves


def _attach(model: nn.Module, ranks: list[int], recipe: Recipe) -> nn.Module:
    """The adapter at zero; its random half is the seed's."""
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        adapted = attach_adapter(model, ranks, recipe.bias)
    return adapted.requires_grad_(False)


def _rank_error(curves: list[torch.Tensor]) -> dict[str, list[float]]:
    """The mean relative FFN error on validation samples at ranks 0, 1, 2, 4, ..."""
    top = len(curves[0]) - 1
    ranks = [0, *(1 << i for i in range(top.bit_length()) if 1 << i <= top)]
    return {
        "ranks": [float(r) for r in ranks],
        "error": [float(torch.stack([c[r] for c in curves]).mean()) for r in ranks],
    }


def _end_to_end(
    adapted: nn.Module,
    samples: Mapping[str, list[Sample]],
    held_out: HeldOut,
    recipe: Recipe,
    state: Path,
    identity: str,
    start: float,
) -> tuple[float, list[dict[str, float]], list[dict[str, float]]]:
    """Stage 3, in place: the best held-out KL, the training curve and the validation curve of the last round."""
    config = recipe.end_to_end
    if config.epochs == 0:
        return start, [], []
    batches = make_batches(samples["train"], config.micro_batch, phases_of(adapted).mixes)
    before = get_branches(adapted)
    every = {w.layer for w in applied_ffns(adapted).values()}
    joining = [at.layer for at in replacements(unwrap(adapted))] or sorted(every)
    paths = [state / f"round-{number}.safetensors" for number in range(1, config.rounds)]
    paths.append(state / "end_to_end.safetensors")
    done = max((i for i, path in enumerate(paths) if path.exists()), default=0)
    PartialState().wait_for_everyone()  # all have looked before the first can write
    for number, path in enumerate(paths[done:-1], done + 1):
        with only(adapted, every - set(joining) | joined(joining, number / config.rounds)):
            own, now = f"{identity}, round {number}", broadcast_object_list([held_out.kl()])[0]
            after, _, _ = train(adapted, batches, held_out, config, recipe.seed, path, own, now)
        say(f"3/4 round {number} of {config.rounds}: held-out KL of the layers so far {now:.4f} -> {after:.4f}")
    last = start if config.rounds == 1 else broadcast_object_list([held_out.kl()])[0]
    best, curve, checks = train(adapted, batches, held_out, config, recipe.seed, paths[-1], identity, last)
    if not best < start:
        set_branches(adapted, before)
    return min(best, start), curve, checks


def joined(layers: list[int], fraction: float) -> set[int]:
    """The first so many of `layers` in an order that is spread evenly from the beginning, so that each round's hold
    those of the round before."""
    bits = (len(layers) - 1).bit_length()
    order = sorted(range(len(layers)), key=lambda i: int(f"{i:0{bits}b}"[::-1], 2))
    return {layers[i] for i in order[: max(1, round(fraction * len(layers)))]}


def measure(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    samples: Samples,
    evaluation: Evaluation,
    seed: int,
    exclude: Collection[str] = (),
) -> dict[str, Any]:
    """Stage 4 alone, for a loaded adapter: dense, efficient and recovered side by side, None where it is no number.

    Args:
        model: from `caprese.load`.
        samples: `test` prompts are asked; the other splits are not made.
        exclude: prompts not to ask, such as those of `beside`.
    """
    with tempfile.TemporaryDirectory(prefix="caprese-") as scratch:
        prompts = load_prompts(samples.prompts, samples.test, seed, samples.column, exclude)
        encoded = [encode_prompt(tokenizer, p.text, samples.instruction, samples.chat_template) for p in prompts]
        check_context(model, [p.text for p in prompts], encoded, samples.max_new_tokens)
        settings = {"seed": seed}
        with bar("evaluation: dense", len(prompts), "samples") as advance, variant(model, "dense"):
            test = complete_in_shards(
                model, tokenizer, prompts, encoded, samples, Path(scratch), "test", dict(settings), advance
            )
        measured = evaluate(model, tokenizer, test, samples, evaluation, Path(scratch), settings)
    return cast(dict[str, Any], finite(measured))


def beside(adapter: str | os.PathLike[str]) -> tuple[Samples, set[str]]:
    """What the run that made an adapter left with it: how it sampled, and the prompts it was trained on.

    No prompts for an adapter from the hub; defaults for one that stands alone.

    Raises:
        CapreseError: the recipe or a shard is damaged.
    """
    directory = locate(adapter, None, "recipe.yaml")
    recipe = directory / "recipe.yaml"
    samples = resolve_recipe(str(recipe)).samples if recipe.is_file() else Samples(max_new_tokens=128)
    return samples, trained_prompts(directory / "samples")
