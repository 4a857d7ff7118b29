"""The dense model completes prompts: reproducible from a seed, shard by shard."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from itertools import count
from math import inf
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import nn
from transformers import PreTrainedTokenizerBase

from caprese.data_gen.completer import Asked, Completer, Here
from caprese.data_gen.own import Head, Sieve, head_of
from caprese.data_gen.prompts import Encode, Prompt, distinct, load_prompts
from caprese.data_gen.samples import Samples
from caprese.data_gen.shards import VERSION, Rows, Sample, Shards, read_shard, read_shards, write_shard
from caprese.data_gen.sources import OWN, Source, interleave, share_out
from caprese.errors import CapreseError
from caprese.inference.generate import ends_of
from caprese.models import check_context, context_of
from caprese.models.residency import share_of
from caprese.progress import bar, say

SPLITS = ("test", "validation", "train")
ELSEWHERE = "elsewhere"
#: prompts of kinds that no recipe trains on
_ELSEWHERE = Source(source=str(Path(__file__).with_name("elsewhere.jsonl")), instruction="")


Own = Callable[[int], Iterable[Prompt]]
"""How many prompts are wanted -> those that the model writes itself, until there are enough."""


def draw_prompts(
    config: Samples,
    counts: Sequence[int],
    seed: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
    own: Own | None = None,
    exclude: Collection[str] = (),
) -> list[list[list[Prompt]]]:
    """Distinct prompts in groups of these sizes, and in each group by source; a group does not depend on those after
    it.

    Args:
        tokenizer: gives prompts their token ids, by which they are then distinct.
        own: writes those of `self`.
        exclude: prompts not to give.

    Returns: fewer than were asked for, in the last groups first, where a source has no more.

    Raises:
        CapreseError: bad prompts, or `self` where no model is there to write them.
    """
    sources = config.sources
    names = public_names([one.source for one in sources])
    encoders = [None if tokenizer is None else config.encode(tokenizer, one) for one in sources]
    sizes = [share_out(count, [one.share for one in sources]) for count in counts]

    def load(one: Source, encode: Encode | None, count: int) -> list[Prompt]:
        if one.source != OWN:
            return load_prompts(one.source, count, seed, one.column or config.column, exclude, encode)
        if own is None:
            raise CapreseError("prompts `self` are written by the model, which is not there; give others")
        return distinct(own(count), count, exclude, encode)[0]

    streams = [
        _stream(partial(load, one, encode), sum(size[number] for size in sizes))
        for number, (one, encode) in enumerate(zip(sources, encoders, strict=True))
    ]
    groups, known = [], list[str]()
    for size in sizes:  # one group after another, or the last of one source would decide about the first of the next
        group = []
        for name, encode, stream, wanted in zip(names, encoders, streams, size, strict=True):
            found, _ = distinct(stream, wanted, known, encode)
            known += [prompt.text for prompt in found]
            group.append([replace(prompt, source=name) for prompt in found])
        groups.append(group)
    return groups


def _stream(load: Callable[[int], Sequence[Prompt]], count: int) -> Iterator[Prompt]:
    """What `load` gives first, second, ...: as many as are thought to be enough, and a few more at a time if not."""
    given = 0
    while len(found := load(count)) > given:
        yield from found[given:]
        given, count = len(found), count + 1 + count // 10


def split_prompts(
    config: Samples,
    seed: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
    own: Own | None = None,
    exclude: Collection[str] = (),
) -> dict[str, list[Prompt]]:
    """Distinct prompts for test, validation and train, with all sources evenly mixed; the first two do not depend on
    the size of the third. See `draw_prompts`.

    Raises:
        CapreseError: bad prompts, or too few of a source to hold any out.
    """
    groups = draw_prompts(config, [config.test, config.validation, config.train], seed, tokenizer, own, exclude)
    shares = [one.share for one in config.sources]
    sizes = [share_out(n, shares) for n in (config.test, config.validation, config.train)]
    for one, *wanted, test, validation, train in zip(config.sources, *sizes, *groups, strict=True):
        if not train and one.share * config.train >= 1:
            raise CapreseError(
                f"{one} has {len(test) + len(validation)} distinct prompts; with {wanted[0]} for test and {wanted[1]} "
                "for validation none are left to train on: give more, or lower samples.test and samples.validation"
            )
        if len(train) < wanted[2]:
            say(f"{one} has {len(train)} prompts to train on, and {wanted[2]} are its share")
    return {name: interleave(group, shares) for name, group in zip(SPLITS, groups, strict=True)}


def make_samples(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    config: Samples,
    directory: Path,
    seed: int,
    identity: Mapping[str, str],
    replacing: Callable[[], None] | None = None,
    teacher: Completer | None = None,
) -> dict[str, Rows]:
    """Stage 1: every split as shards in `directory`, and `elsewhere`; shards that exist are read, not made.

    Args:
        model: dense.
        identity: fingerprint of the model, kept with the shards.
        replacing: shards made with other settings are replaced, and this is called before the first of them is
            deleted; None refuses them.
        teacher: completes the prompts; without one the model does, here.

    Raises:
        CapreseError: bad prompts, prompts that do not fit the context, damaged or foreign shards, a teacher that fails.
    """
    teacher = teacher or Here(model, tokenizer)
    # sizes of the splits are not part of what a sample is
    facts = {key: value for key, value in config.facts.items() if key not in (*SPLITS, ELSEWHERE)}
    settings: dict[str, object] = {**facts, "seed": seed, "model": dict(identity), "version": VERSION}
    shards = {name: Shards(directory, name, settings, config.shard_size) for name in (*SPLITS, ELSEWHERE)}
    shards[OWN] = Shards(directory, OWN, settings, config.batch_size)  # no more draws at once than one batch

    def make_room(found: Iterable[Path]) -> None:
        if replacing is not None:
            if PartialState().is_main_process and (foreign := list(found)):
                replacing()
                for path in foreign:
                    path.unlink()
            PartialState().wait_for_everyone()

    writer = OwnPrompts(model, teacher, config, shards[OWN])
    writes = any(one.source == OWN for one in config.sources)
    make_room(writer.foreign() if writes else sorted(directory.glob(f"{OWN}-*.parquet")))
    other = load_elsewhere(config, tokenizer, model)
    prompts = split_prompts(config, seed, tokenizer, writer, [prompt.text for prompt in other])
    if writer.sieve is not None:
        say(f"self: {writer.sieve}")
    if other:
        prompts[ELSEWHERE] = other
    for asked in prompts.values():
        check_context(model, [p.text for p in asked], [p.ids for p in asked], config.max_new_tokens)
    make_room(
        path
        for split in (*SPLITS, ELSEWHERE)
        for path in shards[split].foreign([p.ids for p in prompts.get(split, ())])
    )
    with bar("1/4 samples", sum(len(p) for p in prompts.values()), "samples") as advance:
        return {s: complete_in_shards(teacher, p, config, shards[s], advance) for s, p in prompts.items()}


def load_elsewhere(
    config: Samples, tokenizer: PreTrainedTokenizerBase, model: nn.Module, exclude: Collection[str] = ()
) -> list[Prompt]:
    """Prompts of kinds that no recipe trains on, always the same ones, as far as the model's context takes them."""
    if not config.elsewhere:
        return []
    encode = config.encode(tokenizer, _ELSEWHERE)
    rows = load_prompts(_ELSEWHERE.source, config.elsewhere, 0)
    found, _ = distinct(rows, config.elsewhere, exclude, encode)
    context = context_of(model) or inf
    fitting = [p for p in found if len(p.ids) + config.max_new_tokens <= context]
    return [replace(prompt, source=ELSEWHERE) for prompt in fitting]


class OwnPrompts:
    """Prompts that a model writes itself; its draws are kept as shards.

    Args:
        model: dense; its context is theirs.
        teacher: draws them.
        shards: where; the seed is theirs.
    """

    def __init__(self, model: nn.Module, teacher: Completer, config: Samples, shards: Shards) -> None:
        self.model, self.teacher, self.config, self.shards = model, teacher, config, shards
        self.tokenizer = teacher.tokenizer
        self.sieve: Sieve | None = None

    def __call__(self, count: int) -> Iterator[Prompt]:
        """The same ones each time, as many as are asked for.

        Raises:
            CapreseError: the model writes too few that can be used, or the tokenizer has nothing to begin with.
        """
        self.sieve = sieve = Sieve(self.tokenizer, self.head, ends_of(self.model, self.tokenizer), fits=self._fits)
        with bar("1/4 prompts", count, "prompts") as advance:
            for draw in self._draws():
                text = sieve.take(draw)
                if text is not None:
                    advance(1)
                    yield Prompt(text)
                sieve.check(count)

    def _fits(self, text: str) -> bool:
        config, own = self.config, next(one for one in self.config.sources if one.source == OWN)
        return len(config.encode(self.tokenizer, own)(text)) + config.max_new_tokens <= (context_of(self.model) or inf)

    @cached_property
    def head(self) -> Head:
        return head_of(self.tokenizer, self.config.chat_template)

    def foreign(self) -> Iterator[Path]:
        """Draws that are kept and were made with other settings."""
        kept = [
            int(path.stem.rpartition("-")[2]) for path in self.shards.directory.glob(f"{OWN}-{'[0-9]' * 5}.parquet")
        ]
        if kept:
            yield from self.shards.foreign([self.head.ids] * self.shards.size * (max(kept) + 1))

    def _draws(self) -> Iterator[Sequence[int]]:
        """What it writes, without end, shard by shard; every process of a distributed run makes its share."""
        room = (context_of(self.model) or inf) - len(self.head.ids)
        if self.config.self_tokens > room:
            raise CapreseError(
                f"the model's context leaves {room} tokens for a prompt of `self`; lower samples.self_tokens"
            )
        update = {"temperature": self.config.self_temperature, "max_new_tokens": self.config.self_tokens}
        config, world = self.config.model_copy(update=update), PartialState()
        begin = [Prompt("", ids=self.head.ids)] * self.shards.size
        made_with = self.shards.made_with([self.head.ids] * self.shards.size)
        number_of_us, sharing = share_of(self.model)
        for first in count(0, sharing):
            wave = range(first, first + sharing)
            if not self.shards.path(mine := wave[number_of_us]).exists():
                _make_shards(self.teacher, {mine: begin}, config, self.shards, self.head.ends)
            world.wait_for_everyone()
            for number in wave:
                yield from (sample.completion_ids for sample in read_shard(self.shards.path(number), made_with))


def public_names(sources: Sequence[str]) -> list[str]:
    """Sources as they may be shown: of a local path only the last part, which is not `elsewhere`; numbered where
    several would be called the same."""
    names = [os.path.basename(one) if os.path.exists(one) else one for one in sources]
    names = [name.encode(errors="backslashreplace").decode() for name in names]  # not every file's name is text
    names = [f"./{name}" if name == ELSEWHERE else name for name in names]
    return [f"{n} ({names[:i].count(n) + 1})" if names.count(n) > 1 else n for i, n in enumerate(names)]


def trained_prompts(directory: Path, vouched: Collection[str] = ()) -> set[str]:
    """The prompts of the training and validation shards in `directory`; none if it is not there.

    Args:
        vouched: the names of all that were there.

    Raises:
        CapreseError: a damaged shard, or one that is gone.
    """
    gone = [name for name in vouched if name.startswith(("train-", "validation-")) and not (directory / name).exists()]
    if gone and directory.is_dir():
        raise CapreseError(f"shard {directory / gone[0]} is gone, which says what was trained on; recover makes it")
    paths = [path for split in ("train", "validation") for path in sorted(directory.glob(f"{split}-*.parquet"))]
    return {sample.prompt for path in paths for sample in read_shard(path)}


def complete_in_shards(
    teacher: Completer,
    prompts: Sequence[Prompt],
    config: Samples,
    shards: Shards,
    advance: Callable[[int], None],
) -> Rows:
    """Completions of prompts, which have their token ids, as shards; those that exist are read, not made.

    Every process of a distributed run makes its share, then all read all.

    Raises:
        CapreseError: damaged or foreign shards.
    """
    ours, sharing = share_of(teacher.model)
    chunks = shards.chunks(len(prompts))
    mine = {}
    for number, chunk in enumerate(chunks):
        if shards.path(number).exists():
            advance(len(prompts[chunk]))
        elif number % sharing == ours:
            mine[number] = prompts[chunk]
    _make_shards(teacher, mine, config, shards, advance=advance)
    PartialState().wait_for_everyone()
    made_with = [shards.made_with([p.ids for p in prompts[chunk]]) for chunk in chunks]
    return read_shards([shards.path(number) for number in range(len(chunks))], made_with)


def _make_shards(
    teacher: Completer,
    prompts: Mapping[int, Sequence[Prompt]],
    config: Samples,
    shards: Shards,
    ends: Collection[int] = (),
    advance: Callable[[int], None] | None = None,
) -> None:
    """Complete prompts into shards, by their numbers; each is written when it is whole."""
    seed, tokenizer = shards.settings["seed"], teacher.tokenizer
    asked = (Asked([p.ids for p in rows], (seed, shards.name, number), ends) for number, rows in prompts.items())
    drawn = teacher.complete(asked, config, advance)
    for (number, each), completions in zip(prompts.items(), drawn, strict=True):
        rows = [
            Sample(
                [*p.ids, *new],
                len(p.ids),
                p.text,
                str(tokenizer.decode(new, skip_special_tokens=True)),
                p.answer,
                p.source,
            )
            for p, new in zip(each, completions, strict=True)
        ]
        if PartialState().is_main_process or share_of(teacher.model)[1] > 1:  # else all have drawn the same
            write_shard(shards.path(number), rows, shards.made_with([p.ids for p in each]))


def describe(samples: Sequence[Sample]) -> dict[str, Any]:
    """How many samples and tokens, and how many samples of each source where there are several."""
    prompt = completion = 0
    sources = Counter[str]()
    for sample in samples:
        prompt += sample.prompt_length
        completion += len(sample.input_ids) - sample.prompt_length
        sources[sample.source] += 1
    facts: dict[str, Any] = {
        "samples": len(samples),
        "prompt_tokens": prompt,
        "completion_tokens": completion,
    }
    return {**facts, "sources": dict(sources)} if len(sources) > 1 else facts
