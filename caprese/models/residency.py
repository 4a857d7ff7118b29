"""Where the decoder layers of a base are while they do not run: whole in memory, in parts over processes, or on disk.

Sharded: each process holds a part of every layer (PyTorch's `fully_shard`, FSDP2), gathered while the layer runs, also
on the way back. Streamed: a layer is read from the checkpoint each time it runs, forward alone. Embeddings, the last
norm and the head are whole in both, and so are adapters and what is trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from accelerate import PartialState, init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, GenerationConfig

from caprese.errors import CapreseError
from caprese.files import read_json
from caprese.models.families import family_of, unwrap

Residency = Literal["whole", "sharded", "streamed"]
T = TypeVar("T")
# on a model that is not whole, and on the decoder layers of one that is streamed
_KIND, _STREAM = "caprese_residency", "caprese_stream"


def residency_of(model: nn.Module) -> Residency:
    """Where the decoder layers of a model are."""
    kind: Residency = vars(unwrap(model)).get(_KIND, "whole")
    return kind


def share_of(model: nn.Module) -> tuple[int, int]:
    """This process's number and how many share passes through a model: a sharded one runs in all of them at once, on
    the same."""
    world = PartialState()
    return (0, 1) if residency_of(model) == "sharded" else (world.process_index, world.num_processes)


def dealt(model: nn.Module, work: Sequence[T]) -> list[tuple[T, bool]]:
    """This process's part of some passes through a model, and whether each counts: all run as many through a sharded
    one, and what fills up does not."""
    world = PartialState()
    own = [(each, True) for each in work[world.process_index :: world.num_processes]]
    if residency_of(model) == "sharded":
        own += [(work[-1], False)] * (-(-len(work) // world.num_processes) - len(own))
    return own


@contextmanager
def resident(layer: nn.Module) -> Iterator[None]:
    """Inside, a decoder layer's weights are whole and in place; all processes of a sharded model enter together."""
    if isinstance(layer, FSDPModule):
        keep = getattr(layer, "set_reshard_after_forward", lambda _: None)  # older torch gathers it for each pass
        keep(False)
        layer.unshard()
        try:
            yield
        finally:
            keep(True)
            layer.reshard()
    elif (stream := vars(layer).get(_STREAM)) is not None:
        with stream.held():
            yield
    else:
        yield


def whole(model: nn.Module, name: str, parameter: torch.Tensor) -> torch.Tensor:
    """The values of a base parameter, by its name in the bare model, wherever they are."""
    if isinstance(parameter, DTensor):
        return parameter.full_tensor()
    checkpoint: Checkpoint | None = vars(unwrap(model)).get("caprese_checkpoint")
    layers = f"{family_of(unwrap(model).config).layers}."
    return parameter if checkpoint is None or not name.startswith(layers) else checkpoint.read(name)


class Checkpoint:
    """The tensors of a checkpoint in safetensors, by the names they have in the model.

    Args:
        source: a directory, or a hub id.

    Raises:
        CapreseError: it holds no safetensors.
    """

    def __init__(self, source: str, revision: str | None, prefix: str) -> None:
        path = Path(source)
        if not path.is_dir():
            path = Path(snapshot_download(source, revision=revision, allow_patterns=["model*.safetensors*", "*.json"]))
        index = path / "model.safetensors.index.json"
        if index.is_file():
            files = sorted(set(read_json(index, "get the model again").get("weight_map", {}).values()))
        else:
            files = ["model.safetensors"]
        if not files or any(not (path / file).is_file() for file in files):
            raise CapreseError(f"{source} holds no whole safetensors checkpoint; save it with save_pretrained")
        self.directory, self.prefix = path, prefix
        self._file: dict[str, Path] = {}
        for file in files:
            with safe_open(path / file, "pt") as opened:
                self._file |= dict.fromkeys(opened.keys(), path / file)

    def __contains__(self, name: str) -> bool:
        return self._key(name) is not None

    def _key(self, name: str) -> str | None:
        """What a base without its head calls a parameter has no prefix."""
        return next((key for key in (name, name.removeprefix(f"{self.prefix}.")) if key in self._file), None)

    def read(self, name: str) -> torch.Tensor:
        """One tensor, read anew."""
        key = self._key(name)
        if key is None:
            raise CapreseError(f"the checkpoint holds no {name}; load the base whole (`residency`)")
        with safe_open(self._file[key], "pt") as opened:
            found: torch.Tensor = opened.get_tensor(key)
            return found


class _Stream:
    """A decoder layer's weights, read when it runs."""

    def __init__(self, layer: nn.Module, prefix: str, checkpoint: Checkpoint) -> None:
        self.checkpoint, self.depth = checkpoint, 0
        self.names = {name: f"{prefix}.{name}" for name, _ in layer.named_parameters()}
        self.parameters = dict(layer.named_parameters())
        self._away()
        layer.register_forward_pre_hook(lambda *_: self._enter(), prepend=True)
        layer.register_forward_hook(lambda *_: self._leave(), always_call=True)

    @contextmanager
    def held(self) -> Iterator[None]:
        self._enter()
        try:
            yield
        finally:
            self._leave()

    def _enter(self) -> None:
        self.depth += 1
        if self.depth == 1:
            for name, parameter in self.parameters.items():
                # copied: what is read is a view of the file
                parameter.data = self.checkpoint.read(self.names[name]).to(parameter, copy=True)

    def _leave(self) -> None:
        self.depth -= 1
        if self.depth == 0:
            self._away()

    def _away(self) -> None:
        """What stands there meanwhile has their size, type and device, and holds one number, which is none."""
        for parameter in self.parameters.values():
            nothing = torch.full((), torch.nan, dtype=parameter.dtype, device=parameter.device)
            parameter.data = nothing.expand(parameter.shape)


def load_apart(
    source: str, config: Any, dtype: torch.dtype | str, device: str, kind: Residency, revision: str | None = None
) -> nn.Module:
    """A base whose layers are sharded or streamed, without ever holding more than one of them whole.

    Raises:
        CapreseError: a checkpoint that is not whole, or parameters that it does not have.
    """
    world = PartialState(cpu=device == "cpu") if kind == "sharded" else None
    if world is not None and world.num_processes == 1:
        raise CapreseError("a base is sharded over several processes, and this is one: start them with torchrun")
    with init_empty_weights(include_buffers=False):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    layers = family_of(config).layers
    checkpoint = Checkpoint(source, revision, model.base_model_prefix)
    tied = set(getattr(model, "_tied_weights_keys", None) or ()) if config.tie_word_embeddings else set()
    for name, parameter in list(model.named_parameters()):
        if not name.startswith(f"{layers}.") and name not in tied:
            set_module_tensor_to_device(model, name, device, checkpoint.read(name).to(parameter.dtype))
    model.tie_weights()
    model.requires_grad_(False).eval()
    for name, buffer in model.named_buffers():
        set_module_tensor_to_device(model, name, device, buffer)
    mesh = None
    if world is not None:
        mesh = init_device_mesh(torch.device(device).type, (world.num_processes,))
    for index, layer in enumerate(model.get_submodule(layers)):
        prefix = f"{layers}.{index}"
        missing = next((n for n, _ in layer.named_parameters() if f"{prefix}.{n}" not in checkpoint), None)
        if missing is not None:
            raise CapreseError(f"{source} holds no {prefix}.{missing}; load the base whole (`residency`)")
        for name, parameter in list(layer.named_parameters()):
            if kind == "sharded":
                _put(layer, name, checkpoint.read(f"{prefix}.{name}").to(device, parameter.dtype))
            else:
                nothing = torch.full((), torch.nan, dtype=parameter.dtype, device=device)
                _put(layer, name, nothing.expand(parameter.shape))
        if kind == "sharded":
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)  # a root keeps its weights unless told
        else:
            vars(layer)[_STREAM] = _Stream(layer, prefix, checkpoint)
    vars(model)[_KIND], vars(model)["save_pretrained"] = kind, _refuse_to_save
    if kind == "streamed":
        vars(model)["caprese_checkpoint"] = checkpoint
    if (checkpoint.directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.directory)
    return model


def _refuse_to_save(*_: Any, **__: Any) -> None:
    raise CapreseError("a base whose layers are not in memory is not saved; its checkpoint is, or load it whole")


def _put(layer: nn.Module, name: str, value: torch.Tensor) -> None:
    path, _, attribute = name.rpartition(".")
    setattr(layer.get_submodule(path), attribute, nn.Parameter(value, requires_grad=False))
