"""A recovered model as an ordinary checkpoint that other engines load: the branch becomes more neurons of the FFN.

What is exported acts on all tokens, prompts too: an ordinary checkpoint knows no phases.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GraniteMoeHybridConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from caprese.efficient_methods import (
    Method,
    Reads,
    StandIn,
    applied_ffns,
    known_methods,
    methods_by_layer,
    phases,
    phases_of,
    stand_ins,
)
from caprese.efficient_methods.passes import Phases
from caprese.errors import CapreseError
from caprese.exports import granite
from caprese.exports.card import card
from caprese.exports.compressed import check_compressible, check_scheme, save_checkpoint, stored_bytes
from caprese.exports.gguf import convert, find_converter
from caprese.exports.neurons import Branch, named_weights, read_branch, round_up, widen
from caprese.files import check_writable, path_of, whole_directory, write_text
from caprese.models import (
    FFN,
    base_of,
    base_parameters,
    count_parameters,
    encode_text,
    family_of,
    find_ffns,
    unwrap,
)
from caprese.progress import say

Format = Literal["hf", "gguf"]
#: gated families whose class in transformers may have FFN biases, by `mlp_bias` in the config
_WITH_BIAS = ("llama", "smollm3")
#: gated families without, which are Llamas in all but name
_AS_LLAMA = ("mistral", "qwen2")
_SENTENCES = ("The sun is a star, and the moon goes around the earth.", "12 * 12 = 144, because 12 * 10 = 120 and")

# Run where caprese cannot be imported: the checkpoint has to stand alone.
_READ_BACK = """\
import sys
sys.modules["caprese"] = None
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
path, given, out, dtype, device = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval().to(device)
with torch.no_grad():
    inputs = {name: t.to(device) for name, t in load_file(given).items()}
    save_file({"logits": model(**inputs).logits.float().cpu()}, out)
"""


def check_exportable(config: PretrainedConfig, methods: Sequence[Method], branch: bool = True) -> None:
    """Whether an ordinary checkpoint can compute what these methods, and a branch, do.

    Raises:
        CapreseError: with the reason.
    """
    for method in methods:
        if why := method.no_checkpoint:
            others = [name for name, kind in known_methods().items() if not kind().no_checkpoint]
            raise CapreseError(
                f"{method.name} {why}, which no ordinary checkpoint does; recover with method {', '.join(others)}, "
                "and export the result"
            )
        if method.trains and method.checkpoint != GraniteMoeHybridConfig.model_type:
            raise CapreseError(f"no checkpoint of transformers that caprese writes holds {method.trains}; not exported")
    family, kind = family_of(config), config.model_type
    mixed = any(method.trains for method in methods)
    if mixed:
        granite.check(config, methods, branch)
    elif not branch or not family.gate:
        return
    elif kind not in (*_WITH_BIAS, *_AS_LLAMA):
        raise CapreseError(
            f"the FFN of {kind!r} has no biases in transformers, and without one a gated FFN has no place for a "
            f"recovery branch; {', '.join([*_WITH_BIAS, *_AS_LLAMA])} and FFNs without a gate have"
        )
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kind == "mistral" and window is not None and window < config.max_position_embeddings:
        kinds.add("sliding_attention")
    if (mixed or kind in _AS_LLAMA) and kinds != {"full_attention"}:
        raise CapreseError(f"this {kind!r} attends to a sliding window, which no Llama checkpoint does; not exported")


def exported_config(
    config: PretrainedConfig, widths: Sequence[int], branch: bool, replaced: Mapping[int, StandIn] | None = None
) -> PretrainedConfig:
    """The config of the checkpoint, for layers of these widths; the narrower ones will be filled up with zeros.

    Raises:
        CapreseError: stand-ins of a size that no checkpoint has.
    """
    width = round_up(max(widths))
    if replaced:
        return granite.make_config(config, width, replaced)
    facts = config.to_dict()
    if branch and config.model_type in _AS_LLAMA:
        known = {key: facts[key] for key in LlamaConfig().to_dict() if key in facts and key != "model_type"}
        made: PretrainedConfig = LlamaConfig(**{**known, "attention_bias": config.model_type == "qwen2"})
    else:
        made = type(config)(**facts)
    setattr(made, family_of(config).width, width)
    if branch and made.model_type in _WITH_BIAS:
        made.mlp_bias = True
    return made


def plan_export(
    config: PretrainedConfig,
    methods: Sequence[Method],
    rank: Callable[[int], int],
    outtype: str | None = None,
) -> dict[str, Any]:
    """What `export` would write, from a config alone.

    Args:
        rank: the branch's in a layer; 0 where there is none.
        outtype: of a checkpoint; None keeps all bits.

    Raises:
        CapreseError: what `export` would refuse.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        before = count_parameters(model)
        sites = find_ffns(model)
        applied = methods_by_layer(methods, len(sites))
        branch = any(rank(index) for index in applied)
        check_exportable(config, methods, branch)
        widths = []
        for site in sites:
            own = applied.get(site.index, [])
            width = Reads(0, 0, site.ffn.width).after(m for m in own if "width" in m.acts_on).total
            if site.index in applied and rank(site.index):
                own_width = width if outtype is None else round_up(width)
                width = own_width + rank(site.index) * (1 if site.ffn.gated else 2)
            widths.append(width)
            for method in own:
                method.install(site, config, Phases(tuple(methods), {}))
        planned = exported_config(config, widths, branch, {at.layer: at for at in stand_ins(model)})
        made = AutoModelForCausalLM.from_config(planned)
    if outtype is not None:
        check_compressible(made, planned, outtype)
    width = _width(planned)
    parameters = sum(p.numel() for p in made.parameters())
    return {
        "architecture": type(made).__name__,
        "ffn_width": width,
        "base_ffn_width": sites[0].ffn.width,
        "parameters": parameters,
        "base_parameters": before,
        "bytes": stored_bytes(made, planned, outtype, (getattr(config, "dtype", None) or torch.float32).itemsize),
        "note": _note(methods, width, sites[0].ffn.width),
    }


def _width(config: PretrainedConfig) -> int:
    """Of the FFNs of a checkpoint."""
    if config.model_type == GraniteMoeHybridConfig.model_type:
        return int(config.shared_intermediate_size)
    return int(getattr(config, family_of(config).width))


def _note(methods: Sequence[Method], width: int, before: int) -> str | None:
    if width < before or not any("width" in method.acts_on for method in methods):
        return None
    return "nothing is saved: all layers are as wide as the widest, so prune all of them (recover with layers all)"


@torch.no_grad()
def export(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    to: str | os.PathLike[str],
    *,
    format: Format = "hf",
    dtype: torch.dtype | None = None,
    outtype: str | None = None,
    overwrite: bool = False,
    measure: Callable[[Path], dict[str, Any] | None] | None = None,
) -> dict[str, Any]:
    """Write static pruning and recovery adapter as an ordinary checkpoint, and read it back without caprese.

    Args:
        model: from `caprese.load`; left as it is.
        to: a directory that is not there yet, or empty.
        format: "hf", or "gguf" for llama.cpp, by its own converter.
        dtype: of the weights written; None as in the base's checkpoint.
        outtype: of the GGUF: f32, f16 (None), bf16, q8_0, and by llama.cpp's quantiser q4_0, q4_k_m, q5_k_m, q6_k. Of a
            checkpoint: w4a16, w8a8, w8a16 or fp8, by compressed-tensors, for vLLM; None keeps all bits.
        measure: what of the written checkpoint is to stand on its card, by kind of prompts: asked before it takes its
            place, with its directory.

    Returns: {"to", "architecture", "ffn_width", "base_ffn_width", "parameters", "base_parameters", "bytes", "dtype",
        "outtype", "note", "largest_logit_difference", "largest_logit", "fidelity", "gguf"}; the difference is to this
        model, all tokens generated, rounding included.

    Raises:
        CapreseError: a method or family that no checkpoint can carry, a target in use, a full disk, or no converter.
    """
    base = unwrap(model)
    parts = {w.layer: read_branch(w.recovery) for w in applied_ffns(model).values()}
    check_exportable(base.config, phases_of(model).methods, any(part is not None for part in parts.values()))
    target = check_target(to, base_of(model).source, overwrite)
    if format == "gguf":
        outtype = outtype or "f16"
        converter = find_converter(outtype)
    elif outtype is not None:
        check_scheme(outtype)
    check_writable(target.parent)
    batch = _batch(base, tokenizer)
    with phases(model, [0] * len(batch["input_ids"])):
        expected = model(**{name: t.to(base.device) for name, t in batch.items()}).logits.float().cpu()
    with whole_directory(target) as room:
        made = room / "hf" if format == "gguf" else room
        kept = dtype or base_of(model).dtype or base.dtype
        facts = {**_write(model, parts, made, kept, None if format == "gguf" else outtype), "outtype": outtype}
        if tokenizer is not None:
            tokenizer.save_pretrained(made)
        say("reading it back in a process without caprese")
        real = batch["attention_mask"].bool()
        facts["largest_logit_difference"] = float((_read_back(made, batch, base) - expected)[real].abs().max())
        facts["largest_logit"] = float(expected[real].abs().max())
        facts["fidelity"] = None if measure is None else measure(made)
        facts["gguf"] = None
        if format == "gguf":
            say("converting it to GGUF")
            facts["gguf"] = f"{target.resolve().name}-{outtype}.gguf"
            convert(converter, made, room / facts["gguf"], str(outtype))
            shutil.rmtree(made)
        write_text(room / "README.md", card(model, facts))
        return {"to": str(target), **facts, "bytes": sum(f.stat().st_size for f in room.iterdir())}


def check_target(to: str | os.PathLike[str], base: str, overwrite: bool) -> Path:
    """Where an export goes. Nothing but an earlier export is ever replaced.

    Raises:
        CapreseError: something else is there, or an earlier export that is not to be replaced.
    """
    target, source = path_of(to), Path(base)
    if not target.exists():
        return target
    if not target.is_dir() or (any(target.iterdir()) and not overwrite):
        raise CapreseError(f"{target} exists; choose another `to`, or give `overwrite=True`")
    for kind, file in (("an adapter", "caprese_config.json"), ("samples", "samples")):
        if next(target.rglob(file), None) is not None:
            raise CapreseError(f"{target} holds {kind}, which `overwrite` does not replace; choose another `to`")
    if source.is_dir() and source.resolve().is_relative_to(target.resolve()):
        raise CapreseError(f"{target} holds the base model, which `overwrite` does not replace; choose another `to`")
    return target


def _write(model: nn.Module, *how: Any) -> dict[str, Any]:
    """The checkpoint itself, with all that was trained."""
    with ExitStack() as stack:
        for at in stand_ins(unwrap(model)):
            stack.enter_context(at.shown())
        return _write_shown(model, *how)


def _write_shown(
    model: nn.Module, parts: Mapping[int, Branch | None], path: Path, dtype: torch.dtype, scheme: str | None
) -> dict[str, Any]:
    """The checkpoint itself, its linear weights by a scheme of compressed-tensors."""
    base = unwrap(model)
    family = family_of(base.config)
    wrappers = {w.layer: w for w in applied_ffns(model).values()}
    pieces, views = [], []
    for i, layer in enumerate(base.get_submodule(family.layers)):
        if i in wrappers:
            views.append(wrappers[i].view)
            own = wrappers[i].transformed.weights()
            pieces.append(widen(views[i], own, parts[i], dtype, apart=scheme is not None))
        else:
            views.append(FFN(getattr(layer, family.ffn) if family.ffn else layer, family))
            pieces.append(views[i].weights())
    branch = any(part is not None for part in parts.values())
    replaced = {at.layer: at for at in stand_ins(base)}
    config = exported_config(base.config, [len(piece.up) for piece in pieces], branch, replaced)
    config.dtype = dtype
    gone = tuple(f"{family.layers}.{i}.{family.attention[0].split('.')[0]}." for i in replaced)
    kept = ((n, p) for n, group, p in base_parameters(model) if group != "ffn" and not n.startswith(gone))
    state = {name: p.detach() for name, p in kept}
    for i, at in replaced.items():
        state |= {f"{family.layers}.{i}.{name}": t for name, t in at.checkpoint_state().items()}
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if scheme is not None:
        check_compressible(made, config, scheme)
    wanted, width = dict(made.named_parameters()), _width(config)
    for i, (view, piece) in enumerate(zip(views, pieces, strict=True)):
        ffn = named_weights(view, piece, width)
        ffn = granite.name_ffn(ffn) if replaced else {f"{family.ffn}.{n}".lstrip("."): t for n, t in ffn.items()}
        state |= {f"{family.layers}.{i}.{name}": t for name, t in ffn.items()}
    for name, like in wanted.items():  # a Llama's biases that this base does not have
        if name.endswith("bias") and name not in state:
            state[name] = torch.zeros(like.shape)
    if wrong := sorted(state.keys() ^ wanted.keys()):
        raise CapreseError(
            f"a {config.model_type} checkpoint has other weights than this model: {', '.join(wrong[:4])}"
        )
    whole = torch.float32 if scheme else dtype  # rounded once
    made.load_state_dict({n: t.to("cpu", whole).contiguous() for n, t in state.items()}, strict=False, assign=True)
    made.tie_weights()
    if base.generation_config is not None:
        made.generation_config = base.generation_config
    save_checkpoint(made, scheme, path, dtype)
    return {
        "architecture": type(made).__name__,
        "ffn_width": width,
        "base_ffn_width": views[0].width,
        "parameters": sum(p.numel() for p in made.parameters()),
        "base_parameters": count_parameters(model),
        "dtype": str(dtype).removeprefix("torch."),
        "note": _note(phases_of(model).methods, width, views[0].width),
    }


def _batch(base: Any, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, torch.Tensor]:
    """Tokens to compare logits on, [2, T], one text longer than the other: pads before it are to change nothing."""
    if tokenizer is None:
        drawn = torch.randint(0, base.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0)).tolist()
        rows = [drawn[0], drawn[1][:17]]
    else:
        rows = [encode_text(tokenizer, text) for text in _SENTENCES]
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def _read_back(path: Path, batch: dict[str, torch.Tensor], base: Any) -> torch.Tensor:
    """Logits of the checkpoint, from a process without caprese."""
    kind = str(base.dtype).removeprefix("torch.")
    with tempfile.TemporaryDirectory(prefix="caprese-") as apart:
        given, out = Path(apart) / "batch.safetensors", Path(apart) / "logits.safetensors"
        save_file(batch, given)
        run = [sys.executable, "-c", _READ_BACK, str(path), str(given), str(out), kind, str(base.device)]
        done = subprocess.run(run, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise CapreseError(f"transformers alone does not load what was exported ({last}); nothing was written")
        return load_file(out)["logits"]
