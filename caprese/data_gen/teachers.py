"""Which teacher draws the samples: the model in this process, or an engine, started for it or there already."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import nn
from transformers import PreTrainedTokenizerBase

from caprese.data_gen.completer import Completer, Here
from caprese.data_gen.endpoint import Endpoint
from caprese.data_gen.samples import HERE, VLLM, Samples
from caprese.data_gen.vllm import serving
from caprese.errors import CapreseError


def teacher_of(
    config: Samples, model: nn.Module, tokenizer: PreTrainedTokenizerBase, given: Completer | None = None
) -> AbstractContextManager[Completer]:
    """The teacher that samples are to be drawn from; it starts, and proves that it is this model, when it is first
    asked. An engine that was started for it is stopped at the end.

    Args:
        model: dense.
        given: the caller's own, for a `teacher` that is not "here".

    Raises:
        CapreseError: the engine, or what speaks with it, is not installed; a teacher of the caller's own where samples
            are said to be drawn here.
    """
    if given is not None:
        if config.teacher == HERE and not isinstance(given, Here):  # they would pass for this model's draws
            raise CapreseError("a teacher of your own wants `samples.teacher` to say so; set it to endpoint")
        return nullcontext(given)
    if config.teacher == HERE:
        return nullcontext(Here(model, tokenizer))
    if config.teacher == VLLM:
        return serving(config, model, tokenizer)
    return nullcontext(Endpoint(config.teacher, config, model, tokenizer))
