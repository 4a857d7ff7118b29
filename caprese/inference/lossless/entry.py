"""`Lossless`: the way in, for transformers' `generate` and for caprese's own streaming.

transformers' assisted decoding cannot carry this: its assistants have KV caches of their own and read every prompt a
second time, it takes one sequence, refuses static caches, and cuts all cache layers to one length. Where a user has it
already (`assistant_model=`), it works on applied models too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from transformers import DynamicCache, StaticCache
from transformers.generation.utils import GenerateDecoderOnlyOutput

from caprese.efficient_methods import applied_ffns, dense, phases_of
from caprese.efficient_methods.passes import drafting, verifying
from caprese.errors import CapreseError
from caprese.inference.generate import NewTokens
from caprese.inference.lossless.drafts import Draft, Lookup, Other, Own
from caprese.inference.lossless.loop import IsOver, Pair
from caprese.inference.lossless.pace import CHOICES, Pace, Tally
from caprese.inference.lossless.rules import Greedy, Rule, Sampling, processed
from caprese.inference.lossless.side import Side
from caprese.models import unwrap
from caprese.models.private import needed

# What `generate` may be asked for and this does not give.
# numbers of drafts where each is compiled: dynamo compiles no more than eight shapes
_COMPILED = (0, 2, 4, 8)
_NOT_GIVEN = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


@dataclass
class Lossless:
    """Speculative decoding whose text is the dense model's own: token for token, or its distribution when sampling.

    `model.generate(..., custom_generate=caprese.Lossless())`. One object serves one generation after another; what it
    learned of costs and acceptance stays with it.

    Attributes:
        draft: who drafts; "own": the methods and branches that are on the model, on one KV cache with it; "lookup": the
            text before; or a model with the same tokenizer.
        target: whose text it is: "dense", the model without what is on it; or "hybrid", with attention replaced as it
            is and all FFNs dense.
        tokens: drafted each round; None adapts to acceptance and costs, 0 never drafts.
        reselect_every: tokens after which methods choose anew from what was verified; "saved" as the model has it, None
            never.
        streamer: is given each token, as `generate` would give it.
        generator: of draws; None is torch's own.
        compiled: run the target's passes compiled, and those of its own draft, with a static cache and few numbers of
            drafts to choose among; each is compiled once.

    Raises:
        CapreseError: a setting that does not fit; when it runs, a model that nothing is applied to, or caches and
            outputs that it does not give.
    """

    draft: Literal["own", "lookup"] | nn.Module = "own"
    target: Literal["dense", "hybrid"] = "dense"
    tokens: int | None = None
    reselect_every: int | Literal["saved"] | None = "saved"
    streamer: Any = None
    generator: torch.Generator | None = None
    compiled: bool = False
    pace: Pace = field(init=False)

    def __post_init__(self) -> None:
        if isinstance(self.draft, str) and self.draft not in ("own", "lookup"):
            raise CapreseError(f'`draft` is {self.draft!r}; use "own", "lookup" or a model')
        if self.target not in ("dense", "hybrid"):
            raise CapreseError(f'`target` is {self.target!r}; use "dense" or "hybrid"')
        if self.tokens is not None and not 0 <= self.tokens <= 64:
            raise CapreseError(f"`tokens` is {self.tokens}; use a number from 0 to 64, or None to adapt")
        self.pace = Pace(self.tokens, _COMPILED if self.compiled else CHOICES)

    @property
    def tally(self) -> Tally:
        """What the last generation came to."""
        return self.pace.tally

    def __call__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generation_config: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """What `generate` calls: prompts [B, T] -> sequences [B, T + n], padded behind their ends."""
        for name in _NOT_GIVEN:
            if getattr(generation_config, name, None):
                raise CapreseError(f"lossless generation gives no {name}; leave it out")
        if getattr(generation_config, "num_beams", None) not in (None, 1):
            raise CapreseError("lossless generation is for one beam; leave out num_beams")
        cache, mask = model_kwargs.get("past_key_values"), model_kwargs.get("attention_mask")
        whole = bool(getattr(generation_config, "return_dict_in_generate", False))
        scores = processed(logits_processor) if logits_processor else None
        rule: Rule = Greedy(scores)
        if getattr(generation_config, "do_sample", False):
            rule = Sampling(scores or _as_they_are, self.generator)
        limit = getattr(generation_config, "max_length", None) or 10**9
        texts = input_ids.tolist()
        at = self.decode(
            model,
            (input_ids, None if mask is None else mask[:, : input_ids.shape[1]]),
            max(1, limit - input_ids.shape[1]),
            rule,
            partial(_stops, stopping_criteria, input_ids.device),
            cache=None if type(cache) is DynamicCache and not cache.get_seq_length() else cache,
            leave=not whole,
        )
        for new in at:
            for row, token in zip(new.rows.tolist(), new.ids.tolist(), strict=True):
                texts[row].append(token)
            if self.streamer is not None:
                self.streamer.put(new.ids)
        if self.streamer is not None:
            self.streamer.end()
        pad = getattr(generation_config, "_pad_token_tensor", None)
        fill = 0 if pad is None else int(pad)
        longest = max(map(len, texts))
        out = torch.tensor([text + [fill] * (longest - len(text)) for text in texts], device=input_ids.device)
        if not whole:
            return out
        self.last.move_together(always=True)
        return GenerateDecoderOnlyOutput(
            sequences=out,  # type: ignore[arg-type]
            past_key_values=self.last.cache,
        )

    def decode(
        self,
        model: nn.Module,
        prompts: tuple[torch.Tensor, torch.Tensor | None],
        max_new_tokens: int,
        rule: Rule,
        is_over: IsOver,
        *,
        cache: Any = None,
        leave: bool = True,
    ) -> Iterator[NewTokens]:
        """The tokens as they come; see `loop.Pair`."""
        self.pace.tally = Tally()
        base: Any = unwrap(model)
        if self.compiled and cache is None:
            cache = StaticCache(config=base.config, max_cache_len=prompts[0].shape[1] + max_new_tokens)
        target, draft = self.sides(base, cache)
        if self.compiled:
            target.step = needed(base, "get_compiled_call")(None)
        self.last = target
        every = self._every(base) if applied_ffns(base) else None
        steps = Pair(target, draft, rule, self.pace, every, leave).decode(*prompts, max_new_tokens, is_over)
        while True:
            # what is around a step holds for it alone: others may run the model between two of them
            with self.around(base):
                new = next(steps, None)
            if new is None:
                return
            yield new

    def _every(self, base: Any) -> int | None:
        """Tokens after which an applied model's methods choose anew; None where they do not."""
        phases = phases_of(base)
        if not any("prompt" in method.learns for method in phases.methods):
            return None
        return phases.reselect_every if self.reselect_every == "saved" else self.reselect_every

    def around(self, model: nn.Module) -> AbstractContextManager[None]:
        """Inside, the model is as its sides read it."""
        return drafting(model) if applied_ffns(model) else nullcontext()

    def sides(self, model: nn.Module, cache: Any = None) -> tuple[Side, Draft]:
        """Who verifies and who drafts; nothing is read yet.

        Raises:
            CapreseError: see `Lossless`.
        """
        base: Any = unwrap(model)
        applied = bool(applied_ffns(base))
        as_it_is, teacher = nullcontext, partial(dense, base) if applied else nullcontext
        own = partial(phases_of(base).prefilling) if applied else nullcontext
        mixed = applied and any(method.trains for method in phases_of(base).methods)
        if self.target == "hybrid" and not mixed:
            raise CapreseError('`target="hybrid"` is for models whose attention is replaced; leave it out')
        if self.draft == "own":
            if not applied:
                raise CapreseError(
                    "there is nothing to draft with: caprese.apply or caprese.load first, or give `draft` a model or "
                    '"lookup"'
                )
            if mixed and self.target == "dense":  # the two have different caches
                return Side(base, teacher, teacher, cache), Other(Side(base, as_it_is, own))
            reads = partial(verifying, base) if mixed or self._every(base) else teacher
            target = Side(base, reads, own, cache)
            return target, Own(target, as_it_is)
        if self.target == "hybrid":
            target = Side(base, partial(verifying, base), own, cache)
        else:
            target = Side(base, teacher, teacher, cache)
        return target, Lookup() if isinstance(self.draft, str) else Other(self._other(base, self.draft))

    def _other(self, base: Any, model: nn.Module) -> Side:
        other: Any = unwrap(model)
        if other.config.get_text_config().vocab_size != base.config.get_text_config().vocab_size:
            raise CapreseError(
                f"the draft has {other.config.get_text_config().vocab_size} tokens and the target "
                f"{base.config.get_text_config().vocab_size}: they have to share a tokenizer"
            )
        return Side(other, nullcontext, phases_of(other).prefilling if applied_ffns(other) else nullcontext)


def _as_they_are(_: int, __: list[int], logits: torch.Tensor) -> torch.Tensor:
    return logits.float()


def _stops(criteria: Any, device: torch.device, _: int, text: list[int]) -> bool:
    return bool(criteria(torch.tensor([text], device=device), None).any()) if criteria else False
