"""The implementation against tests/reference.py: whatever happens to a KV cache, the logits are the reference's."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import reference
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import Given, Token
from transformers import DynamicCache, PreTrainedModel, StaticCache

import caprese
from caprese.adapters import attach_adapter, set_branch
from caprese.data_gen import Sample
from caprese.distill import make_batches
from caprese.distill.batches import completion_hidden, prefill
from caprese.efficient_methods import (
    Cats,
    Griffin,
    Int8,
    Nf4,
    Nothing,
    Static,
    Teal,
    Tokens,
    applied_ffns,
    calibrate,
    compose,
    phases_of,
)
from caprese.efficient_methods.memory import TAIL
from caprese.models import FAMILIES

WINDOW = 8  # of the families below, in tests/families.py
SLIDING = {"mistral", "gemma2", "gemma3_text"}
LAYERS = 2
TOLERANCE = 1e-9
QUICK = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
FULL = settings(QUICK, derandomize=False, print_blob=True)
warnings.filterwarnings("ignore", message=".*already.*PEFT.*")


@functools.cache
def model_of(kind: str) -> PreTrainedModel:
    return reference.float64_model(kind)


# --- What is applied -------------------------------------------------------------------------------------------------

layer_sets = st.sampled_from(["all", "first-half", [1], [0, 1]])
levels = st.sampled_from([1e-9, 0.05, 0.3, 0.5, 0.7, 0.95]) | st.floats(0.01, 0.99)


@st.composite
def settings_of(draw: st.DrawFn, **more: object) -> dict[str, object]:
    layers = draw(layer_sets)
    count = {"all": LAYERS, "first-half": 1}.get(layers) if isinstance(layers, str) else len(layers)
    return {"layers": layers, "sparsity": draw(levels | st.lists(levels, min_size=count, max_size=count)), **more}


@st.composite
def method_sets(draw: st.DrawFn) -> list[caprese.efficient_methods.Method]:
    """Any composition of methods that do not pack weights."""
    names = draw(st.sets(st.sampled_from(["griffin", "cats", "teal", "static"]), max_size=3))
    methods = []
    if "griffin" in names:
        more = {"score": draw(st.sampled_from(["activation", "output"])), "prior": draw(st.sampled_from([0, 0, 7.5]))}
        shared = not more["prior"] and draw(st.booleans())
        methods.append(Griffin(**draw(settings_of(shared_choice=shared, **more))))
    if "cats" in names:
        threshold = draw(st.sampled_from(["prompt", "prompt", "calibrated"]))
        shared = threshold == "prompt" and draw(st.booleans())
        methods.append(Cats(**draw(settings_of(shared_choice=shared, threshold=threshold))))
    if "teal" in names:
        methods.append(Teal(**draw(settings_of(where=draw(st.sampled_from(["all", "ffn", "attention"]))))))
    if "static" in names:
        methods.append(Static(**draw(settings_of())))
    return methods or [Nothing(layers=draw(layer_sets))]


def choices_of(methods: list, model: PreTrainedModel, seed: int) -> dict[str, torch.Tensor]:
    """As if from samples: at random."""
    generator = torch.Generator().manual_seed(seed)
    layers = reference.layers_of(model)
    chosen = {}
    for method in methods:
        for i, layer in enumerate(layers):
            sparsity = reference.of_layer(method, i, len(layers))
            if "samples" not in method.learns or sparsity is None:
                continue
            width = reference.neurons(model, layer).up.shape[0]
            if isinstance(method, Static):
                k = max(1, round((1 - sparsity) * width))
                value = torch.randperm(width, generator=generator)[:k].sort().values[None]
            elif isinstance(method, Cats):
                value = torch.rand(1, 1, 1, generator=generator)
            elif isinstance(method, Griffin):
                static = next((m for m in methods if isinstance(m, Static)), None)
                cut = None if static is None else reference.of_layer(static, i, len(layers))
                width = width if cut is None else max(1, round((1 - cut) * width))
                value = torch.rand(1, width, generator=generator)
                value /= value.sum()
            else:
                linears = 0 if method.where == "ffn" else len(reference.attention_linears(model, layer))
                value = torch.rand(1, 3 + linears, generator=generator)
                if reference.neurons(model, layer).gate is None or model.config.model_type == "phi3":
                    value[0, 0] = value[0, 1]  # one input
            chosen[f"{method.name}.{i}"] = value
    return chosen


class Applied:
    """A model with methods on it and perhaps a recovery branch, and what the reference needs to know of that."""

    def __init__(self, kind: str, methods: list, seed: int, branch: bool, reselect: int | None, **more: object) -> None:
        self.model = more.pop("model", None) or model_of(kind)
        self.sliding = kind in SLIDING
        self.given = Given(methods, choices_of(methods, self.model, seed), **more)
        caprese.apply(self.model, methods, calibration=self.given.choices, reselect_every=reselect)
        self.outer = self.model
        if branch:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.outer = attach_adapter(self.model, 3).eval()
            generator = torch.Generator().manual_seed(seed + 1)
            for wrapper in applied_ffns(self.model).values():
                size = wrapper.view.hidden_size
                like = {"generator": generator, "dtype": self.model.dtype}
                left, right = 0.2 * torch.randn(size, 3, **like), 0.2 * torch.randn(3, size, **like)
                set_branch(wrapper.recovery, left, right)
                self.given.branches[wrapper.layer] = left, right
        self.shared = any(getattr(m, "shared_choice", False) for m in methods)

    def __enter__(self) -> Applied:
        return self

    def __exit__(self, *_: object) -> None:
        caprese.remove(self.outer)

    def reference(self, rows: list[list[Token]]) -> list[torch.Tensor]:
        """By the model as it is without methods."""
        # the wrappers stand aside: the reference puts its own in the dense model's place
        wrappers = list(applied_ffns(self.model).values())
        kinds = [type(wrapper) for wrapper in wrappers]
        phases = wrappers[0].phases
        hooks = [(d, dict(d)) for d in self._hooks()]
        for wrapper in wrappers:
            wrapper.site.scatter()
            wrapper.__class__ = wrapper.own_class
        for kept, _ in hooks:
            kept.clear()
        try:
            return reference.logits(self.model, rows, self.given)
        finally:
            for kept, before in hooks:
                kept.update(before)
            for wrapper, kind in zip(wrappers, kinds, strict=True):
                wrapper.__class__ = kind
                wrapper.site.gather()
            assert phases is phases_of(self.model)

    def _hooks(self) -> list[dict]:
        decoder = self.model.get_decoder()
        found = [decoder._forward_pre_hooks, decoder._forward_hooks]
        for layer in reference.layers_of(self.model):
            found += [linear._forward_pre_hooks for linear in reference.attention_linears(self.model, layer)]
        return found


# --- What happens to a cache -----------------------------------------------------------------------------------------

OPS = ["decode", "decode", "decode", "decode", "turn", "crop", "select", "repeat", "reorder"]


@dataclass(frozen=True)
class Script:
    """One conversation of a batch; `ops` are (what, a number that says how)."""

    lengths: list[int]
    chunks: list[int]
    ops: list[tuple[str, int]]
    right: bool = False
    static: bool = False
    seed: int = 0


scripts = st.builds(
    Script,
    lengths=st.lists(st.integers(1, 10), min_size=1, max_size=4),
    chunks=st.lists(st.integers(1, 6), max_size=3),
    ops=st.lists(st.tuples(st.sampled_from(OPS), st.integers(0, 63)), min_size=1, max_size=9),
    right=st.booleans(),
    static=st.sampled_from([False, False, True]),
    seed=st.integers(0, 99),
)


class Session:
    """A script played on one cache by plain forward calls, with a log of it for the reference."""

    def __init__(self, applied: Applied, script: Script, reselect: int | None) -> None:
        self.applied, self.script, self.every = applied, script, reselect
        self.generator = torch.Generator().manual_seed(script.seed)
        # a sliding window counts pads between real tokens, so there these sequences are of one length
        self.right = script.right and not applied.sliding
        config = applied.model.config
        self.cache = StaticCache(config=config, max_cache_len=64) if script.static else DynamicCache(config=config)
        self.rows: list[list[Token]] = []
        self.gone: list[list[Token]] = []  # sequences that were dropped, which a shared choice has still seen
        self.mask = torch.zeros(len(script.lengths), 0, dtype=torch.long)
        self.time = 0
        self.pending: list[int] = []  # columns of the tokens generated since the last dense pass
        self.passes: list[tuple[int, int]] = []  # columns of the dense passes, as far as they can be cropped to
        self.tail: int | None = None  # from which column on the last of them can be taken apart
        self.moved = False
        self.unchecked: list[tuple[int, int, torch.Tensor]] = []

    def play(self):
        """Generator: one step at a time, so that two can take turns."""
        self.rows = [[] for _ in self.script.lengths]
        self._prompt(self.script.lengths, self.script.chunks)
        yield
        for what, number in self.script.ops:
            getattr(self, f"_{what}")(number)
            yield
        self._decode(0)
        self._check()

    # steps

    def _prompt(self, lengths: list[int], chunks: list[int]) -> None:
        width = max(lengths)
        ids = torch.randint(2, 258, (len(lengths), width), generator=self.generator)
        columns = torch.arange(width)
        bounds = [(0, n) if self.right else (width - n, width) for n in lengths]
        real = torch.stack([(columns >= a) & (columns < b) for a, b in bounds]).long()
        start = 0
        for size in [*chunks, width]:
            end = min(width, start + size)
            if end > start:
                self._dense(ids[:, start:end], real[:, start:end])
            start = end

    def _dense(self, ids: torch.Tensor, real: torch.Tensor) -> None:
        first = self.mask.shape[1]
        self.time += 1
        self.pending = []
        self._learned(first, first + ids.shape[1])
        if ids.shape[1] == 1 and first:
            with caprese.phases(self.applied.model, [sum(map(bool, row)) + 99 for row in self.rows]):
                self._forward(ids, real, True)
        else:
            self._forward(ids, real, True)

    def _learned(self, first: int, end: int) -> None:
        self.passes.append((first, end))
        self.tail = max(first, end - max(1, TAIL // len(self.rows)))

    def _decode(self, _: int) -> None:
        if self.every is not None and len(self.pending) >= self.every:
            self._check()
            self.time += 1
            for row in self.rows:
                for i, token in enumerate(row):
                    if token.column in self.pending:
                        row[i] = replace(token, prompt=True, time=self.time, weight=1)
            self._learned(self.pending[0], self.pending[-1] + 1)
            self.pending = []
        self.pending.append(self.mask.shape[1])
        self.time += 1
        ids = torch.randint(2, 258, (len(self.rows), 1), generator=self.generator)
        self._forward(ids, torch.ones_like(ids), False)

    def _turn(self, number: int) -> None:
        width = 1 + number % 5
        lengths = [width] * len(self.rows)
        if not self.applied.sliding and number >= 32:
            lengths = [1 + (number + 2 * b) % width for b in range(len(self.rows))]
        self._prompt(lengths, [1 + number % 4] if number % 2 else [])

    def _crop(self, number: int) -> None:
        length = self.mask.shape[1]
        if self.script.static or (self.applied.sliding and length >= WINDOW):
            return  # transformers cannot
        ends = {end for _, end in self.passes}
        possible = [n for n in range(1, length) if n in ends or not self.passes or n > self.passes[-1][1]]
        if self.tail is not None and not (self.applied.shared and self.moved):
            possible += range(max(1, self.tail), min(length, self.passes[-1][1]))
        if not possible:
            return
        self._check()
        to = sorted(set(possible))[number % len(set(possible))]
        self.cache.crop(to - length)
        self.mask = self.mask[:, :to]
        for rows in (self.rows, self.gone):
            for row in rows:
                row[:] = [token for token in row if token.column < to]
        self.pending = [column for column in self.pending if column < to]
        if self.passes and to < self.passes[-1][1]:
            if to in ends:
                self.tail = None
            else:
                self.tail = max(self.tail, to - max(1, TAIL // len(self.rows)))
            self.passes = [(a, min(b, to)) for a, b in self.passes if a < to]

    def _select(self, number: int) -> None:
        count = 1 + number % len(self.rows)
        indices = torch.randperm(len(self.rows), generator=self.generator)[:count]
        self._move(self.cache.batch_select_indices, indices, indices.tolist())

    def _repeat(self, number: int) -> None:
        times = 1 + number % 3
        if len(self.rows) * times <= 6:
            order = [b for b in range(len(self.rows)) for _ in range(times)]
            self._move(self.cache.batch_repeat_interleave, times, order)

    def _reorder(self, _: int) -> None:
        order = torch.randint(len(self.rows), (len(self.rows),), generator=self.generator)
        self._move(self.cache.reorder_cache, order, order.tolist())

    def _move(self, function, argument, order: list[int]) -> None:
        if self.script.static and function is not self.cache.reorder_cache and function.__name__ != "reorder_cache":
            return  # transformers cannot
        self._check()
        function(argument)
        self.moved = True
        self.mask = self.mask[order]
        old, seen = self.rows, set()
        self.rows = []
        for b in order:
            self.rows.append([replace(t, weight=0) if b in seen else replace(t) for t in old[b]])
            seen.add(b)
        self.gone += [row for b, row in enumerate(old) if b not in seen]

    # what is common to them

    def _forward(self, ids: torch.Tensor, real: torch.Tensor, prompt: bool) -> None:
        first = self.mask.shape[1]
        self.mask = torch.cat([self.mask, real], 1)
        positions = (self.mask.cumsum(-1) - 1).clamp_min(0)[:, first:]
        out = self.applied.outer(
            input_ids=ids,
            attention_mask=self.mask if not self.mask.all() or self.script.seed % 2 else None,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        for b, i in real.nonzero().tolist():
            self.unchecked.append((b, len(self.rows[b]), out.logits[b, i]))
            self.rows[b].append(Token(int(ids[b, i]), prompt, self.time, first + i))

    def _check(self) -> None:
        if not self.unchecked:
            return
        extra = self.gone if self.applied.shared else []
        right = self.applied.reference([*self.rows, *extra])
        for b, i, mine in self.unchecked:
            worst = float((mine - right[b][i]).abs().max())
            assert worst < TOLERANCE * max(1.0, float(right[b][i].abs().max())), (
                f"token {i} of sequence {b} ({self.rows[b][i]}) is {worst:.3g} off"
            )
        self.unchecked = []


cases = {
    "kind": st.sampled_from(sorted(FAMILIES)),
    "methods": method_sets(),
    "seed": st.integers(0, 999),
    "branch": st.booleans(),
    "reselect": st.sampled_from([None, None, 1, 2, 3, 5]),
}


@torch.no_grad()
def play(kind, methods, seed, branch, reselect, plays, order) -> None:
    with Applied(kind, methods, seed, branch, reselect) as applied:
        running = [Session(applied, script, reselect).play() for script in plays]
        turn = 0
        while running:
            which = (order >> turn) % len(running)
            try:
                next(running[which])
            except StopIteration:
                del running[which]
            turn = (turn + 1) % 16


def on_caches(profile: settings, examples: int):
    return lambda test: settings(profile, max_examples=examples)(
        given(**cases, plays=st.lists(scripts, min_size=1, max_size=2), order=st.integers(0, 2**16 - 1))(test)
    )


@on_caches(QUICK, 30)
def test_logits_are_those_of_the_reference(kind, methods, seed, branch, reselect, plays, order):
    play(kind, methods, seed, branch, reselect, plays, order)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@on_caches(FULL, 3500)
def test_logits_are_those_of_the_reference_in_full(kind, methods, seed, branch, reselect, plays, order):
    play(kind, methods, seed, branch, reselect, plays, order)


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_every_family_by_one_script(kind):
    """Prefill in chunks, decoding past the window, a second turn, reselection."""
    ops = [("decode", 0)] * 6 + [("turn", 3)] + [("decode", 0)] * 4
    for every in (None, 2):
        script = Script([9, 1, 5], [4, 1], ops, seed=1)
        static = replace(script, static=True)
        play(kind, [Griffin(sparsity=0.5), Cats(sparsity=0.4)], 1, True, every, [script, static], 0b101101)


# --- generate --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def play_generate(kind, methods, seed, branch, reselect, lengths, count, chunk, static) -> None:
    """What `generate` computes step by step, left-padded."""
    with Applied(kind, methods, seed, branch, reselect) as applied:
        generator = torch.Generator().manual_seed(seed)
        width = max(lengths)
        mask = torch.stack([torch.arange(width) >= width - n for n in lengths]).long()
        ids = torch.randint(2, 258, mask.shape, generator=generator) * mask
        more = {"prefill_chunk_size": chunk} if chunk else {}
        computed: list[torch.Tensor] = []  # generate itself gives them in float32
        hook = applied.model.register_forward_hook(lambda *args: computed.append(args[-1].logits[:, -1]))
        try:
            sequences = applied.outer.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=count,
                do_sample=False,
                cache_implementation="static" if static else None,
                **more,
            )
        finally:
            hook.remove()
        mine = torch.stack(computed[-count:], 1)
        every = reselect or count
        for first in range(0, count - 1, every):
            end = min(first + every, count - 1)
            rows = []
            for b, n in enumerate(lengths):
                tokens = sequences[b, width - n : width + end].tolist()
                rows.append([Token(t, i < n + first, int(i >= n + first)) for i, t in enumerate(tokens)])
            for b, right in enumerate(applied.reference(rows)):
                n = lengths[b]
                for g in range(0 if first == 0 else first + 1, end + 1):  # logits g follow completion token g - 1
                    worst = float((mine[b, g] - right[n + g - 1]).abs().max())
                    assert worst < TOLERANCE * max(1.0, float(right.abs().max())), f"step {g} of {b}: {worst:.3g}"


generations = {
    **cases,
    "lengths": st.lists(st.integers(1, 10), min_size=1, max_size=4),
    "count": st.integers(2, 8),
    "chunk": st.sampled_from([None, None, 1, 2, 3, 5]),
    "static": st.booleans(),
}


@settings(QUICK, max_examples=15)
@given(**generations)
def test_generate_is_the_reference(**case):
    play_generate(**case)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(FULL, max_examples=1000)
@given(**generations)
def test_generate_is_the_reference_in_full(**case):
    play_generate(**case)


# --- The passes of training ------------------------------------------------------------------------------------------


@torch.no_grad()
def play_training(kind, methods, seed, branch, reselect, lengths, counts) -> None:
    """Prompt and completion in one pass inside `phases`, and in the two that distillation makes."""
    with Applied(kind, methods, seed, branch, reselect) as applied:
        generator = torch.Generator().manual_seed(seed)
        samples = []
        for n, more in zip(lengths, counts, strict=False):
            ids = torch.randint(2, 258, (n + more + 1,), generator=generator).tolist()
            samples.append(Sample(ids, n, "p", "c"))
        for batch in make_batches(samples, 4):
            n = batch.prompt_lengths
            size = batch.inputs.shape[1]
            whole = batch.whole()
            with caprese.phases(applied.model, n):
                one = applied.outer(
                    input_ids=whole.ids,
                    attention_mask=whole.mask.long(),
                    position_ids=(whole.mask.cumsum(-1) - 1).clamp_min(0),
                    use_cache=False,
                ).logits[:, -size:]
            scored = completion_hidden(applied.outer, batch, prefill(applied.outer, batch))
            two = scored.new_zeros(*batch.mask.shape, scored.shape[-1])
            two[batch.mask] = scored
            two = applied.model.get_output_embeddings()(two)
            if cap := getattr(applied.model.config, "final_logit_softcapping", None):
                two = torch.tanh(two / cap) * cap
            for computed, every in ((one, size), (two, reselect or size)):
                for first in range(0, size, every):
                    rows = []
                    for b in range(len(n)):
                        prompt = batch.prompt[b][batch.prompt_mask[b]].tolist()
                        tokens = prompt + batch.inputs[b][batch.mask[b]].tolist()[: first + every]
                        rows.append([Token(t, i < len(prompt) + first, 0) for i, t in enumerate(tokens)])
                    for b, right in enumerate(applied.reference(rows)):
                        right = right[int(n[b]) + first :]
                        mine = computed[b, first : first + len(right)]
                        if len(right):
                            worst = float((mine - right).abs().max())
                            assert worst < TOLERANCE * max(1.0, float(right.abs().max())), f"{b}: {worst:.3g}"


trainings = {
    **cases,
    "lengths": st.lists(st.integers(1, 10), min_size=1, max_size=4),
    "counts": st.lists(st.integers(1, 8), min_size=4, max_size=4),
}


@settings(QUICK, max_examples=15)
@given(**trainings)
def test_the_passes_of_training_are_the_reference(**case):
    play_training(**case)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(FULL, max_examples=500)
@given(**trainings)
def test_the_passes_of_training_are_the_reference_in_full(**case):
    play_training(**case)


SETS = {
    "griffin": [Griffin(sparsity=0.5)],
    "griffin with a prior": [Griffin(score="output", prior=20)],
    "cats": [Cats(sparsity=0.6)],
    "cats calibrated": [Cats(threshold="calibrated")],
    "teal": [Teal()],
    "static": [Static()],
    "none": [Nothing()],
    "static+cats": [Static(sparsity=0.3), Cats(layers="first-half")],
    "static+griffin": [Static(sparsity=[0.3, 0.6]), Griffin()],
    "griffin+cats": [Griffin(sparsity=0.4), Cats(sparsity=0.4)],
    "griffin+teal of attention": [Griffin(layers=[1]), Teal(where="attention")],
}


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "phi3", "gpt2", "opt"])
@pytest.mark.parametrize("what", SETS)
def test_every_method_by_one_script(what, kind):
    """The same on a cache, in generate and in the passes of training."""
    methods = list(compose(SETS[what]))
    ops = [("decode", 0)] * 4 + [("turn", 2)] + [("decode", 0)] * 2
    play(kind, methods, 1, True, 3, [Script([6, 1, 3], [2], ops)], 0)
    play_generate(kind, methods, 1, True, 2, [6, 1, 3], 5, 2, False)
    play_training(kind, methods, 1, True, 2, [6, 1, 3], [3, 5, 1])


@pytest.mark.parametrize("kind", sorted(FAMILIES))
@torch.no_grad()
def test_what_is_calibrated_is_the_formula(kind):
    """On the completion tokens of two batches, one of them padded."""
    model = model_of(kind)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 258, (4, 9), generator=generator)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, :3] = False
    rows = [Tokens(ids[:2], torch.tensor([2, 1]), mask), Tokens(ids[2:], torch.tensor([5, 8]))]
    completion = [[2, 4], [5, 8]]  # the first completion column of each sequence, pads counted
    teal = Teal(sparsity=0.4, greedy=False)
    made = {m.name: calibrate(model, m, rows) for m in (Static(), Cats(threshold="calibrated"), teal)}
    layers = reference.layers_of(model)
    linears = [reference.attention_linears(model, layer) for layer in layers]
    seen: dict[object, list[torch.Tensor]] = {}
    hooks = []
    for i, layer in enumerate(layers):
        for key, module in [(i, layer.fc1 if kind == "opt" else layer.mlp), *((m, m) for m in linears[i])]:
            hooks.append(
                module.register_forward_pre_hook(lambda _, args, key=key: seen.setdefault(key, []).append(args[0]))
            )
    try:
        for batch, starts in zip(rows, completion, strict=True):
            for row, start in zip(range(2), starts, strict=True):
                model(batch.ids[row][batch.valid()[row]][None], use_cache=False)
                pads = int((~batch.valid()[row]).sum())
                for inputs in seen.values():
                    inputs[-1] = inputs[-1].view(1, -1, inputs[-1].shape[-1])[0, start - pads :]
    finally:
        for hook in hooks:
            hook.remove()
    for i, layer in enumerate(layers):
        own = reference.neurons(model, layer)
        x = torch.cat(seen[i])
        a, z = own.of(x)
        scores = z.norm(dim=0) * own.down.norm(dim=0)
        assert made["static"][f"static.{i}"][0].tolist() == sorted(scores.topk(48).indices.tolist())
        assert float(made["cats"][f"cats.{i}"]) == reference.log_quantile(a.numpy().flatten(), 0.5)
        inputs = [x, x, z, *(torch.cat(seen[m]) for m in linears[i])]
        right = [float(reference.log_quantile(t.numpy().flatten(), 0.4)) for t in inputs]
        assert made["teal"][f"teal.{i}"][0].tolist() == right


# --- Packed weights --------------------------------------------------------------------------------------------------


def nf4(weight: torch.Tensor) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    small = weight.float().contiguous()
    return dequantize_4bit(*quantize_4bit(small, quant_type="nf4", blocksize=64)).to(weight.dtype)


def int8(weight: torch.Tensor) -> torch.Tensor:
    """By rows, scaled to -127..127."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scale).round() * scale


@functools.cache
def model32(kind: str) -> PreTrainedModel:
    return reference.tiny(kind)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("method", [Nf4, Int8])
@pytest.mark.parametrize("kind", sorted(FAMILIES))
@torch.no_grad()
def test_packed_weights_are_the_reference_with_rounded_ones(kind, method, static):
    """In float32. Int8 rounds its activations too, which the reference does not: half a percent of their largest."""
    methods = list(compose([method(), Static(sparsity=0.3)] if static else [method()]))
    packed = {"nf4": nf4, "int8": int8}[method.name]
    with Applied(kind, methods, 1, True, None, model=model32(kind), packed=packed) as applied:
        ids = torch.randint(2, 258, (1, 7), generator=torch.Generator().manual_seed(1))
        with caprese.phases(applied.model, [3]):
            mine = applied.outer(input_ids=ids).logits[0]
        rows = [[Token(t, i < 3, 0) for i, t in enumerate(ids[0].tolist())]]
        right = applied.reference(rows)[0]
        exact = applied.given.packed
        applied.given.packed = None
        unrounded = applied.reference(rows)[0]
        applied.given.packed = exact
        assert (unrounded - right)[3:].abs().max() > 1e-3  # rounding shows
        error = (mine - right).abs().max() / right.abs().max()
        assert error < (1e-4 if method is Nf4 else 0.15)
        if method is Int8:
            assert (mine - right)[3:].norm() < 0.2 * right[3:].norm()


# --- Said in so many words -------------------------------------------------------------------------------------------


def test_of_equal_neurons_the_first_stay():
    """However the batch falls: behind a ReLU a short prompt leaves many neurons silent."""
    statistic = torch.zeros(5, 96, dtype=torch.float64)
    statistic[:, [7, 30, 31, 80]] = torch.tensor([1.0, 3.0, 2.0, 3.0], dtype=torch.float64)
    ffn = SimpleNamespace(width=96)
    for rows in (statistic, statistic[:1]):
        kept = Griffin(sparsity=0.5).choose(rows, ffn)[:, 0]
        assert all(row.nonzero().flatten().tolist() == [*range(47), 80] for row in kept)


def test_a_crop_into_an_earlier_prompt_pass_is_refused():
    model = model_of("llama")
    with Applied("llama", [Griffin()], 0, False, None) as applied:
        cache = DynamicCache(config=model.config)
        for n in (6, 4):
            applied.outer(torch.arange(2, 2 + n)[None], past_key_values=cache, use_cache=True)
        with pytest.raises(caprese.CapreseError, match="inside a prompt pass"):
            cache.crop(-7)
        with pytest.raises(caprese.CapreseError, match="inside a prompt pass"):
            applied.outer(torch.tensor([[5]]), past_key_values=cache, use_cache=True)


def test_pads_of_a_chunk_of_one_token_stay_pads_under_reselection():
    """A prefill whose second chunk is one token, which only `phases` can say is prompt."""
    script = Script([9, 1], [4, 1], [("decode", 0)] * 5)
    for kind in ("llama", "gpt2", "gemma2"):
        play(kind, [Griffin(sparsity=0.5)], 1, False, 2, [script], 0)


@pytest.mark.parametrize("kind", sorted(SLIDING))
@pytest.mark.parametrize("static", [False, True])
def test_reselection_behind_a_sliding_window(kind, static):
    """The window cannot be cropped; copies of its layers from before the block take their place."""
    ops = [("decode", 0)] * 9 + [("turn", 4)] + [("decode", 0)] * 6
    for every in (1, 3, 5):
        play(kind, [Griffin(sparsity=0.6)], 1, True, every, [Script([12, 3], [7], ops, static=static)], 0)


def test_a_crop_is_followed_at_once():
    """Before the sequences are repeated, which would teach a shared choice the last prompt tokens twice."""
    for seed in range(5):
        script = Script([8], [], [("crop", 1), ("repeat", 1), ("turn", 3)], seed=seed)
        play("llama", [Griffin(sparsity=0.3, shared_choice=True)], 0, False, None, [script], 0)


@pytest.mark.parametrize("method", [Griffin, Cats])
def test_one_choice_for_a_batch_is_from_all_its_prompts(method):
    """Also after a sequence has left the batch: what it taught stays."""
    for ops in ([("decode", 0)] * 3, [("select", 0), ("decode", 0), ("turn", 2), ("repeat", 2), ("turn", 1)]):
        script = Script([5, 9, 1], [], [*ops, ("decode", 0)], seed=4)
        play("llama", [method(sparsity=0.5, shared_choice=True)], 1, False, None, [script], 0)
