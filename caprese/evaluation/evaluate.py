"""The figures of stage 4."""

from __future__ import annotations

import math
import platform
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from torch import nn
from transformers import PreTrainedTokenizerBase

from caprese.data_gen import (
    ELSEWHERE,
    OWN,
    Here,
    OwnPrompts,
    Prompt,
    Sample,
    Samples,
    Shards,
    complete_in_shards,
    draw_prompts,
    interleave,
    load_elsewhere,
)
from caprese.distill import Teacher, make_batches
from caprese.efficient_methods import phases_of
from caprese.errors import CapreseError
from caprese.evaluation.accuracy import accuracy, mean_new_tokens
from caprese.evaluation.config import Evaluation
from caprese.evaluation.fidelity import VARIANTS, Tally, layer_errors, tally_fidelity, variant
from caprese.evaluation.latency import parameter_counts, rounds_within, time_to_next_token
from caprese.models import check_context, device_of, unwrap
from caprese.models.residency import residency_of
from caprese.progress import bar

# Gigabytes for what two measurements of the same samples share.
_REMEMBERED = 2.0


def recovered_fraction(dense: float | None, efficient: float | None, recovered: float | None) -> float | None:
    """(recovered - efficient) / (dense - efficient): 1 is all of what the method cost, None where nothing was lost."""
    if dense is None or efficient is None or recovered is None or abs(efficient - dense) < 1e-12:
        return None
    return (recovered - efficient) / (dense - efficient)


def lost(quality: Mapping[str, Mapping[str, Any]], key: str) -> bool:
    """Whether the method cost anything: a higher KL, a lower accuracy."""
    dense, efficient = quality["dense"][key], quality["efficient"][key]
    if dense is None or efficient is None:
        return False
    return bool(efficient > dense if key == "kl" else efficient < dense)


def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    test: Sequence[Sample],
    samples: Samples,
    config: Evaluation,
    scratch: Path,
    settings: Mapping[str, Any],
    elsewhere: Sequence[Sample] = (),
) -> dict[str, Any]:
    """Everything measured on the test samples, for dense, efficient and recovered, and fidelity by their sources.

    Args:
        test: prompts with the dense model's completions, which stand for "dense" in free generation.
        elsewhere: samples of other kinds than those distilled on.
        scratch: where the other variants' completions are kept as shards until the run is over.
        settings: what those shards depend on, "seed" among it.

    Latency is measured by the main process alone while the others wait; theirs is None, and that of a base that is not
    whole in memory.
    """
    first = not phases_of(model).dense_prompts
    by_source: dict[str, list[Sample]] = {}
    for sample in (*test, *elsewhere):
        by_source.setdefault(sample.source, []).append(sample)
    own = by_source.keys() - {ELSEWHERE}  # the others are asked once
    teachers = {
        source: Teacher(
            model, make_batches(rows, config.batch_size, first), _REMEMBERED / len(own) if source in own else 0
        )
        for source, rows in by_source.items()
    }
    layers = layer_errors(model, *(teachers[source] for source in by_source if source in own))
    kinds = {source: tally_fidelity(teacher) for source, teacher in teachers.items()}
    del teachers
    kinds = {source: tallies for source, tallies in kinds.items() if tallies["dense"].tokens}
    if not kinds.keys() & own:
        raise CapreseError(
            "nothing to measure: no answer of the dense model is longer than one token; usually the chat template or "
            "the end of text is not the model's"
        )
    quality: dict[str, dict[str, float | None]] = {
        name: {**sum((kinds[source][name] for source in own & kinds.keys()), Tally()).figures()} for name in VARIANTS
    }
    answers: dict[str, Sequence[Sample]] = {"dense": test}
    if config.generate:
        prompts = [Prompt(s.prompt, s.answer, ids=s.prompt_ids) for s in test]
        with bar("evaluation: answers", 2 * len(test), "samples") as advance:
            for name in VARIANTS[1:]:
                shards = Shards(scratch, name, settings, samples.shard_size)
                with variant(model, name):
                    answers[name] = complete_in_shards(Here(model, tokenizer), prompts, samples, shards, advance)
    for name in VARIANTS:
        quality[name]["accuracy"] = accuracy(answers[name]) if name in answers else None
        quality[name]["mean_new_tokens"] = mean_new_tokens(answers[name]) if name in answers else None
    latency: dict[str, Any] | None = None
    parameters = parameter_counts(model)
    middle = sorted(test, key=lambda s: s.prompt_length)[len(test) // 2]
    timed = config.latency_tokens if residency_of(model) == "whole" else 0  # else it says nothing of who runs it
    if timed and PartialState().is_main_process and rounds_within(model, middle.prompt_ids):
        times = time_to_next_token(model, middle.prompt_ids, timed)
        latency = {
            **times,
            "ratio": times["recovered"]["ttnt_ms"] / times["dense"]["ttnt_ms"],
            "floor_ratio": parameters["active_recovered"] / parameters["active_dense"],
        }
    PartialState().wait_for_everyone()
    return {
        "parameters": parameters,
        "quality": quality,
        "recovered_fraction": {
            key: recovered_fraction(*(quality[name][key] for name in VARIANTS)) if lost(quality, key) else None
            for key in ("kl", "accuracy")
        },
        "sources": {
            source: {
                "samples": sum(len(sample.completion_ids) > 1 for sample in by_source[source]),
                **_fidelity_of(kinds[source]),
            }
            for source in sorted(kinds, key=lambda source: source == ELSEWHERE)
        },
        "latency": latency,
        "layers_error": layers,
        "completions": [
            {
                "prompt": sample.prompt,
                "answer": sample.answer,
                **{name: answers[name][i].completion if name in answers else "" for name in VARIANTS},
            }
            for i, sample in enumerate(test[: config.examples])
        ],
    }


def _fidelity_of(tallies: Mapping[str, Tally]) -> dict[str, Any]:
    """{"quality": by variant, "recovered_fraction": in KL} of one kind of prompts."""
    quality = {name: tally.figures() for name, tally in tallies.items()}
    fraction = recovered_fraction(*(quality[name]["kl"] for name in VARIANTS)) if lost(quality, "kl") else None
    return {"quality": quality, "recovered_fraction": fraction}


def measure(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    samples: Samples,
    evaluation: Evaluation,
    seed: int,
    exclude: Collection[str] = (),
) -> dict[str, Any]:
    """`evaluate` for a loaded adapter: dense, efficient and recovered side by side, None where it is no number.

    Args:
        model: from `caprese.load`.
        samples: `test` prompts are asked, and those of `elsewhere`; the other splits are not made.
        exclude: prompts not to ask, such as those it was trained on.
    """
    with tempfile.TemporaryDirectory(prefix="caprese-") as scratch:
        settings = {"seed": seed}
        shards = {name: Shards(Path(scratch), name, settings, samples.shard_size) for name in ("test", ELSEWHERE)}
        with variant(model, "dense"):
            asked = held_out_prompts(model, tokenizer, samples, seed, exclude)
            with bar("evaluation: dense", sum(map(len, asked.values())), "samples") as advance:
                answered = {
                    name: complete_in_shards(Here(model, tokenizer), prompts, samples, shards[name], advance)
                    for name, prompts in asked.items()
                }
        measured = evaluate(
            model, tokenizer, answered["test"], samples, evaluation, Path(scratch), settings, answered[ELSEWHERE]
        )
    return cast(dict[str, Any], finite(measured))


def held_out_prompts(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, samples: Samples, seed: int, exclude: Collection[str] = ()
) -> dict[str, list[Prompt]]:
    """{"test": prompts as an adapter was trained on, "elsewhere": of other kinds}, with their token ids.

    Args:
        model: dense; it writes the prompts of `self`.
        samples: `test` and `elsewhere` say how many.
        exclude: prompts not to give, such as those it was trained on.

    Raises:
        CapreseError: bad prompts, or prompts that do not fit the context.
    """
    with tempfile.TemporaryDirectory(prefix="caprese-") as scratch:
        # no more at once than are wanted, and none that the job drew
        size = min(samples.shard_size, max(samples.batch_size, samples.test))
        writer = OwnPrompts(
            model, Here(model, tokenizer), samples, Shards(Path(scratch), OWN, {"seed": [seed, "held out"]}, size)
        )
        (drawn,) = draw_prompts(samples, [samples.test], seed, tokenizer, writer, exclude)
    asked = {
        "test": interleave(drawn, [one.share for one in samples.sources]),
        ELSEWHERE: load_elsewhere(samples, tokenizer, model, exclude),
    }
    for prompts in asked.values():
        check_context(model, [p.text for p in prompts], [p.ids for p in prompts], samples.max_new_tokens)
    return asked


def environment(model: nn.Module) -> dict[str, Any]:
    """What the figures were measured on."""
    import peft
    import transformers

    device = device_of(model)
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((line.partition(":")[2].strip() for line in info.open() if line.startswith("model name")), cpu)
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "dtype": str(unwrap(model).dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "cpu": cpu,
    }


def finite(value: Any) -> Any:
    """With None for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
