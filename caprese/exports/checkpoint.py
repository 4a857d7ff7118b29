"""A recovered model as an ordinary checkpoint that other engines load: the branch becomes more neurons of the FFN.

Exact, not fitted. With a gate: gate row 0 with a bias b for which act(b) = 1, up row L', down column R', so that the
neuron adds act(b) (L' x) R'. Without one: two neurons for each of the branch's, since act(z) - act(-z) = z for ReLU,
GELU and SiLU. What is exported acts on all tokens, prompts too: an ordinary checkpoint knows no phases.

A hybrid with Mamba layers becomes a GraniteMoeHybrid without experts, whose mixers are ours. Its FFN has no biases.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GraniteMoeHybridConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from caprese.adapters import public_id
from caprese.efficient_methods import (
    Mamba,
    Method,
    Mixer,
    Static,
    applied_ffns,
    describe_methods,
    methods_by_layer,
    phases,
    phases_of,
    replacements,
)
from caprese.efficient_methods.mamba.mixer import KERNEL
from caprese.errors import CapreseError
from caprese.files import check_writable, put_in_place, unwritable, write_text
from caprese.inference.fused import branch_of
from caprese.kernels.scan import CHUNK
from caprese.models import (
    FFN,
    Weights,
    base_of,
    base_parameters,
    base_terms,
    count_parameters,
    encode_text,
    family_of,
    find_ffns,
    unwrap,
)
from caprese.models.attention import read_attention

Format = Literal["hf", "gguf"]
#: a branch as `branch_of` gives it: L' [r, D], R' [D, r], bias [D] or None
Branch = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
#: gated families whose class in transformers may have FFN biases, by `mlp_bias` in the config
_WITH_BIAS = ("llama", "smollm3")
#: gated families without, which are Llamas in all but name
_AS_LLAMA = ("mistral", "qwen2")
#: families whose attention, norms and FFN GraniteMoeHybrid has
_AS_GRANITE = ("llama", *_AS_LLAMA)
# widths are filled up with zero neurons to a multiple of it: what 4-bit blocks and tensor parallelism divide
_MULTIPLE = 32
_SENTENCES = ("The sun is a star, and the moon goes around the earth.", "12 * 12 = 144, because 12 * 10 = 120 and")

# Run where caprese cannot be imported: the checkpoint has to stand alone.
_READ_BACK = """\
import sys
sys.modules["caprese"] = None
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
path, ids, out, dtype, device = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval().to(device)
with torch.no_grad():
    save_file({"logits": model(load_file(ids)["ids"].to(device)).logits.float().cpu()}, out)
"""


def check_exportable(config: PretrainedConfig, methods: Sequence[Method], branch: bool = True) -> None:
    """Whether an ordinary checkpoint can compute what these methods, and a branch, do.

    Raises:
        CapreseError: with the reason.
    """
    mixed = any(method.name == "mamba" for method in methods)
    for method in methods:
        if method.name not in ("static", "none", "mamba"):
            why = "packs the FFN weights" if "weights" in method.acts_on else "decides anew for each prompt or token"
            raise CapreseError(
                f"{method.name} {why}, which no ordinary checkpoint does; recover with --method static, none or mamba, "
                "and export the result"
            )
    family, kind = family_of(config), config.model_type
    if mixed and (kind not in _AS_GRANITE or getattr(config, "mlp_bias", False)):
        raise CapreseError(
            f"transformers' GraniteMoeHybrid, which holds hybrids, has no place for what {kind!r} has beside Llama; "
            f"{', '.join(_AS_GRANITE)} without FFN biases fit"
        )
    if mixed and branch:
        raise CapreseError(
            "the FFN of transformers' GraniteMoeHybrid, which holds hybrids, has no biases and so no place for a "
            "recovery branch; a hybrid by --method mamba alone, or with static but without an adapter, is exported"
        )
    if not mixed and (not branch or not family.gate):
        return
    if not mixed and kind not in (*_WITH_BIAS, *_AS_LLAMA):
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
    config: PretrainedConfig, widths: Sequence[int], branch: bool, mixers: Mapping[int, Mixer] | None = None
) -> PretrainedConfig:
    """The config of the checkpoint, for layers of these widths; the narrower ones will be filled up with zeros.

    Raises:
        CapreseError: mixers of a size that a GraniteMoeHybrid cannot have.
    """
    facts = config.to_dict()
    if mixers:
        return _hybrid_config(facts, -(-max(widths) // _MULTIPLE) * _MULTIPLE, mixers)
    if branch and config.model_type in _AS_LLAMA:
        known = {key: facts[key] for key in LlamaConfig().to_dict() if key in facts and key != "model_type"}
        made: PretrainedConfig = LlamaConfig(**{**known, "attention_bias": config.model_type == "qwen2"})
    else:
        made = type(config)(**facts)
    setattr(made, family_of(config).width, -(-max(widths) // _MULTIPLE) * _MULTIPLE)
    if branch and made.model_type in _WITH_BIAS:
        made.mlp_bias = True
    return made


def _hybrid_config(facts: dict[str, Any], width: int, mixers: Mapping[int, Mixer]) -> PretrainedConfig:
    mixer = next(iter(mixers.values()))
    if len(mixers) == facts["num_hidden_layers"]:
        raise CapreseError(
            "transformers' GraniteMoeHybrid does not generate without an attention layer; keep one (--keep-attention)"
        )
    if mixer.inner % facts["hidden_size"]:
        raise CapreseError(
            f"a GraniteMoeHybrid's mixers are a multiple of the hidden size {facts['hidden_size']} wide, and these "
            f"{mixer.inner}; not exported"
        )
    known = {key: facts[key] for key in GraniteMoeHybridConfig().to_dict() if key in facts and key != "model_type"}
    head_dim = facts.get("head_dim") or facts["hidden_size"] // facts["num_attention_heads"]
    own = {
        "head_dim": head_dim,
        "attention_multiplier": head_dim**-0.5,
        "attention_bias": bool(facts.get("attention_bias")) or facts["model_type"] == "qwen2",
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "shared_intermediate_size": width,
        "position_embedding_type": "rope",
        "layer_types": [
            "linear_attention" if i in mixers else "full_attention" for i in range(facts["num_hidden_layers"])
        ],
        "mamba_n_heads": mixer.heads,
        "mamba_n_groups": mixer.heads,
        "mamba_d_head": mixer.size,
        "mamba_d_state": mixer.size,
        "mamba_d_conv": KERNEL,
        "mamba_expand": mixer.inner // facts["hidden_size"],
        "mamba_chunk_size": CHUNK,
        "mamba_conv_bias": True,
        "mamba_proj_bias": True,
    }
    return GraniteMoeHybridConfig(**{**known, **own})


def plan_export(config: PretrainedConfig, methods: Sequence[Method], rank: Callable[[int], int]) -> dict[str, Any]:
    """What `export` would write, from a config alone.

    Args:
        rank: the branch's in a layer; 0 where there is none.

    Raises:
        CapreseError: what `export` would refuse.
    """
    mamba = next((method for method in methods if isinstance(method, Mamba)), None)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        sites = find_ffns(model)
        applied = methods_by_layer(methods, len(sites))
        branch = any(rank(index) for index in applied)
        check_exportable(config, methods, branch)
        widths, mixers = [], {}
        for site in sites:
            width = site.ffn.width
            for method in applied.get(site.index, []):
                width = method.kept(width) if isinstance(method, Static) else width
            if site.index in applied:
                width += rank(site.index) * (1 if site.ffn.gated else 2)
            widths.append(width)
            if mamba is not None and site.index in mamba.layer_indices(len(sites)):
                mixers[site.index] = Mixer(read_attention(site.attention(), config), 1e-6, 0)
        planned = exported_config(config, widths, branch, mixers)
        made = AutoModelForCausalLM.from_config(planned)
    width = planned.shared_intermediate_size if mixers else getattr(planned, family_of(config).width)
    parameters = sum(p.numel() for p in made.parameters())
    return {
        "architecture": type(made).__name__,
        "ffn_width": width,
        "base_ffn_width": sites[0].ffn.width,
        "parameters": parameters,
        "base_parameters": count_parameters(model),
        "bytes": parameters * (getattr(config, "dtype", None) or torch.float32).itemsize,
        "note": _note(methods, width, sites[0].ffn.width),
    }


def _note(methods: Sequence[Method], width: int, before: int) -> str | None:
    if width < before or not any(isinstance(method, Static) for method in methods):
        return None
    return "nothing is saved: all layers are as wide as the widest, so prune all of them (recover --layers all)"


@torch.no_grad()
def export(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    to: str | os.PathLike[str],
    *,
    format: Format = "hf",
    dtype: torch.dtype | None = None,
    outtype: str = "f16",
    overwrite: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Write static pruning and recovery adapter as an ordinary checkpoint, and read it back without caprese.

    Args:
        model: from `caprese.load`; left as it is.
        to: a directory that is not there yet, or empty.
        format: "hf", or "gguf" for llama.cpp, by its own converter.
        dtype: of the weights written; None as in the base's checkpoint.
        outtype: of the GGUF: f32, f16, bf16, q8_0.

    Returns: {"to", "architecture", "ffn_width", "base_ffn_width", "parameters", "base_parameters", "bytes", "dtype",
        "note", "largest_logit_difference", "largest_logit", "gguf"}; the difference is to this model, all tokens
        generated.

    Raises:
        CapreseError: a method or family that no checkpoint can carry, a target in use, a full disk, or no converter.
    """
    base = unwrap(model)
    parts = {w.layer: _branch(w.recovery) for w in applied_ffns(model).values()}
    check_exportable(base.config, phases_of(model).methods, any(part is not None for part in parts.values()))
    target = Path(to).expanduser()
    _check_target(target, Path(base_of(model).source), overwrite)
    converter = _converter() if format == "gguf" else []
    check_writable(target.parent)
    ids = _ids(base, tokenizer)
    with phases(model, [0] * len(ids)):
        expected = model(input_ids=ids.to(base.device)).logits.float().cpu()
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as name:
            made = Path(name) / "hf"
            facts = _write(model, parts, made, dtype or base_of(model).dtype or base.dtype)
            if tokenizer is not None:
                tokenizer.save_pretrained(made)
            say("reading it back with transformers alone")
            facts["largest_logit_difference"] = float((_read_back(made, ids, base) - expected).abs().max())
            facts["largest_logit"] = float(expected.abs().max())
            facts["gguf"] = None
            if format == "gguf":
                say("converting it to GGUF")
                facts["gguf"] = f"{target.resolve().name}-{outtype}.gguf"
                _convert(converter, made, Path(name) / "gguf" / facts["gguf"], outtype)
                made = Path(name) / "gguf"
            write_text(made / "README.md", _card(model, facts))
            for file in made.iterdir():
                put_in_place(file, file)
            facts = {"to": str(target), **facts, "bytes": sum(f.stat().st_size for f in made.iterdir())}
            _take_place(made, target, Path(name) / "before")
    except OSError as error:
        raise unwritable(target, error) from error
    return facts


def _branch(recovery: nn.Module) -> Branch | None:
    """What the slot adds, if it adds anything."""
    found = branch_of(recovery)
    return None if found is None or not any(part is not None and part.any() for part in found[1:]) else found


def _check_target(target: Path, source: Path, overwrite: bool) -> None:
    """Nothing but an earlier export is ever replaced."""
    if not target.exists():
        return
    if not target.is_dir() or (any(target.iterdir()) and not overwrite):
        raise CapreseError(f"{target} exists; choose another --to, or give --overwrite")
    for kind, file in (("an adapter", "caprese_config.json"), ("samples", "samples")):
        if next(target.rglob(file), None) is not None:
            raise CapreseError(f"{target} holds {kind}, which --overwrite does not replace; choose another --to")
    if source.is_dir() and source.resolve().is_relative_to(target.resolve()):
        raise CapreseError(f"{target} holds the base model, which --overwrite does not replace; choose another --to")


def _take_place(made: Path, target: Path, before: Path) -> None:
    """`made` becomes `target`; what was there goes to `before`, or stays if that fails."""
    if target.exists():
        os.replace(target, before)
    try:
        os.replace(made, target)
    except OSError:
        if before.exists():
            os.replace(before, target)
        raise


def _write(model: nn.Module, parts: Mapping[int, Branch | None], path: Path, dtype: torch.dtype) -> dict[str, Any]:
    """The checkpoint itself."""
    base = unwrap(model)
    family = family_of(base.config)
    wrappers = {w.layer: w for w in applied_ffns(model).values()}
    pieces, views = [], []
    for i, layer in enumerate(base.get_submodule(family.layers)):
        if i in wrappers:
            views.append(wrappers[i].view)
            pieces.append(_widen(views[i], wrappers[i].transformed.weights(), parts[i], dtype))
        else:
            views.append(FFN(getattr(layer, family.ffn) if family.ffn else layer, family))
            pieces.append(views[i].weights())
    branch = any(part is not None for part in parts.values())
    mixers = {at.layer: at.mixer for at in replacements(base)}
    config = exported_config(base.config, [len(piece.up) for piece in pieces], branch, mixers)
    config.dtype = dtype
    gone = tuple(f"{family.layers}.{i}.self_attn." for i in mixers)
    kept = ((n, p) for n, group, p in base_parameters(model) if group != "ffn" and not n.startswith(gone))
    state = {name: p.detach() for name, p in kept}
    for i, mixer in mixers.items():
        state |= {f"{family.layers}.{i}.mamba.{name}": t for name, t in mixer.unshared().items()}
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(config, dtype=dtype)
    wanted = dict(made.named_parameters())
    for i, (view, piece) in enumerate(zip(views, pieces, strict=True)):
        width = config.shared_intermediate_size if mixers else getattr(config, family.width)
        if mixers:
            gate, up, down = (_named(view, piece, width)[f"{n}_proj.weight"] for n in ("gate", "up", "down"))
            place = f"{family.layers}.{i}.shared_mlp"
            state |= {f"{place}.input_linear.weight": torch.cat([gate, up]), f"{place}.output_linear.weight": down}
            continue
        place = ".".join(part for part in (family.layers, str(i), family.ffn) if part)
        state |= {f"{place}.{key}": value for key, value in _named(view, piece, width).items()}
    for name, like in wanted.items():  # a Llama's biases that this base does not have
        if name.endswith("bias") and name not in state:
            state[name] = torch.zeros(like.shape)
    if wrong := sorted(state.keys() ^ wanted.keys()):
        raise CapreseError(
            f"a {config.model_type} checkpoint has other weights than this model: {', '.join(wrong[:4])}"
        )
    made.load_state_dict({n: t.to("cpu", dtype).contiguous() for n, t in state.items()}, strict=False, assign=True)
    made.tie_weights()
    if base.generation_config is not None:
        made.generation_config = base.generation_config
    made.save_pretrained(path)
    return {
        "architecture": type(made).__name__,
        "ffn_width": width,
        "base_ffn_width": views[0].width,
        "parameters": sum(p.numel() for p in made.parameters()),
        "base_parameters": count_parameters(model),
        "dtype": str(dtype).removeprefix("torch."),
        "note": _note(phases_of(model).methods, width, views[0].width),
    }


def _widen(ffn: FFN, w: Weights, branch: Branch | None, dtype: torch.dtype) -> Weights:
    """The FFN with its branch as more neurons, in float64."""
    if branch is None:
        return w
    left, right = branch[0].detach().double(), branch[1].detach().double()
    extra = None if branch[2] is None else branch[2].detach().double()
    w = Weights(*(None if t is None else t.detach().double() for t in w))  # type: ignore[arg-type]
    if extra is not None:
        w = w._replace(down_bias=extra if w.down_bias is None else w.down_bias + extra)
    if w.gate is None:
        _check_odd(ffn)
        twice = left.new_zeros(2 * len(left))
        return w._replace(
            up=torch.cat([w.up, left, -left]),
            up_bias=None if w.up_bias is None else torch.cat([w.up_bias, twice]),
            down=torch.cat([w.down, right, -right], dim=1),
        )
    bias, value = _constant(ffn, dtype)
    none = left.new_zeros(len(w.up))
    return w._replace(
        gate=torch.cat([w.gate, torch.zeros_like(left)]),
        gate_bias=torch.cat([none if w.gate_bias is None else w.gate_bias, left.new_full((len(left),), bias)]),
        up=torch.cat([w.up, left]),
        up_bias=torch.cat([none if w.up_bias is None else w.up_bias, left.new_zeros(len(left))]),
        down=torch.cat([w.down, right / value], dim=1),
    )


def _constant(ffn: FFN, dtype: torch.dtype) -> tuple[float, float]:
    """(b, act(b)) with act(b) = 1, or as near as b can be in `dtype`."""
    low, high = 0.0, 16.0

    def act(x: float) -> float:
        return float(ffn.act(torch.tensor(x, dtype=torch.float64)))

    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if act(middle) < 1 else (low, middle)
    bias = float(torch.tensor(high).to(dtype))
    if abs(act(bias) - 1) > 0.01:
        raise CapreseError("this activation never is 1, so no neuron of a gated FFN can be linear; not exported")
    return bias, act(bias)


def _check_odd(ffn: FFN) -> None:
    z = torch.linspace(-8, 8, 65, dtype=torch.float64)
    if not torch.allclose(ffn.act(z) - ffn.act(-z), z, atol=1e-6):
        raise CapreseError("of this activation, act(z) - act(-z) is not z, so no neurons can be linear; not exported")


def _named(ffn: FFN, w: Weights, width: int) -> dict[str, torch.Tensor]:
    """The weights under their names in the FFN, filled up with zero neurons to `width`."""

    def rows(t: torch.Tensor | None) -> torch.Tensor | None:
        return None if t is None else nn.functional.pad(t, (0, 0) * (t.dim() - 1) + (0, width - len(t)))

    family = ffn.family
    up, up_bias = rows(w.up), rows(w.up_bias)
    named: dict[str, tuple[Any, torch.Tensor | None]] = {}
    if ffn.fused:
        up, up_bias = (
            None if half is None else torch.cat([rows(gate), half])  # type: ignore[list-item]
            for gate, half in ((w.gate, up), (w.gate_bias, up_bias))
        )
    elif w.gate is not None:
        named[family.gate] = (rows(w.gate), rows(w.gate_bias))
    named[family.up] = (up, up_bias)
    named[family.down] = (nn.functional.pad(w.down, (0, width - w.down.shape[1])), w.down_bias)
    turned = isinstance(ffn.part("up"), Conv1D)
    weights = {f"{name}.weight": weight.T if turned else weight for name, (weight, _) in named.items()}
    return weights | {f"{name}.bias": bias for name, (_, bias) in named.items() if bias is not None}


def _ids(base: Any, tokenizer: PreTrainedTokenizerBase | None) -> torch.Tensor:
    """Tokens to compare logits on, [2, T]."""
    if tokenizer is None:
        return torch.randint(0, base.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))
    rows = [encode_text(tokenizer, text) for text in _SENTENCES]
    return torch.tensor([row[: min(map(len, rows))] for row in rows])


def _read_back(path: Path, ids: torch.Tensor, base: Any) -> torch.Tensor:
    """Logits of the checkpoint, from a process without caprese."""
    given, out = path.with_name("ids.safetensors"), path.with_name("logits.safetensors")
    save_file({"ids": ids}, given)
    kind = str(base.dtype).removeprefix("torch.")
    run = [sys.executable, "-c", _READ_BACK, str(path), str(given), str(out), kind, str(base.device)]
    done = subprocess.run(run, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise CapreseError(f"transformers alone does not load what was exported ({last}); nothing was written")
    return load_file(out)["logits"]


def _converter() -> list[str]:
    """The command of llama.cpp's converter."""
    name = "convert_hf_to_gguf.py"
    own = Path(os.environ.get("LLAMA_CPP", "")) / name
    if os.environ.get("LLAMA_CPP") and own.is_file():
        return [sys.executable, str(own)]
    if (script := shutil.which(name)) is not None:
        return [sys.executable, script]
    raise CapreseError(
        f"GGUF needs llama.cpp's {name}: git clone https://github.com/ggml-org/llama.cpp and set LLAMA_CPP to it"
    )


def _convert(converter: list[str], source: Path, target: Path, outtype: str) -> None:
    target.parent.mkdir()
    run = [*converter, str(source), "--outfile", str(target), "--outtype", outtype]
    done = subprocess.run(run, capture_output=True, text=True)
    if done.returncode or not target.is_file():
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise CapreseError(f"llama.cpp's converter failed ({last}); the same export with --format hf works without it")


def _card(model: nn.Module, facts: Mapping[str, Any]) -> str:
    """A README.md that says what the checkpoint is."""
    base = base_of(model)
    name = public_id(base.model_id)
    matter: dict[str, Any] = {
        "base_model": name,
        "library_name": "gguf" if facts["gguf"] else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["caprese", *(method.name for method in phases_of(model).methods)],
        **base_terms(Path(base.source)),
    }
    what = describe_methods(phases_of(model).methods)
    changed = (
        f"{name} with {facts['ffn_width']} instead of {facts['base_ffn_width']} neurons in each FFN, the recovery "
        "adapter among them, on prompts too"
    )
    if mixers := [at.layer for at in replacements(unwrap(model))]:
        changed = f"{name} with Mamba-2 in place of attention in layers {', '.join(map(str, mixers))}"
    return (
        f"---\n{yaml.safe_dump(matter, sort_keys=False)}---\n\n# {name}, {what}\n\n"
        f"{changed}; {facts['parameters']:,} instead of {facts['base_parameters']:,} parameters. Exported by "
        f"caprese as an ordinary {facts['architecture']}: it needs caprese no more. Read back by transformers alone, "
        f"its logits differ from the caprese model's by {facts['largest_logit_difference']:.1e} at most (the largest "
        f"is {facts['largest_logit']:.1f}).\n"
    )
