"""The dense model completes prompts: left-padded batches, reproducible from a seed, shard by shard."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

from accelerate import PartialState
from pydantic import BaseModel, ConfigDict, Field
from torch import nn
from transformers import PreTrainedTokenizerBase

from caprese.data_gen.prompts import Encode, Prompt, encoder, load_prompts
from caprese.data_gen.shards import VERSION, Sample, Shards, read_shard, write_shard
from caprese.errors import CapreseError
from caprese.inference.generate import completions, ends_of, generate
from caprese.inference.sampling import nucleus
from caprese.models import check_context, device_of
from caprese.progress import bar

SPLITS = ("test", "validation", "train")


class Samples(BaseModel):
    """Stage 1: what the teacher is asked, and how it answers."""

    model_config = ConfigDict(extra="forbid")

    prompts: str = "gym:gsm_symbolic"
    """gym:TASK (reasoning-gym), a .jsonl or .parquet file, or a `datasets` name, optionally with :SPLIT."""
    column: str = "prompt"
    """Column of a file or dataset that holds the prompt; "answer", if there, is the reference answer."""
    instruction: str = "Please reason step by step."
    """Put before every prompt."""
    chat_template: bool = True
    """Use the model's chat template if it has one."""
    train: Annotated[int, Field(ge=1)] = 20_000
    """Samples to distil from."""
    validation: Annotated[int, Field(ge=1)] = 64
    """Held-out samples that choose ridge and checkpoints."""
    test: Annotated[int, Field(ge=1)] = 200
    """Held-out samples that only the report sees."""
    max_new_tokens: Annotated[int, Field(ge=2)] = 512
    """Length limit of a completion, in tokens."""
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.7
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Sequences generated together."""
    shard_size: Annotated[int, Field(ge=1)] = 512
    """Samples per file; an interrupted run loses at most one."""

    def encode(self, tokenizer: PreTrainedTokenizerBase) -> Encode:
        """How these samples ask: a prompt's text -> its token ids."""
        return encoder(tokenizer, self.instruction, self.chat_template)


def _seed(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


def complete(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    config: Samples,
    seed: object,
    advance: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Sampled completions of tokenised prompts, in their order; each stops at an end of text or the limit."""
    device, ends = device_of(model), ends_of(model, tokenizer)
    # long prompts together: less padding
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    results: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), config.batch_size):
        batch = order[start : start + config.batch_size]
        sampler = nucleus(len(batch), config.temperature, config.top_p, _seed(seed, start), device)
        steps = generate(model, [prompts[i] for i in batch], config.max_new_tokens, sampler, ends=ends)
        for i, tokens in zip(batch, completions(steps, len(batch)), strict=True):
            results[i] = tokens
        if advance is not None:
            advance(len(batch))
    return results


def split_prompts(config: Samples, seed: int, encode: Encode | None = None) -> dict[str, list[Prompt]]:
    """Distinct prompts for test, validation and train; the first two do not depend on the size of the third.

    Args:
        encode: gives prompts their token ids, by which they are then distinct.

    Raises:
        CapreseError: bad prompts, or too few to hold any out.
    """
    held_out = config.test + config.validation
    prompts = load_prompts(config.prompts, held_out + config.train, seed, config.column, encode=encode)
    if len(prompts) <= held_out:
        raise CapreseError(
            f"{config.prompts} has {len(prompts)} distinct prompts; with {config.test} for test and "
            f"{config.validation} "
            "for validation none are left to train on: give more, or lower samples.test and samples.validation"
        )
    return {
        "test": prompts[: config.test],
        "validation": prompts[config.test : held_out],
        "train": prompts[held_out:],
    }


def make_samples(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    config: Samples,
    directory: Path,
    seed: int,
    identity: Mapping[str, str],
    replacing: Callable[[], None] | None = None,
) -> dict[str, list[Sample]]:
    """Stage 1: every split as shards in `directory`; shards that exist are read, not made.

    Args:
        identity: fingerprint of the model, kept with the shards.
        replacing: shards made with other settings are replaced, and this is called before the first of them is
            deleted; None refuses them.

    Raises:
        CapreseError: bad prompts, prompts that do not fit the context, damaged or foreign shards.
    """
    # sizes of the splits are not part of what a sample is
    kept = {"train", "validation", "test"}
    settings: dict[str, object] = {
        **config.model_dump(mode="json", exclude=kept),
        "seed": seed,
        "model": dict(identity),
        "version": VERSION,
    }
    prompts = split_prompts(config, seed, config.encode(tokenizer))
    shards = {split: Shards(directory, split, settings, config.shard_size) for split in SPLITS}
    for asked in prompts.values():
        check_context(model, [p.text for p in asked], [p.ids for p in asked], config.max_new_tokens)
    if replacing is not None:
        if PartialState().is_main_process:
            if foreign := [path for split in SPLITS for path in shards[split].foreign(len(prompts[split]))]:
                replacing()
            for path in foreign:
                path.unlink()
        PartialState().wait_for_everyone()
    with bar("1/4 samples", sum(len(p) for p in prompts.values()), "samples") as advance:
        return {s: complete_in_shards(model, tokenizer, prompts[s], config, shards[s], advance) for s in SPLITS}


def trained_prompts(directory: Path) -> set[str]:
    """The prompts of the training and validation shards in `directory`; none if it holds no shards.

    Raises:
        CapreseError: a damaged shard.
    """
    paths = [path for split in ("train", "validation") for path in sorted(directory.glob(f"{split}-*.parquet"))]
    return {sample.prompt for path in paths for sample in read_shard(path)}


def complete_in_shards(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    config: Samples,
    shards: Shards,
    advance: Callable[[int], None],
) -> list[Sample]:
    """Completions of prompts, which have their token ids, as shards; those that exist are read, not made.

    Every process of a distributed run makes its share, then all read all.

    Raises:
        CapreseError: damaged or foreign shards.
    """
    world = PartialState()
    chunks = shards.chunks(len(prompts))
    for number, chunk in enumerate(chunks):
        asked, path = prompts[chunk], shards.path(number)
        if path.exists():
            advance(len(asked))
        elif number % world.num_processes == world.process_index:
            encoded = [list(p.ids) for p in asked]
            seed = (shards.settings["seed"], shards.name, number)
            completions = complete(model, tokenizer, encoded, config, seed, advance)
            rows = [
                Sample(ids + new, len(ids), p.text, str(tokenizer.decode(new, skip_special_tokens=True)), p.answer)
                for p, ids, new in zip(asked, encoded, completions, strict=True)
            ]
            write_shard(path, rows, shards.made_with(chunk))
    world.wait_for_everyone()
    return [s for number, chunk in enumerate(chunks) for s in read_shard(shards.path(number), shards.made_with(chunk))]


def describe(samples: list[Sample]) -> dict[str, int]:
    """How many samples and tokens."""
    prompt = sum(s.prompt_length for s in samples)
    return {
        "samples": len(samples),
        "prompt_tokens": prompt,
        "completion_tokens": sum(len(s.input_ids) for s in samples) - prompt,
    }
