"""Small real models and tokenizers, made once per test run."""

from __future__ import annotations

import os
import socket
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

# Before anything asks for them: no test leaves this machine. The hub is a loopback address that only listens for tests
# that want it (tests/hub.py), unless a real one is asked for (tests/test_hub.py).
REAL_HUB = bool(os.environ.get("CAPRESE_TEST_REAL_HUB"))
HUB_SOCKET = socket.socket()
if not REAL_HUB:
    HUB_SOCKET.bind(("127.0.0.1", 0))
    os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{HUB_SOCKET.getsockname()[1]}"
    os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="caprese-tests-")
    os.environ.pop("HF_TOKEN", None)
os.environ["HF_HUB_DISABLE_XET"] = os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import pytest
import torch
from hub import WRITE, Hub
from hypothesis import settings
from peft import PeftModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import caprese
from caprese import progress
from caprese.adapters import attach_adapter, branch_parameters

# models this small are many times slower on threads that wait for each other, most of all where cores are shared;
# processes that tests start inherit it
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
progress.quiet = True
# the same examples in every run; --hypothesis-profile=default looks for others
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, plus end of text and padding."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<pad>": 0, "<end>": 1, **{c: i + 2 for i, c in enumerate(alphabet)}}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<end>")


def tiny_llama(seed: int = 0, **overrides: object) -> LlamaForCausalLM:
    """A random Llama large enough in its weights that removing neurons shows."""
    settings: dict[str, object] = {
        "hidden_size": 32,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 258,
        "max_position_embeddings": 1024,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**settings, **overrides}))
    return model.eval().requires_grad_(False)


def recovered(
    model: torch.nn.Module, rank: int = 4, scale: float = 0.05, bias: bool = False, seed: int = 5
) -> PeftModel:
    """An applied model with an adapter that does something."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = attach_adapter(model, rank, bias)
    generator = torch.Generator().manual_seed(seed)
    for parameter in branch_parameters(adapted):
        parameter.data.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return adapted.eval()


@pytest.fixture
def tiny() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model on disk, as a user would have one."""
    directory = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny_llama().save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def hub_server() -> Iterator[Hub]:
    """A model hub on loopback."""
    server = Hub(HUB_SOCKET)
    yield server
    server.close()


@pytest.fixture
def hub(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Hub | None:
    """An empty hub, to which alice may write; None where it is the real one."""
    if REAL_HUB:
        return None
    server: Hub = request.getfixturevalue("hub_server")
    server.repos, server.large, server.faults, server.lies, server.log = {}, {}, [], [], []
    monkeypatch.setenv("HF_TOKEN", WRITE)
    return server


@pytest.fixture
def small_recipe(tmp_path: Path) -> caprese.Recipe:
    """A whole run in seconds."""
    return caprese.Recipe(
        rank=4,
        output=str(tmp_path / "out"),
        samples={
            "prompts": "gym:simple_equations",
            "train": 24,
            "validation": 6,
            "test": 6,
            "max_new_tokens": 16,
            "elsewhere": 0,
            "batch_size": 8,
            "shard_size": 8,
        },
        layerwise={"batch_size": 4},
        end_to_end={"epochs": 2, "batch_size": 4, "micro_batch": 4, "checkpoint_every": 2, "learning_rate": 3e-3},
        evaluation={"latency_tokens": 8, "batch_size": 4},
    )
