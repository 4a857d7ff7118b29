"""A checkpoint whose decoder layers keep their linear weights in few bits, as vLLM loads them: compressed-tensors.

Embedding, head, norms and biases stay as they are.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GraniteMoeHybridConfig, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from caprese.errors import CapreseError
from caprese.files import write_json
from caprese.kernels import GROUP, quantize
from caprese.models import family_of

#: weights: type and bits, and how inputs are rounded, for each token anew; one scale for an output, in 4 bits for 32
#: columns of it
_INPUTS = {"num_bits": 8, "strategy": "token", "dynamic": True, "symmetric": True}
SCHEMES: Mapping[str, Mapping[str, Any]] = {
    "w4a16": {"weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP}},
    "w8a16": {"weights": {"num_bits": 8, "type": "int", "strategy": "channel"}},
    "w8a8": {
        "weights": {"num_bits": 8, "type": "int", "strategy": "channel"},
        "input_activations": {"type": "int", **_INPUTS},
    },
    "fp8": {
        "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
        "input_activations": {"type": "float", **_INPUTS},
    },
}
DESCRIBED = {
    "w4a16": f"the linear weights of its layers in 4 bits by groups of {GROUP}",
    "w8a16": "the linear weights of its layers in 8 bits by row",
    "w8a8": "the linear weights of its layers and, by token, their inputs in 8 bits",
    "fp8": "the linear weights of its layers and, by token, their inputs in float8",
}
_FORMATS = {"w4a16": "pack-quantized", "w8a16": "pack-quantized", "w8a8": "int-quantized", "fp8": "float-quantized"}


def check_scheme(scheme: str) -> None:
    """Whether there is such a scheme, and it can be written here for a model like this.

    Raises:
        CapreseError: with the reason.
    """
    if scheme not in SCHEMES:
        raise CapreseError(f"no checkpoint is of `outtype` {scheme!r}: {', '.join(SCHEMES)}")
    if importlib.util.find_spec("compressed_tensors") is None:
        raise CapreseError(f"{scheme} needs compressed-tensors: pip install 'caprese[compressed]'")


def check_compressible(model: nn.Module, config: PretrainedConfig, scheme: str) -> None:
    """Whether the linear weights of a model of transformers, which may lie on meta, can be stored so.

    Raises:
        CapreseError: with the reason.
    """
    check_scheme(scheme)
    if config.model_type == GraniteMoeHybridConfig.model_type or any(isinstance(m, Conv1D) for m in model.modules()):
        raise CapreseError(f"{config.model_type!r} has more than linear layers, and is not written as {scheme}")
    for name, module in _linears(model, config):
        if scheme == "w4a16" and module.in_features % GROUP:
            raise CapreseError(f"w4a16 has groups of {GROUP} inputs, and {name} has {module.in_features}; use w8a8")


def stored_bytes(model: nn.Module, config: PretrainedConfig, scheme: str | None, size: int) -> int:
    """Of a checkpoint whose other weights take `size` bytes each."""
    total = size * sum(parameter.numel() for parameter in model.parameters())
    if scheme is None:
        return total
    bits = SCHEMES[scheme]["weights"]["num_bits"]
    for _, module in _linears(model, config):
        count, outputs = module.weight.numel(), len(module.weight)
        scales = count // GROUP if scheme == "w4a16" else outputs
        total += count * bits // 8 + scales * size - count * size
    return total


@torch.no_grad()
def save_checkpoint(model: Any, scheme: str | None, path: Path, dtype: torch.dtype) -> None:
    """Write a model of transformers into a directory; it is left as it is.

    Args:
        scheme: of SCHEMES; None keeps all bits.
        dtype: of scales, and of all that keeps its bits.

    Raises:
        CapreseError: see `check_compressible`.
    """
    state = {name: t.to(dtype) for name, t in model.named_parameters()}
    if scheme is not None:
        check_compressible(model, model.config, scheme)
        for name, module in _linears(model, model.config):
            del state[f"{name}.weight"]
            state |= {f"{name}.{key}": t for key, t in _compressed(module.weight, scheme, dtype).items()}
    model.save_pretrained(path, state_dict=state)
    facts = json.loads((path / "config.json").read_text(encoding="utf-8"))
    facts["dtype"] = str(dtype).removeprefix("torch.")
    if scheme is not None:
        inside = family_of(model.config).layers
        kept = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and not n.startswith(f"{inside}.")]
        facts["quantization_config"] = {
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
            "format": _FORMATS[scheme],
            "ignore": kept,
            "config_groups": {"layers": json.loads(_scheme(scheme).model_dump_json())},
        }
    write_json(path / "config.json", facts)


def dense_checkpoints(model: Any, outtypes: Sequence[str], directory: Path) -> dict[str, Path]:
    """A model of transformers as checkpoints for vLLM in a directory, by type: bfloat16, or one of SCHEMES.

    Raises:
        CapreseError: see `check_compressible`.
    """
    found = {kind: directory / "vllm" / kind for kind in outtypes}
    for kind, path in found.items():
        save_checkpoint(model, None if kind == "bfloat16" else kind, path, torch.bfloat16)
    return found


def _linears(model: nn.Module, config: PretrainedConfig) -> Iterator[tuple[str, nn.Linear]]:
    """Those of the decoder layers by name."""
    inside = family_of(config).layers
    for name, module in model.get_submodule(inside).named_modules(prefix=inside):
        if isinstance(module, nn.Linear):
            yield name, module


def _scheme(name: str) -> Any:
    from compressed_tensors.quantization import QuantizationScheme

    return QuantizationScheme(targets=["Linear"], format=_FORMATS[name], **SCHEMES[name])


def _compressed(weight: torch.Tensor, name: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What stands in a checkpoint for a weight [R, C]: codes nearest to it for scales in `dtype`.

    Raises:
        CapreseError: a scale that this type does not hold.
    """
    from compressed_tensors.compressors import BaseCompressor

    wide = weight.detach().float()
    if name == "fp8":
        scales = wide.abs().amax(1, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
    else:
        scales = quantize(wide, SCHEMES[name]["weights"]["num_bits"]).scales.view(len(wide), -1)
    scales = scales.masked_fill(wide.unflatten(1, (scales.shape[1], -1)).abs().amax(-1) == 0, 1).to(dtype)
    if not (scales.isfinite() & (scales.abs() >= torch.finfo(dtype).tiny)).all():
        raise CapreseError(
            f"{name}: a weight is not finite, or {str(dtype).removeprefix('torch.')} does not hold a scale of theirs; "
            "export with dtype float32 or bfloat16"
        )
    codes = BaseCompressor.get_value_from_registry(_FORMATS[name]).compress(
        {"weight": wide, "weight_scale": scales.float()}, _scheme(name)
    )
    return {key: t.contiguous() for key, t in {**codes, "weight_scale": scales}.items()}
