"""The fastest of several compositions of methods that cost no more than a given KL; both are measured."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from caprese.data_gen import Sample
from caprese.distill import Checkpoints, HeldOut, make_batches
from caprese.distill.checkpoints import Kept
from caprese.efficient_methods import Method, apply, calibrate, describe_methods, needs_calibration, remove
from caprese.errors import CapreseError
from caprese.evaluation.latency import rounds_within, time_to_next_token
from caprese.models import device_of, unwrap
from caprese.models.quickest import quickest_dtype
from caprese.progress import say
from caprese.recovery.stages import Calibrating

# New tokens that are timed.
_TOKENS = 32


def find_fastest(
    model: nn.Module,
    alternatives: Sequence[tuple[Method, ...]],
    samples: Mapping[str, Sequence[Sample]],
    config: Calibrating,
    run: Checkpoints,
) -> tuple[tuple[Method, ...], Calibrating]:
    """The alternative with the least time to next token, of dense in the same moments, whose KL(dense || efficient) on
    validation samples is within `config.target_kl`, before recovery.

    Times are of one fused step at batch 1, without a branch, in the type that this machine decodes fastest in. An
    alternative that fails on this model is left out, with the reason. What was measured is kept as "search":
    {"target_kl", "dtype", "chosen", "alternatives": [{"method", "kl", "ttnt_ms", "dense_ms", "ratio"} or {"method",
    "refused"}]}.

    Returns: its methods, and the config with the target met.

    Raises:
        CapreseError: none is within the target.
    """
    with run.stage("search") as stage:
        measuring = _Measuring(model, samples, config)
        found: list[dict[str, Any]] = []
        for number, methods in enumerate(alternatives):
            _, facts = run.once(f"search-{number}", functools.partial(measuring.measure, methods))
            cost = facts.get("refused") or f"KL {facts['kl']:.3f}, {facts['ratio']:.2f} of dense's time"
            say(f"{number + 1} of {len(alternatives)}, {facts['method']}: {cost}")
            found.append(facts)
        chosen = _fastest(found, config.target_kl or 0.0)
        about = {"target_kl": config.target_kl, "chosen": found[chosen]["method"], "alternatives": found}
        run.once("search", lambda: ({}, {**about, "dtype": measuring.dtype}))
        stage.update(note=f"{found[chosen]['method']}, {found[chosen]['ratio']:.2f} of dense's time")
    return alternatives[chosen], replace(config, target_kl=None)


def _fastest(found: Sequence[Mapping[str, Any]], target: float) -> int:
    able = [each for each in found if "refused" not in each]
    if not able:
        raise CapreseError(f"this model can be given none of the alternatives: {found[0]['refused']}")
    within = [each for each in able if each["kl"] <= target]
    if not within:
        least = min(able, key=lambda each: each["kl"])
        raise CapreseError(
            f"no alternative is within `target_kl={target:g}`: {least['method']} comes nearest, at {least['kl']:.3g}; "
            "allow more, with `overwrite` in the same output"
        )
    return found.index(min(within, key=lambda each: each["ratio"]))


class _Measuring:
    """Samples to calibrate and to measure on, and the model in the type that it is served in."""

    def __init__(self, model: nn.Module, samples: Mapping[str, Sequence[Sample]], config: Calibrating) -> None:
        self.model, self.config = model, config
        self.validation = samples["validation"]
        self.rows = make_batches(samples["train"][: config.samples], config.batch_size)
        self.held_out = make_batches(self.validation, config.batch_size, first=config.prefill != "dense")
        base = unwrap(model)
        quickest = quickest_dtype(base.config, device_of(model).type) if base.dtype == torch.float32 else None
        self.type = quickest or base.dtype

    @property
    def dtype(self) -> str:
        return str(self.type).removeprefix("torch.")

    @functools.cached_property
    def served(self) -> nn.Module:
        return self.model if unwrap(self.model).dtype == self.type else copy.deepcopy(self.model).to(self.type)

    def measure(self, methods: tuple[Method, ...]) -> Kept:
        name = describe_methods(methods)
        try:
            return {}, {"method": name, **self._measured(methods)}
        except (CapreseError, RuntimeError) as error:  # RuntimeError: no memory, among others
            return {}, {"method": name, "refused": (str(error).strip().splitlines() or [type(error).__name__])[0]}

    def _measured(self, methods: tuple[Method, ...]) -> dict[str, float]:
        how: dict[str, Any] = {"prefill": self.config.prefill}
        if needs_calibration(methods):
            whole = [batch.whole(self.config.prefill) for batch in self.rows]
            how["calibration"] = calibrate(self.model, methods, whole)
        apply(self.model, methods, **how)
        try:
            kl = HeldOut(self.model, self.held_out, self.config.cache_gigabytes).kl()
        finally:
            remove(self.model)
        apply(self.served, methods, **how)
        try:
            names, label = ("dense", "efficient"), f"search: {describe_methods(methods)}"
            prompt = min((sample.prompt_ids for sample in self.validation), key=len)
            if not rounds_within(self.served, prompt):
                raise CapreseError("no prompt leaves room in this model's context to time its next tokens")
            times = time_to_next_token(self.served, prompt, _TOKENS, names, label)
        finally:
            remove(self.served)
        efficient, dense = times["efficient"]["ttnt_ms"], times["dense"]["ttnt_ms"]
        return {"kl": kl, "ttnt_ms": efficient, "dense_ms": dense, "ratio": efficient / dense}
