"""`Lossless`: the way in, for transformers' `generate` and for caprese's own streaming.

transformers' assisted decoding cannot carry this: its assistants have KV caches of their own and read every prompt a
second time, it takes one sequence, refuses static caches, and cuts all cache layers to one length. Where a user has it
already (`assistant_model=`), it works on applied models too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from transformers import DynamicCache, StaticCache
from transformers.generation.utils import GenerateDecoderOnlyOutput

from caprese.efficient_methods import applied_ffns, check_reselect, dense, phases_of
from caprese.efficient_methods.passes import drafting, verifying
from caprese.errors import CapreseError
from caprese.inference.generate import NewTokens
from caprese.inference.lossless.drafts import Draft, Lookup, Other, Own
from caprese.inference.lossless.loop import IsOver, Pair
from caprese.inference.lossless.pace import Pace, Tally
from caprese.inference.lossless.rules import Greedy, Rule, Sampling, processed
from caprese.inference.lossless.side import Side, vocabulary
from caprese.models import context_of, unwrap
from caprese.models.cache import RoomyCache
from caprese.models.private import needed

# what `generate` may give beside prompts, their mask and a cache; the rest a model would have to see
_NOTHING_TO_SEE = ("use_cache", "logits_to_keep", "position_ids", "cache_position")
# what it may be asked for and this does not give
_NOT_GIVEN = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
# models of one tokenizer pad their vocabularies to different sizes (Qwen2.5: 151,936 and 152,064), by as much at most
_PADDING = 128
# static caches are made for a multiple of so many tokens
_LENGTHS = 128


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
        compiled: run the target's passes compiled, and those of its own draft, with few numbers of drafts to choose
            among, each of which is compiled once, and in place of an empty dynamic cache, which stays empty, a static
            one, for all generations that it is long enough for. Passes that methods learn from are not compiled.

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
    _static: tuple[Any, int, StaticCache] | None = field(init=False, default=None, repr=False)

    def __post_init__(self) -> None:
        named = self.draft in ("own", "lookup") if isinstance(self.draft, str) else hasattr(self.draft, "config")
        if not named:
            raise CapreseError(f'`draft` is {str(self.draft)[:40]!r}; use "own", "lookup" or a model')
        if self.target not in ("dense", "hybrid"):
            raise CapreseError(f'`target` is {self.target!r}; use "dense" or "hybrid"')
        if self.compiled and self.target == "hybrid":
            raise CapreseError("compiled passes want a static cache, and hybrids have none; leave out `compiled`")
        if self.tokens is not None and not (isinstance(self.tokens, int) and 0 <= self.tokens <= 64):
            raise CapreseError(f"`tokens` is {self.tokens}; use a number from 0 to 64, or None to adapt")
        if self.reselect_every != "saved":
            check_reselect(self.reselect_every)
        self.pace = Pace(self.tokens, self.compiled)

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
        if not input_ids.numel():
            raise CapreseError(f"there is no prompt to go on from: input_ids are {list(input_ids.shape)}")
        for name in _NOT_GIVEN:
            if getattr(generation_config, name, None):
                raise CapreseError(f"lossless generation gives no {name}; leave it out")
        if getattr(generation_config, "num_beams", None) not in (None, 1):
            raise CapreseError("lossless generation is for one beam; leave out num_beams")
        cache, mask = model_kwargs.pop("past_key_values", None), model_kwargs.pop("attention_mask", None)
        if more := [k for k, v in model_kwargs.items() if k not in _NOTHING_TO_SEE and isinstance(v, torch.Tensor)]:
            raise CapreseError(f"lossless generation reads token ids alone, and no {more[0]}")
        _check_positions(model_kwargs.get("position_ids"), input_ids, mask)
        scores = processed(logits_processor, _pads(input_ids, mask)) if logits_processor else None
        rule: Rule = Greedy(scores)
        if getattr(generation_config, "do_sample", False):
            rule = Sampling(scores or _as_they_are, self.generator)
        if type(cache) is DynamicCache and not cache.get_seq_length():  # made by `generate`, or the caller's own
            if self.compiled:
                cache = None
            else:
                cache.layers = RoomyCache(model.config).layers
        limit = getattr(generation_config, "max_length", None) or 10**9
        width, texts = input_ids.shape[1], input_ids.tolist()
        mask = None if mask is None else mask[:, :width]
        if self.streamer is not None:
            self.streamer.put(input_ids.cpu())
        stops = partial(_stops, stopping_criteria, input_ids.device)
        with self.pair(model, rule, (len(input_ids), limit), cache, leave=False) as pair:
            for new in self._steps(model, pair.decode(input_ids, mask, max(1, limit - width), stops)):
                for row, token in zip(new.rows.tolist(), new.ids.tolist(), strict=True):
                    texts[row].append(token)
                if self.streamer is not None:
                    self.streamer.put(new.ids)
            pair.target.settle(max(map(len, texts)) - 1)  # as it lies after any other generation
        if self.streamer is not None:
            self.streamer.end()
        pad = getattr(generation_config, "_pad_token_tensor", None)
        fill = 0 if pad is None else int(pad)
        longest = max(map(len, texts))
        out: Any = torch.tensor([text + [fill] * (longest - len(text)) for text in texts], device=input_ids.device)
        if not getattr(generation_config, "return_dict_in_generate", False):
            return out
        self._static = None  # who has it may go on with it
        return GenerateDecoderOnlyOutput(sequences=out, past_key_values=pair.target.cache)

    def decode(
        self,
        model: nn.Module,
        prompts: tuple[torch.Tensor, torch.Tensor | None],
        max_new_tokens: int,
        rule: Rule,
        is_over: IsOver,
    ) -> Iterator[NewTokens]:
        """The tokens as they come; see `loop.Pair`."""
        ids = prompts[0]
        with self.pair(model, rule, (len(ids), ids.shape[1] + max_new_tokens)) as pair:
            yield from self._steps(model, pair.decode(*prompts, max_new_tokens, is_over))

    @contextmanager
    def pair(
        self, model: nn.Module, rule: Rule, size: tuple[int, int], cache: Any = None, leave: bool = True
    ) -> Iterator[Pair]:
        """Who is at work on a batch; nothing is read yet.

        Args:
            size: sequences, and the most tokens that one may come to.

        Raises:
            CapreseError: see `Lossless`.
        """
        self.pace.tally = Tally()
        base: Any = unwrap(model)
        every = self._every(base) if applied_ffns(base) else None
        own = self.compiled and cache is None
        with self.static_cache(base, *size) if own else nullcontext(cache) as at:
            target, draft = self.sides(base, at)
            if self.compiled:
                target.step = needed(base, "get_compiled_call")(None)
            if isinstance(draft, Other) and size[1] > (most := context_of(draft.side.model) or size[1]):
                raise CapreseError(f"the draft's context is {most} tokens, and {size[1]} are asked for")
            yield Pair(target, draft, rule, self.pace, every, leave)

    @contextmanager
    def static_cache(self, model: nn.Module, batch: int, tokens: int) -> Iterator[StaticCache]:
        """An empty static cache for so many sequences and tokens, which nobody else is given inside.

        It is the last one where that will do, since what is compiled is compiled for one.

        Raises:
            CapreseError: a model some of whose layers have a sliding window or no KV cache.
        """
        base: Any = unwrap(model)
        # what was made in inference mode is written in it alone
        of = (batch, base.config, base.dtype, base.device, torch.is_inference_mode_enabled())
        last, self._static = self._static, None
        if last is not None and last[0] == of and last[1] >= tokens:
            _, room, cache = last
            cache.reset()
        else:
            room = -(-tokens // _LENGTHS) * _LENGTHS
            cache = StaticCache(config=base.config, max_cache_len=room)
            if any(getattr(layer, "is_sliding", True) for layer in cache.layers):
                raise CapreseError("compiled passes need full attention in every layer; leave out `compiled`")
            self.pace.compile_anew()
        try:
            yield cache
        finally:
            self._static = of, room, cache

    def _steps(self, model: nn.Module, steps: Iterator[NewTokens]) -> Iterator[NewTokens]:
        """What is around a step holds for it alone: others may run the model between two of them."""
        around = partial(drafting, model) if applied_ffns(unwrap(model)) else nullcontext  # found once, not every time
        while True:
            with around():
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
        return drafting(model) if applied_ffns(unwrap(model)) else nullcontext()

    def sides(self, model: nn.Module, cache: Any = None) -> tuple[Side, Draft]:
        """Who verifies and who drafts; nothing is read yet.

        Raises:
            CapreseError: see `Lossless`.
        """
        base: Any = unwrap(model)
        applied = bool(applied_ffns(base))
        as_it_is, teacher = nullcontext, partial(dense, base) if applied else nullcontext
        own = phases_of(base).prefilling if applied else nullcontext
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
        if isinstance(self.draft, str):
            return target, Lookup(whole=self.compiled)
        return target, Other(self._other(base, self.draft))

    def _other(self, base: Any, model: nn.Module) -> Side:
        other: Any = unwrap(model)
        drafts, wanted = vocabulary(other), vocabulary(base)
        if abs(drafts - wanted) > _PADDING:
            raise CapreseError(f"the draft has {drafts} tokens and the target {wanted}: they have to share a tokenizer")
        side = Side(other)
        if applied_ffns(other):
            side = Side(other, partial(drafting, other), partial(_prompted, other))
        side.tokens = wanted if drafts != wanted else None
        return side


def _pads(ids: torch.Tensor, mask: torch.Tensor | None) -> Callable[[list[int]], int]:
    """How many pads are in front of a text that goes on from one of these prompts [B, T]."""
    if mask is None:
        return lambda text: 0
    width, first = ids.shape[1], (mask != 0).int().argmax(1)
    known: dict[tuple[int, ...], int] = dict(zip(map(tuple, ids.tolist()), first.tolist(), strict=True))
    return lambda text: known.get(tuple(text[:width]), 0)


@contextmanager
def _prompted(model: nn.Module) -> Iterator[None]:
    """Around the prompts of an applied model that drafts for another."""
    with drafting(model), phases_of(model).prefilling():
        yield


def _check_positions(given: Any, ids: torch.Tensor, mask: Any) -> None:
    """Refuse positions that are not those of the tokens, pads left out."""
    if given is None:
        return
    real = torch.ones_like(ids) if mask is None else mask[:, : ids.shape[1]].long()
    usual = (real.cumsum(1) - 1)[:, -given.shape[-1] :]
    if given.dim() != 2 or bool(((given != usual) & real[:, -given.shape[-1] :].bool()).any()):
        raise CapreseError("lossless generation counts positions itself; leave out position_ids")


def _as_they_are(_: list[int], logits: torch.Tensor) -> torch.Tensor:
    return logits.float()


def _stops(criteria: Any, device: torch.device, _: int, text: list[int]) -> bool:
    return bool(criteria(torch.tensor([text], device=device), None).any()) if criteria else False
