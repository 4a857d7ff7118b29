"""What is measured anew of a finished adapter: on prompts, on lm-eval's tasks, and by repeated sampling.

What is not said is as in the job that made it: its recipe and samples lie beside a local adapter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from transformers import PreTrainedTokenizerBase

from caprese.adapters import Adapter
from caprese.data_gen import OWN, Prompt, Samples, draw_prompts, interleave, name_of
from caprese.efficient_methods import facts_of, phases_of
from caprese.errors import CapreseError
from caprese.evaluation import (
    NEW_TOKENS,
    Evaluation,
    checkpoint_fidelity,
    environment,
    held_out_prompts,
    measure,
    variant,
)
from caprese.evaluation.rewards import reward_scorer
from caprese.exports import export
from caprese.files import check_writable, write_json
from caprese.inference import load
from caprese.progress import say
from caprese.recipes.recipe import explain
from caprese.recovery.run import beside
from caprese.report.scaling import plot_scaling
from caprese.studies.scaling import Budget, Contender, Scaling, contenders, sizes_of
from caprese.studies.tasks import Tasks, run_tasks

#: tokens between two choices, of the contender of `scale` that chooses anew
RESELECT_EVERY = 32


def _asked(samples: Samples, given: Mapping[str, Any], source: str) -> Samples:
    """How prompts are asked: as the adapter was made, and as `given` where that says something.

    Raises:
        CapreseError: a value that does not fit.
    """
    new = {key: value for key, value in given.items() if value is not None}
    if "prompts" in new:  # another file has columns of its own
        new.setdefault("column", Samples.model_fields["column"].default)
    elif "column" in new:
        new["prompts"] = [one.model_copy(update={"column": None}) for one in samples.prompts]
    try:
        return samples.model_validate(samples.model_dump() | new)
    except ValidationError as error:
        raise explain(error, source) from error


def evaluate_adapter(
    adapter: str,
    model: str,
    given: Mapping[str, Any],
    *,
    latency_tokens: int = 64,
    reselect_every: Any = "saved",
    prefill: Any = "saved",
    seed: int = 1,
    **how: Any,
) -> dict[str, Any]:
    """Dense, efficient and recovered side by side on prompts that the adapter was not trained on.

    Args:
        adapter: directory or hub id.
        model: the base.
        given: fields of `Samples` that are not to be as the adapter was made; `test` is how many prompts are asked.
        latency_tokens: over which TTNT is measured; 0 skips it.
        reselect_every, prefill: see `caprese.load`.
        how: of loading the base (see `load_base`).

    Returns: {"model", "adapter", "method", "methods", "reselect_every", "seed", "samples"} and what `measure` gives.

    Raises:
        CapreseError: the adapter, the base or the prompts cannot be used.
    """
    opened = Adapter.open(adapter)
    base, tokenizer = opened.load_base(model, **how)
    lm = load(base, opened, fused=False, reselect_every=reselect_every, prefill=prefill)
    samples, trained = beside(opened)
    asked = _asked(samples, given, "eval")
    measured = measure(lm, tokenizer, asked, Evaluation(latency_tokens=latency_tokens, examples=0), seed, trained)
    methods = [facts_of(method) for method in opened.methods]
    return {
        "model": model,
        "adapter": adapter,
        "method": "+".join(method["name"] for method in methods),
        "methods": methods,
        "reselect_every": phases_of(lm).reselect_every,
        "prefill": phases_of(lm).prefill,
        "seed": seed,
        "samples": asked.model_dump(mode="json", exclude={"train", "validation"}),
        **measured,
    }


def evaluate_tasks(
    adapter: str,
    model: str,
    tasks: Tasks,
    output: str,
    *,
    reselect_every: Any = "saved",
    prefill: Any = "saved",
    overwrite: bool = False,
    **how: Any,
) -> dict[str, Any]:
    """`run_tasks` on an adapter by name.

    Args:
        reselect_every, prefill: see `caprese.load`.
        how: of loading the base (see `load_base`).

    Raises:
        CapreseError: the adapter or the base cannot be used, and what `run_tasks` refuses.
    """
    opened = Adapter.open(adapter)
    base, tokenizer = opened.load_base(model, **how)
    lm = load(base, opened, fused=True, reselect_every=reselect_every, prefill=prefill)
    identity = [opened.digest, phases_of(lm).reselect_every, str(base.dtype)]
    identity += [] if phases_of(lm).prefill == opened.sidecar.prefill else [phases_of(lm).prefill]
    return run_tasks(lm, tokenizer, tasks, Path(output), identity=identity, overwrite=overwrite)


def export_adapter(
    adapter: str,
    to: str,
    model: str | None = None,
    *,
    samples: int = 24,
    device: str = "auto",
    **how: Any,
) -> dict[str, Any]:
    """Write an adapter by name with its base as an ordinary checkpoint, and measure that as engines run it.

    Args:
        model: the base, where it was a local directory.
        samples: prompts of each kind it is measured on, the adapter's own and elsewhere; 0 skips it.
        how: see `export`.

    Returns: what `export` does, and "report_kl": KL(dense || recovered) as the adapter's report has it.

    Raises:
        CapreseError: the adapter, the base or the target cannot be used, and what `export` refuses.
    """
    opened = Adapter.open(adapter)
    base, tokenizer = opened.load_base(model, device=device)
    lm = load(base, opened)

    def measure(checkpoint: Path) -> dict[str, Any] | None:
        try:
            made_with, trained = beside(opened)
            alike = tuple(one.model_copy(update={"share": 1.0}) for one in made_with.prompts)
            size = {"test": samples * len(alike), "elsewhere": min(samples, made_with.elsewhere), "prompts": alike}
            size["max_new_tokens"] = NEW_TOKENS
            with variant(lm, "dense"):
                asked = held_out_prompts(lm, tokenizer, made_with.model_copy(update=size), 1, trained)
        except CapreseError as error:  # a file or dataset of whoever made it
            say((f"what is exported is not measured: {error}", "yellow"))
            return None
        by_kind: dict[str, list[Prompt]] = {}
        for prompt in chain.from_iterable(asked.values()):
            by_kind.setdefault(prompt.source, []).append(prompt)
        return checkpoint_fidelity(lm, tokenizer, checkpoint, by_kind)

    report = opened.report() or {}
    facts = export(lm, tokenizer, to, measure=measure if samples else None, **how)
    known = ((report.get("quality") or {}).get("recovered") or {}).get("kl")
    if phases_of(lm).dense_prompts:
        say(
            "this adapter was distilled with dense prompts, which no exported checkpoint has: recover with "
            'prefill="efficient" (--for export)'
            + ("" if known is None else f" (KL {known:.4f} with dense prompts; as exported, see fidelity)")
        )
    return {**facts, "report_kl": known}


@dataclass(frozen=True)
class Sampling:
    """What `scale` draws."""

    #: completions of each problem: N, up to which 1, 2, 4, ... are timed, or all N that are
    samples: int | Sequence[int] = 64
    problems: int = 32
    #: fields of `Samples` that are not to be as the adapter was made
    given: Mapping[str, Any] = field(default_factory=dict)
    #: names of contenders, or other adapters of this base; None is all of the adapter's own
    contenders: Sequence[str] | None = None
    #: of one more contender; 0 is none, None is `RESELECT_EVERY` where the method can choose anew
    reselect_every: int | None = None
    #: what weights best-of-N (see `reward_scorer`)
    reward: str | None = None
    #: gigabytes that the caches of samples drawn at once may take
    memory: float | None = None
    seed: int = 0


def _over(opened: Adapter, sampling: Sampling) -> tuple[list[Contender], dict[str, Adapter]]:
    """The contenders, and those adapters among them that are others, opened."""
    refused = next((why for method in opened.methods if (why := method.no_reselection)), None)
    if opened.sidecar.prefill != "dense":
        refused = "the prompts of this adapter do not run dense, and reselection runs tokens dense"
    if refused and sampling.reselect_every:
        raise CapreseError(f"{refused}; leave out `reselect_every`")
    every = sampling.reselect_every
    if every is None:
        chooses = any("prompt" in method.learns for method in opened.methods)
        every = RESELECT_EVERY if chooses and not refused else 0
    over = contenders(every or None, sampling.contenders)
    return over, {each.adapter: Adapter.open(each.adapter) for each in over if each.adapter is not None}


def _problems(
    config: Samples, sampling: Sampling, trained: set[str], tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[Samples, list[Prompt]]:
    """Problems of all sources but `self`, whose prompts have no answers, and the samples' settings with these alone."""
    sources = tuple(one for one in config.prompts if one.source != OWN)
    if not sources:
        raise CapreseError("prompts `self` have no answers to be right about; give `prompts` that have")
    config = config.model_copy(update={"prompts": sources})
    (drawn,) = draw_prompts(config, [sampling.problems], sampling.seed + 1, tokenizer, exclude=trained)
    return config, interleave(drawn, [one.share for one in config.sources])


def plan_scaling(adapter: str, sampling: Sampling) -> dict[str, Any]:
    """What `scale_adapter` would draw, without a model.

    Returns: {"contenders", "problems", "completions", "tokens_at_most", "first_prompt"}.

    Raises:
        CapreseError: the adapter, a contender or the prompts cannot be used.
    """
    opened = Adapter.open(adapter)
    over, _ = _over(opened, sampling)
    samples, trained = beside(opened)
    config = _asked(samples, sampling.given, "scale")
    config, rows = _problems(config, sampling, trained)
    drawn = len(rows) * sizes_of(sampling.samples)[-1] * len(over)
    return {
        "contenders": [contender.name for contender in over],
        "problems": len(rows),
        "completions": drawn,
        "tokens_at_most": drawn * config.max_new_tokens,
        "first_prompt": rows[0].text,
    }


def scale_adapter(
    adapter: str,
    model: str,
    sampling: Sampling,
    output: str,
    *,
    command: str = "",
    overwrite: bool = False,
    device: str = "auto",
    **how: Any,
) -> dict[str, Any]:
    """Accuracy at equal time of an adapter by name: samples, scale.json and scale.png in `output`.

    Args:
        command: how this was asked for; noted in the result.
        overwrite: replace samples of other settings.
        device, how: of loading the base (see `load_base`).

    Returns: {"command", "model", "environment"} and what `Scaling.run` gives.

    Raises:
        CapreseError: the adapter, the base, the prompts or the reward cannot be used, or samples of other settings.
    """
    opened = Adapter.open(adapter)
    over, others = _over(opened, sampling)
    samples, trained = beside(opened)
    config = _asked(samples, sampling.given, "scale")
    check_writable(Path(output))
    base, tokenizer = opened.load_base(model, device=device, **how)
    config, rows = _problems(config, sampling, trained, tokenizer)
    say(
        f"{model}, {adapter}: {len(over)} contenders, {len(rows)} problems of {name_of(config.sources)}, "
        f"{sizes_of(sampling.samples)[-1]} samples each"
    )
    # samples of one problem share its choice, so its rows are gathered once for all of them
    fused: dict[str, Any] = {"fused": True, "form": "packed", "reselect_every": None}
    models: dict[str | None, Any] = {None: load(base, opened, **fused)}
    for name, other in others.items():
        models[name] = load(other.load_base(model, device=device, **how)[0], other, **fused)
    scorer = None if sampling.reward is None else reward_scorer(sampling.reward, device)
    memory = None if sampling.memory is None else sampling.memory * 1e9
    budget = Budget(sampling.samples, memory, sampling.seed)
    scaling = Scaling(models, tokenizer, rows, config, budget, Path(output), scorer)
    identity = {
        "adapter": opened.digest,
        **({"others": [other.digest for other in others.values()]} if others else {}),
        "type": f"{base.dtype} on {base.device.type}",
        "settings": config.model_dump(mode="json", exclude={"train", "validation", "test", "batch_size", "shard_size"}),
    }
    found = scaling.run(over, identity, overwrite)
    result = {"command": command, "model": model, **found, "environment": environment(models[None])}
    write_json(Path(output) / "scale.json", result)
    plot_scaling(result, Path(output) / "scale.png")
    return result
