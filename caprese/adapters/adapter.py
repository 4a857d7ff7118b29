"""A recovery adapter, opened: where it is, what it says of itself, and its tensors, each checked as it is read."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedTokenizerBase

from caprese.adapters.fingerprint import fingerprint
from caprese.adapters.hub import again, download, is_hub_id
from caprese.adapters.lora import deciding, digest_of, lora_config
from caprese.adapters.sidecar import CALIBRATION, CONFIG, FILES, SIDECAR, STAND_INS, WEIGHTS, Sidecar, public_id
from caprese.efficient_methods import Method, methods_by_layer
from caprese.errors import CapreseError
from caprese.files import path_of, read_json, read_sealed, sha256
from caprese.models import base_of, load_base, resolve, unwrap

#: of the run that made it, where they lie beside
RECIPE, REPORT = "recipe.yaml", "report.json"
# as PEFT names their first matrices [r, D]
_BRANCH = re.compile(r"base_model\.model\.(.+\.\d+\..+\.recovery)\.lora_A\.weight")


@dataclass(frozen=True)
class Adapter:
    """A recovery adapter as it was when it was opened: of the hub, every file is of one commit."""

    name: str
    """As it was asked for."""
    directory: Path
    commit: str | None
    """On the hub."""
    sidecar: Sidecar
    branches: dict[str, int]
    """Rank by module name, in the base model."""

    @classmethod
    def open(cls, name: str | os.PathLike[str], revision: str | None = None) -> Adapter:
        """Find an adapter once, and read what it says of itself.

        Args:
            name: a directory that `save` or `recover` wrote, or a hub id: "owner/name", "owner/name@revision".
            revision: on the hub.

        Raises:
            CapreseError: no such adapter, no access, or it is incomplete or damaged.
        """
        directory, commit = _find(name, revision)
        paths = {file: _present(directory / file, name) for file in (SIDECAR, CONFIG, WEIGHTS)}
        try:
            sidecar = Sidecar.model_validate_json(paths[SIDECAR].read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            what = f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ").replace("Value error, ", "")
            raise CapreseError(f"{SIDECAR} of {name} is damaged ({what}); {again(name)}") from error
        config = _read_config(paths[CONFIG], name)
        try:
            shapes = _shapes(paths[WEIGHTS])
        except SafetensorError as error:
            raise _truncated(WEIGHTS, name, error) from error
        branches = {match[1]: shape[0] for key, shape in shapes.items() if (match := _BRANCH.fullmatch(key))}
        if not branches:
            raise CapreseError(f"{WEIGHTS} of {name} holds no branch: not a caprese adapter; run caprese recover")
        adapter = cls(str(name), directory, commit, sidecar, branches)
        if sidecar.digest is None and sidecar.caprese_version != "0.1.0":  # which had none
            raise _altered(SIDECAR, name)
        if sidecar.digest is None:
            adapter._check_unsigned(config, shapes)
        elif sidecar.digest != sidecar.make_digest():
            raise _altered(SIDECAR, name)
        elif sidecar.config_sha256 != digest_of(config):
            raise _altered(CONFIG, name)
        return adapter

    def __str__(self) -> str:
        return self.name

    @property
    def digest(self) -> str:
        """Of all that decides a result: what was measured with one adapter is not another's."""
        return self.sidecar.make_digest()

    @cached_property
    def methods(self) -> tuple[Method, ...]:
        """The methods, in the order in which they act.

        Raises:
            CapreseError: one is unknown here, or damaged.
        """
        return self.sidecar.make_methods()

    @property
    def ranks(self) -> dict[int, int]:
        """Rank by layer."""
        return {int(re.findall(r"\.(\d+)\.", name)[0]): rank for name, rank in self.branches.items()}

    @property
    def files(self) -> list[str]:
        """The names of its own files."""
        left_out = {CALIBRATION: self.sidecar.calibration_sha256, STAND_INS: self.sidecar.mixers_sha256}
        return [name for name in FILES if name not in left_out or left_out[name] is not None]

    def weights(self) -> dict[str, torch.Tensor]:
        """The branches' tensors by PEFT's names: lora_A [r, D], lora_B [D, r].

        Raises:
            CapreseError: the file is not whole, not finite, or not as it was saved.
        """
        return self._tensors(WEIGHTS, self.sidecar.weights_sha256)

    def calibration(self) -> dict[str, torch.Tensor]:
        """What methods chose from samples, as `apply` takes it; empty where none does.

        Raises:
            CapreseError: as of `weights`.
        """
        return self._tensors(CALIBRATION, self.sidecar.calibration_sha256)

    def stand_ins(self) -> dict[str, torch.Tensor]:
        """What was trained in the place of parts of the model, by "layer.name"; empty where nothing does.

        Raises:
            CapreseError: as of `weights`.
        """
        return self._tensors(STAND_INS, self.sidecar.mixers_sha256)

    def has_branches(self) -> bool:
        """Whether a branch gives anything; without FFN methods, they stay at zero.

        Raises:
            CapreseError: as of `weights`.
        """
        return any(bool(tensor.any()) for name, tensor in self.weights().items() if ".lora_B." in name)

    def check(self) -> None:
        """Read every tensor.

        Raises:
            CapreseError: naming the file that is not whole, not finite, or not as it was saved.
        """
        self.weights(), self.calibration(), self.stand_ins()

    @property
    def recipe(self) -> Path | None:
        """The recipe of the run that made it, where it lies beside."""
        path = self.directory / RECIPE
        return path if path.is_file() else None

    def report(self) -> dict[str, Any] | None:
        """The report of the run that made it, where it lies beside.

        Raises:
            CapreseError: it is damaged, or of another adapter, or missing beside a recipe.
        """
        path, remedy = self.directory / REPORT, f"run caprese recover again, or delete it and {RECIPE}"
        first = self.sidecar.caprese_version == "0.1.0"  # whose reports have no digest of themselves
        if not path.is_file():
            if self.recipe is not None and not first:  # a run leaves both, and this last
                raise CapreseError(f"{REPORT} of {self} is missing beside {RECIPE}; run caprese recover again")
            return None
        report = (read_json if first else read_sealed)(path, remedy, f"{REPORT} of {self}")
        files = report.get("files", {})
        if not isinstance(files, dict) or not all(isinstance(digest, str) for digest in files.values()):
            raise CapreseError(f"{REPORT} of {self} is damaged (its files are no digests by name); {remedy}")
        if report.get("adapter_digest") != self.digest:
            raise CapreseError(f"{REPORT} of {self} is of another adapter than the one beside it; {remedy}")
        return report

    def base_revision(self, base: str) -> str | None:
        """The revision the adapter was made for, if `base` is the hub's name of its base."""
        known = resolve(base)
        return self.sidecar.base.revision if known.model_id == known.source == self.sidecar.base.id else None

    def load_base(
        self, base: str | None = None, *, revision: str | None = None, **how: Any
    ) -> tuple[nn.Module, PreTrainedTokenizerBase]:
        """`load_base`, of a hub id at the revision the adapter was made for, if no other is asked for.

        Args:
            base: a name of it, if not the one it was made with.
            how: see `load_base`.

        Raises:
            CapreseError: see `load_base`.
        """
        base = base or self.sidecar.base.name
        return load_base(base, revision=revision or self.base_revision(base), **how)

    def check_base(self, model: nn.Module) -> None:
        """Refuse a base with other weights than the adapter was made for.

        Raises:
            CapreseError: naming the part that differs.
        """
        made_for, found = self.sidecar.base, fingerprint(model)
        # of a base loaded in 4 or 8 bit, embeddings and norms are what they were
        packed = getattr(unwrap(model), "is_quantized", False)
        wrong = [g for g, known in made_for.fingerprint.items() if found[g] != known and (g == "rest" or not packed)]
        half = unwrap(model).dtype == torch.float16
        if wrong:
            base = base_of(model)
            given = f"{public_id(base.model_id)}@{base.revision}" if base.revision else public_id(base.model_id)
            raise CapreseError(
                f"this adapter was made for {made_for}, and the base given ({given}) has other weights "
                f"({', '.join(wrong)}); load that base, or recover this one"
                + (" (in float16 weights of a float32 checkpoint differ: try bfloat16)" if half else "")
            )

    def _tensors(self, file: str, digest: str | None) -> dict[str, torch.Tensor]:
        if digest is None:
            return {}
        path = _present(self.directory / file, self.name)
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise _truncated(file, self.name, error) from error
        if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
            raise CapreseError(f"{file} of {self} holds NaN or infinity; {again(self)}")
        if sha256(path) != digest:
            raise _altered(file, self.name)
        return tensors

    def _check_unsigned(self, config: dict[str, Any], shapes: dict[str, list[int]]) -> None:
        """What an adapter without a digest (of caprese 0.1.0) says of itself, by its tensors: those have one."""
        bias = any(name.endswith(".lora_B.bias") for name in shapes)
        made, found = deciding(lora_config(self.branches, bias)), deciding(config)
        if wrong := sorted(k for k in made.keys() | found.keys() if made.get(k) != found.get(k)):
            raise _altered(CONFIG, self.name, ", ".join(f"{key} {config.get(key)}" for key in wrong))
        try:
            methods = self.methods
        except CapreseError:  # unknown or damaged: said where they are asked for
            return
        # "all" and "first-half" are of a base, and how many layers it has is not known here
        layers, last = set(self.ranks), max(self.ranks)
        if not any(_acted_on(methods, count) == layers for count in range(last + 1, 2 * last + 3)):
            what = f"layers {', '.join(str(m.layers) for m in methods)}, but branches in {sorted(layers)}"
            raise _altered(SIDECAR, self.name, what)


def _find(name: str | os.PathLike[str], revision: str | None) -> tuple[Path, str | None]:
    """The directory with an adapter's files, and on the hub their commit."""
    local = path_of(name)
    if str(name) and local.is_dir():
        return local, None
    repo, _, at = str(name).partition("@")
    if not is_hub_id(repo):
        raise CapreseError(f"no adapter at {str(name)!r}: neither a directory nor a hub id like 'owner/name'")
    directory = download(repo, revision or at or None, (*FILES, RECIPE, REPORT))
    return directory, directory.name


def _present(path: Path, name: str | os.PathLike[str]) -> Path:
    if not path.is_file():
        raise CapreseError(f"{name} holds no {path.name}: not a (finished) caprese adapter; run caprese recover")
    return path


def _read_config(path: Path, name: str | os.PathLike[str]) -> dict[str, Any]:
    """PEFT's."""
    config = read_json(path, again(name), f"{CONFIG} of {name}")
    if not isinstance(config.get("r"), int):
        raise CapreseError(f"{CONFIG} of {name} is damaged (its r is no number); {again(name)}")
    return config


def _shapes(path: Path) -> dict[str, list[int]]:
    """Of the tensors of a file, from its header."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118


def _acted_on(methods: Sequence[Method], count: int) -> set[int] | None:
    """The layers of a model of `count` layers; None if the methods are for another number."""
    try:
        return set(methods_by_layer(methods, count))
    except CapreseError:
        return None


def _altered(file: str, name: str | os.PathLike[str], what: str = "") -> CapreseError:
    return CapreseError(f"{file} of {name} was altered after it was saved{what and f' ({what})'}; {again(name)}")


def _truncated(file: str, name: str | os.PathLike[str], error: Exception) -> CapreseError:
    return CapreseError(f"{file} of {name} is truncated or damaged ({error}); {again(name)}")
