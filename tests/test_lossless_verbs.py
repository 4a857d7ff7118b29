"""`caprese generate --lossless` and `caprese bench --lossless`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import byte_tokenizer, tiny_llama
from typer.testing import CliRunner

from caprese.cli import app

ASK = ("--prompt", "one and one", "--max-new-tokens", "12", "--json", "--dtype", "float32")


def run(*args: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, list(args))
    return done.exit_code, done.stdout, done.stderr


def made(verb: str, *args: str) -> dict:
    code, out, said = run(verb, *args)
    assert code == 0, said
    return json.loads(out)


@pytest.fixture(scope="module")
def draft_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model with the same tokenizer."""
    directory = tmp_path_factory.mktemp("models") / "smaller"
    tiny_llama(seed=3, num_hidden_layers=1).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def test_generate(tiny_dir: Path, draft_dir: Path) -> None:
    """The text is the one without, whoever drafts."""
    model = ("--model", str(tiny_dir))
    right = made("generate", *model, *ASK)
    for who in (["--method", "q8"], ["--draft", "lookup"], ["--draft", str(draft_dir), "--draft-tokens", "3"]):
        found = made("generate", *model, *ASK, "--lossless", *who)
        assert found["text"] == right["text"] and found["new_tokens"] == right["new_tokens"]
        assert found["acceptance"] is None or 0 <= found["acceptance"] <= 1
    warm = ("--temperature", "0.9", "--top-k", "5", "--repetition-penalty", "1.2", "--draft-tokens", "2", "--seed", "4")
    texts = [made("generate", *model, *ASK, "--lossless", "--method", "q8", *warm)["text"] for _ in range(2)]
    assert texts[0] == texts[1]


def test_bench(tiny_dir: Path, tmp_path: Path) -> None:
    flags = ("--model", str(tiny_dir), "--dtype", "float32", "--prompts", "gym:chain_sum", "--count", "2")
    more = ("--new-tokens", "8", "--json", "--output", str(tmp_path / "out"))
    found = made("bench", "--lossless", *flags, "--method", "q8", *more)
    assert found["identical"] == "2 of 2" and found["tokens"] >= 1 and found["adapting"] > 0
    assert found == json.loads((tmp_path / "out" / "lossless.json").read_text())
    fixed = made(
        "bench", "--lossless", *flags, "--draft", "lookup", "--draft-tokens", "2", "--new-tokens", "8", "--json"
    )
    assert fixed["adapting"] is None and fixed["identical"] == "2 of 2"
    few = made("bench", "--lossless", *flags, "--draft", "lookup", "--new-tokens", "4", "--json")  # hardly any draft
    assert few["identical"] == "2 of 2"
    for wrong in (("--new-tokens", "1"), ("--batch", "0")):
        code, _, said = run("bench", "--lossless", *flags, "--method", "q8", *wrong)
        assert code == 1 and "a --batch of 1 or more and 4 --new-tokens or more" in " ".join(said.split()), said
    code, out, said = run("bench", "--lossless", *flags, "--method", "q8", "--new-tokens", "8")
    assert code == 0 and "speed-up, measured" in said + out and "adapting, down to none" in said + out


def test_what_does_not_go_together(tiny_dir: Path, draft_dir: Path, tmp_path: Path) -> None:
    model = ("generate", "--model", str(tiny_dir), *ASK)

    def refused(match: str, *args: str) -> None:
        code, _, said = run(*args)
        assert code == 1 and match in " ".join(said.split()), said

    refused("--lossless needs a draft", *model, "--lossless")
    refused("--draft goes with --lossless", *model, "--draft", "lookup")
    refused("--top-k goes with --lossless", *model, "--top-k", "3")
    refused("--target goes with --lossless", *model, "--target", "hybrid")
    other = byte_tokenizer()
    other.add_tokens(["another"])
    other.save_pretrained(draft_dir)
    try:
        refused("its tokenizer is not the model's", *model, "--lossless", "--draft", str(draft_dir))
    finally:
        byte_tokenizer().save_pretrained(draft_dir)
