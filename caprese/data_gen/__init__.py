"""Prompts -> the teacher's own completions, as resumable shards."""

from caprese.data_gen.completer import Asked, Completer, Here, complete
from caprese.data_gen.generate import (
    ELSEWHERE,
    OwnPrompts,
    complete_in_shards,
    describe,
    draw_prompts,
    load_elsewhere,
    make_samples,
    public_names,
    split_prompts,
    trained_prompts,
)
from caprese.data_gen.prompts import Prompt, load_prompts
from caprese.data_gen.samples import ENDPOINT, HERE, VLLM, Samples
from caprese.data_gen.shards import VERSION, Sample, Shards, read_shard, read_shards, shard_settings, write_shard
from caprese.data_gen.sources import OWN, Source, interleave, name_of
from caprese.data_gen.teachers import teacher_of

__all__ = [
    "ELSEWHERE",
    "ENDPOINT",
    "HERE",
    "OWN",
    "VERSION",
    "VLLM",
    "Asked",
    "Completer",
    "Here",
    "OwnPrompts",
    "Prompt",
    "Sample",
    "Samples",
    "Shards",
    "Source",
    "complete",
    "complete_in_shards",
    "describe",
    "draw_prompts",
    "interleave",
    "load_elsewhere",
    "load_prompts",
    "make_samples",
    "name_of",
    "public_names",
    "read_shard",
    "read_shards",
    "shard_settings",
    "split_prompts",
    "teacher_of",
    "trained_prompts",
    "write_shard",
]
