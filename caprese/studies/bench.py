"""`caprese bench`: the time to next token of everything that can be compared, side by side in one process."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, CompileConfig, PretrainedConfig, PreTrainedModel, StaticCache

from caprese.adapters import attach_adapter
from caprese.efficient_methods import (
    Method,
    Tokens,
    applied_ffns,
    apply,
    calibrate,
    cost,
    describe_methods,
    idle_branches,
    lora_rank,
    needs_calibration,
    settle,
)
from caprese.efficient_methods.memory import memory_of
from caprese.errors import CapreseError
from caprese.evaluation.evaluate import environment
from caprese.evaluation.latency import TURN
from caprese.inference import Form, fuse
from caprese.inference.fused.forms import check_form
from caprese.inference.fused.indexed import Indexed
from caprese.inference.generate import NewTokens, clock, generate
from caprese.kernels import triton_runs
from caprese.models import context_of, count_parameters, device_of, find_ffns, unwrap
from caprese.models.cache import roomy_cache
from caprese.progress import bar, say
from caprese.studies.engines import Engine
from caprese.studies.lora_step import LoraStep
from caprese.studies.rows import ROWS, other_type, rows_of


@dataclass
class Contender:
    """One row: a model of its own that shares the weights, its cache, its decode loop, and its times."""

    name: str
    model: Any
    step: Callable[..., Any] | None
    cache: Any = None
    loop: Iterator[NewTokens] = field(default_factory=lambda: iter(()))
    prefill_ms: float = 0.0
    selection_ms: float = 0.0
    compile_s: float = 0.0
    temporary: int = 0
    times: list[float] = field(default_factory=list)

    def advance(self) -> float:
        """Milliseconds that the next token takes; the first one's are those of the prompt."""
        begin = clock(device_of(self.model))
        return 1000 * (next(self.loop).moment - begin)


def _twin(model: nn.Module) -> Any:
    """The same model once more, without another copy of its weights."""
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(t): t for t in shared})


class Bench:
    """A base model, what is done to it, and how it is measured."""

    def __init__(
        self,
        model: PreTrainedModel,
        methods: Sequence[Method],
        *,
        rank: int,
        prompt_tokens: int = 128,
        new_tokens: int = 64,
        rows: Sequence[str] | None = None,
        form: Form = "auto",
        seed: int = 0,
    ) -> None:
        """
        Args:
            rows: of ROWS; None is all there are for these methods, see `rows_of`.

        Raises:
            CapreseError: a row that is not in ROWS, no tokens, or what apply and attach_adapter refuse.
        """
        able = rows_of(methods, dtype=model.dtype, device=model.device.type)
        rows = able if rows is None else rows
        if refused := [r for r in rows if r in ROWS and r not in able]:
            raise CapreseError(f"{describe_methods(methods)} has no row {', '.join(refused)}; leave it out of `rows`")
        if unknown := [r for r in rows if r not in ROWS]:
            raise CapreseError(f"no row {', '.join(unknown)}; rows are {', '.join(ROWS)}")
        if "dense" not in rows:
            raise CapreseError("every ratio is to the row dense; leave it in `rows`")
        if prompt_tokens < 1 or new_tokens < 1:
            raise CapreseError("`prompt_tokens` and `new_tokens` start at 1")
        check_form(form)
        room = context_of(model)
        if room is not None and prompt_tokens + new_tokens + 4 * TURN > room:
            raise CapreseError(f"{prompt_tokens} + {new_tokens} tokens do not fit this model's context of {room}")
        self.model, self.methods, self.rank, self.form = model, methods, 1 if idle_branches(methods) else rank, form
        self.prompt_tokens, self.new_tokens, self.rows, self.seed = prompt_tokens, new_tokens, rows, seed
        self.device = next(model.parameters()).device
        self.dtype = model.dtype
        self.apart: Any = None  # in another storage order, and in another type
        self.other: Any = None
        self.calibration = None
        if needs_calibration(methods):
            ids = self._tokens(4, 64)
            self.calibration = calibrate(_twin(model), methods, [Tokens(ids, torch.full((4,), 8))])

    def _tokens(self, batch: int, length: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randint(5, self.model.config.vocab_size, (batch, length), generator=generator).to(self.device)

    def _contender(self, name: str) -> Contender:
        model = _twin(self.model)
        if (dtype := other_type(name)) is not None:
            if self.other is None:
                self.other = copy.deepcopy(self.model)
                self.other.to(dtype)
            model = _twin(self.other)
        if name in ("efficient", "fused", "fused_compiled") and triton_runs(self.device):
            if self.apart is None:  # the indexed form stores them in another order, which is not to slow dense
                self.apart = _twin(model)
                for site in find_ffns(self.apart):
                    for part in {site.family.gate or site.family.up, site.family.up, site.family.down}:
                        linear = getattr(site.ffn.module, part)
                        linear.weight = nn.Parameter(linear.weight.detach().clone(), requires_grad=False)
            model = _twin(self.apart)
        if not name.startswith("dense"):
            model = apply(model, self.methods, calibration=self.calibration)
            settle(model)
            if name in ("recovered", "fused", "fused_compiled"):
                model = attach_adapter(model, self.rank)
                generator = torch.Generator(self.device).manual_seed(self.seed)
                for at, parameter in model.named_parameters():
                    if ".lora_" in at:  # PEFT keeps them in float32; served, they are the base's
                        parameter.data = parameter.data.to(self.dtype).normal_(0, 0.02, generator=generator)
                model = model.eval()
            if name in ("efficient", "fused", "fused_compiled"):
                fuse(model, self.form)
                if self.form == "auto":  # the same for every row
                    steps = [w.fused for w in applied_ffns(model).values()]
                    self.form = "indexed" if any(isinstance(step, Indexed) for step in steps) else "packed"
            if name == "efficient_lora":
                for wrapper in applied_ffns(model).values():
                    wrapper.fused = LoraStep(wrapper, lora_rank(wrapper.view, self.rank))
        bare = unwrap(model)
        step: Callable[..., Any] | None = None
        if name.endswith("compiled"):
            config = CompileConfig(fullgraph=True, mode="reduce-overhead" if self.device.type == "cuda" else "default")
            bare.generation_config.compile_config = config
            step = bare.get_compiled_call(config)
        return Contender(name, bare, step)

    def run(self, batch: int = 1, others: Mapping[str, Path] | None = None) -> dict[str, Any]:
        """TTNT of every row at one batch size; see `bench`."""
        prompts = self._tokens(batch, self.prompt_tokens).tolist()
        contenders: list[Contender] = []
        engines: list[Engine] = []
        steps = self.new_tokens
        tokens = steps + 4 * TURN + steps // (TURN - 1) + 8
        with bar(f"batch {batch}: prefill and warm-up", len(self.rows), "rows") as advance:
            for name in self.rows:
                c = self._contender(name)
                compiled = name.endswith("compiled")
                room = self.prompt_tokens + tokens
                c.cache = StaticCache(self.model.config, max_cache_len=room) if compiled else roomy_cache(c.model)
                c.loop = generate(c.model, prompts, tokens, cache=c.cache, step=c.step)
                self._start(c, batch)
                contenders.append(c)
                advance(1)
        try:
            for name, path in (others or {}).items() if batch == 1 else ():
                engines.append(Engine(name, path, prompts[0], torch.get_num_threads()))
            for engine in engines:
                say(f"starting {engine.name}")
                engine.wait()
            self._decode([*contenders, *engines], batch)
            return self._result(contenders, engines, batch)
        finally:
            for engine in engines:
                engine.close()

    def _decode(self, contenders: Sequence[Contender | Engine], batch: int) -> None:
        """Take turns token by token until each has decoded enough."""
        steps, turn = self.new_tokens, 0
        with bar(f"batch {batch}: decoding", steps, "tokens") as advance:
            while len(contenders[0].times) < steps:
                for offset in range(len(contenders)):  # nobody is always first
                    contender = contenders[(turn + offset) % len(contenders)]
                    contender.advance()
                    for _ in range(min(TURN - 1, steps - len(contender.times))):
                        contender.times.append(contender.advance())
                advance(min(TURN - 1, steps - turn * (TURN - 1)))
                turn += 1

    def _start(self, contender: Contender, batch: int) -> None:
        """The prompt, the choice, what has to be compiled, and some tokens to warm up."""
        contender.prefill_ms = contender.advance()
        memory = memory_of(contender.cache)
        fused = [w for w in applied_ffns(contender.model).values() if w.fused is not None]

        def select() -> None:
            for wrapper in fused:
                wrapper.fused.follow(memory.layer(wrapper.layer), batch)  # type: ignore[union-attr]

        if fused:  # twice: what is allocated once is no cost of choosing
            select()
            for wrapper in fused:
                wrapper.fused.source = None
            begin = clock(self.device)
            select()
            contender.selection_ms = 1000 * (clock(self.device) - begin)
        try:
            contender.compile_s = contender.advance() / 1000
        except torch._dynamo.exc.TorchDynamoException as error:
            first = str(error).strip().partition("\n")[0]
            raise CapreseError(
                f"transformers' {type(contender.model).__name__} does not compile whole ({first}); leave its compiled "
                "rows out of `rows`"
            ) from error
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        for _ in range(2):
            contender.advance()
        if self.device.type == "cuda":
            contender.temporary = torch.cuda.max_memory_allocated() - before

    def reads(self, name: str, batch: int) -> int:
        return weights_read(self.model, self.methods, self.rank, name, batch)

    def _result(self, contenders: Sequence[Contender], others: Sequence[Engine], batch: int) -> dict[str, Any]:
        by_name = {c.name: c for c in contenders}
        medians = {c.name: statistics.median(c.times) for c in contenders}
        best = min(median for name, median in medians.items() if name.startswith("dense"))
        dense_bytes = self.reads("dense", batch) * self.dtype.itemsize
        rows = []
        for c in contenders:
            times = c.times * 2 if len(c.times) == 1 else c.times
            low, ttnt, high = statistics.quantiles(times, n=4)
            engine = "dense_compiled" if c.name.endswith("compiled") and "dense_compiled" in by_name else "dense"
            read = self.reads(c.name, batch) * (other_type(c.name) or self.dtype).itemsize
            ratio = ttnt / medians[engine]
            rows.append(
                {
                    "name": c.name,
                    "ttnt_ms": ttnt,
                    "spread_ms": high - low,
                    "tokens_per_second": 1000 * batch / ttnt,
                    "ratio_same_engine": ratio,
                    "ratio_dense_eager": ttnt / medians["dense"],
                    "ratio_best_dense": ttnt / best,
                    "bytes_per_token": read / batch,
                    "efficiency": read / dense_bytes / ratio,
                    "peak_bytes": _held(c) + c.temporary,
                    "prefill_ms": c.prefill_ms,
                    "selection_ms": c.selection_ms,
                    "compile_s": c.compile_s if c.name.endswith("compiled") else 0.0,
                }
            )
        for other in others:
            times = other.times * 2 if len(other.times) == 1 else other.times
            low, ttnt, high = statistics.quantiles(times, n=4)
            size = other.bytes
            ratio = ttnt / medians["dense"]
            rows.append(
                {
                    "name": other.name,
                    "ttnt_ms": ttnt,
                    "spread_ms": high - low,
                    "tokens_per_second": 1000 / ttnt,
                    "ratio_same_engine": None,
                    "ratio_dense_eager": ratio,
                    "ratio_best_dense": ttnt / best,
                    "bytes_per_token": size,  # about: the files, of which a token reads all but the embeddings' rows
                    "efficiency": size / dense_bytes / ratio,
                    "peak_bytes": size,
                }
            )
        return {
            "batch": batch,
            "floor_ratio": self.reads("fused", batch) * self.dtype.itemsize / dense_bytes,
            "rows": rows,
        }

    def facts(self) -> dict[str, Any]:
        """What was measured, and on what."""
        sparsities = [getattr(m, "sparsity", None) for m in self.methods]
        return {
            "method": describe_methods(self.methods),
            "sparsity": sparsities[0] if len(sparsities) == 1 else sparsities,
            "rank": self.rank,
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "form": self.form,
            "environment": environment(self.model),
        }


def _held(contender: Contender) -> int:
    """Bytes of the weights, buffers and KV cache that this row needs; shared ones counted once."""
    tensors = [*contender.model.parameters(), *contender.model.buffers()]
    layers: list[Any] = list(contender.cache.layers)
    layers += [seen.layer for layer in layers if (seen := getattr(layer, "seen", None)) is not None]  # beside a mixer
    for layer in layers:
        own = [*vars(layer).values(), *getattr(layer, "rooms", {}).values()]
        tensors += [t for t in own if isinstance(t, torch.Tensor)]
    memory = memory_of(contender.cache)
    for known in memory.layers.values() if memory is not None else ():
        tensors += known.packed.buffers() if known.packed is not None else ()
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def weights_read(model: nn.Module, methods: Sequence[Method], rank: int, row: str, batch: int = 1) -> int:
    """Weights that one decode step of a row reads: its byte floor, over the size of a weight; see `cost`."""
    if batch < 1 or rank < 1:
        raise CapreseError("`batch` takes numbers from 1, such as 1,2,4,8,16, and `rank` one from 1")
    reads = cost(model, methods, rank, batch=batch)
    if row == "efficient_lora":
        return reads.efficient + reads.lora
    return reads.read("dense" if row.startswith("dense") else "efficient" if row == "efficient" else "recovered")


def bench_plan(
    config: PretrainedConfig, methods: Sequence[Method], rank: int, dtype: torch.dtype, batches: Sequence[int]
) -> dict[str, Any]:
    """What `bench` would read and hold, without a weight."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    read = {row: weights_read(model, methods, rank, row) * dtype.itemsize for row in ("dense", "efficient", "fused")}
    floors = {
        b: weights_read(model, methods, rank, "fused", b) / weights_read(model, methods, rank, "dense") for b in batches
    }
    return {
        "method": describe_methods(methods),
        "model_bytes": count_parameters(model) * dtype.itemsize,
        **{f"bytes_per_token_{row}": size for row, size in read.items()},
        **{f"floor_ratio_batch_{b}": round(floor, 4) for b, floor in floors.items()},
    }


def bench(
    model: PreTrainedModel,
    methods: Sequence[Method],
    batch: Sequence[int] = (1,),
    others: Mapping[str, Path] | None = None,
    **how: Any,
) -> dict:
    """Time to next token of dense, efficient and recovered, eager and compiled, taking turns token by token.

    Args:
        model: a bare transformers model; every row is a twin of it that shares its weights.
        methods: what makes it cheaper.
        batch: sequences decoded together, one measurement for each.
        others: what other engines run beside them, at batch 1, by the names of their rows: a GGUF file in llama.cpp, a
            checkpoint's directory in vLLM.
        how: see `Bench`.

    Returns: the facts of the run, and floor_ratio and rows of the first batch size; if there are several, all of them
    under "batches". Times in ms are medians, spread_ms the interquartile range; bytes are of weights; efficiency is
    the row's byte floor ratio over its measured ratio to dense in the same engine.

    Raises:
        CapreseError: see `Bench`; a batch below 1.
    """
    if not batch or min(batch) < 1:
        raise CapreseError("`batch` takes numbers from 1, such as 1,2,4,8,16")
    runner = Bench(model, methods, **how)
    results = [runner.run(size, others) for size in batch]
    facts = runner.facts() | results[0]
    return facts | ({"batches": results} if len(results) > 1 else {})
