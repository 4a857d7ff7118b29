"""Prompts -> the teacher's own completions, as resumable shards."""

from caprese.data_gen.generate import (
    Samples,
    complete,
    complete_in_shards,
    describe,
    make_samples,
    split_prompts,
    trained_prompts,
)
from caprese.data_gen.prompts import Prompt, load_prompts
from caprese.data_gen.shards import VERSION, Sample, Shards, read_shard, write_shard

__all__ = [
    "VERSION",
    "Prompt",
    "Sample",
    "Samples",
    "Shards",
    "complete",
    "complete_in_shards",
    "describe",
    "load_prompts",
    "make_samples",
    "read_shard",
    "split_prompts",
    "trained_prompts",
    "write_shard",
]
