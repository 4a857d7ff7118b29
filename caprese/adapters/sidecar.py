"""caprese_config.json: what stands beside PEFT's files, and what was done to which base."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, field_validator

from caprese.efficient_methods import Method, Prefill, compose, known_methods, make_method
from caprese.errors import CapreseError
from caprese.files import path_of

SIDECAR = "caprese_config.json"
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
CALIBRATION = "caprese_calibration.safetensors"
STAND_INS = "caprese_mixers.safetensors"
#: all that makes an adapter
FILES = (WEIGHTS, CONFIG, CALIBRATION, STAND_INS, SIDECAR)


Group = Literal["ffn", "attention", "rest"]


class BaseFacts(BaseModel):
    """The base an adapter was made for."""

    name: str
    id: str
    revision: str | None
    fingerprint: dict[Group, str]

    @field_validator("fingerprint")
    @classmethod
    def _whole(cls, value: dict[Group, str]) -> dict[Group, str]:
        if missing := [group for group in get_args(Group) if not re.fullmatch("[0-9a-f]{32}", value.get(group, ""))]:
            raise ValueError(f"no digest of {', '.join(missing)}")
        return value

    def __str__(self) -> str:
        return f"{self.id}@{self.revision}" if self.revision else self.id


def _is_named(facts: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(facts.get("name"), str):
        raise ValueError("a method has no name")
    return facts


#: a method's name and settings
NamedFacts = Annotated[dict[str, Any], AfterValidator(_is_named)]


class Sidecar(BaseModel):
    """caprese_config.json: what was done to which base."""

    model_config = ConfigDict(extra="allow")

    caprese_version: str
    methods: list[NamedFacts]
    reselect_every: int | None = None
    prefill: Prefill = "dense"
    base: BaseFacts
    config_sha256: str | None = None
    """Of what decides a result in PEFT's configuration; adapters of caprese 0.1.0 have neither this nor `digest`."""
    weights_sha256: str
    calibration_sha256: str | None = None
    """Of the file with what methods chose from samples, where one does."""
    mixers_sha256: str | None = None
    """Of the file with what stands in for attentions, where something does."""

    digest: str | None = None
    """As `make_digest` found it when the adapter was saved."""

    def make_digest(self) -> str:
        """Of all that decides a result: what was measured with one adapter is not another's."""
        files = [self.weights_sha256, self.calibration_sha256, self.mixers_sha256]
        files += [] if self.config_sha256 is None else [self.config_sha256]
        files += [] if self.prefill == "dense" else [self.prefill]
        facts = [self.base.fingerprint, self.methods, self.reselect_every, *files]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]

    def make_methods(self) -> tuple[Method, ...]:
        """The methods, in the order in which they act.

        Raises:
            CapreseError: unknown, damaged, or no longer composable.
        """
        for facts in self.methods:
            if (name := facts.get("name")) not in known_methods():
                raise CapreseError(
                    f"this adapter needs the method {name!r}, unknown here; install the package that brings it, or "
                    "upgrade caprese"
                )
        try:
            return compose([make_method(facts) for facts in self.methods])
        except CapreseError as error:
            raise CapreseError(f"{SIDECAR} is damaged ({error}); fetch or make the adapter again") from error


def public_id(name: str) -> str:
    """A hub id as it is; of a local path only the last part, so that nobody's directories end in a file."""
    path = path_of(name)
    return path.resolve().name if name and (name.startswith(("/", ".", "~")) or path.exists()) else name
