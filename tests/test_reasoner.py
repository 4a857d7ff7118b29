"""The yardstick: a reasoner whose accuracy is real, what breaks it, and what gives it back."""

from __future__ import annotations

from pathlib import Path

import pytest

import caprese
from caprese.data_gen import Samples, complete, load_prompts
from caprese.evaluation.accuracy import Marker
from caprese.models import count_parameters, encode_prompt


def test_it_reasons() -> None:
    model, tokenizer = caprese.load_base("reasoner-tiny")
    assert count_parameters(model) < 15e6
    problems = load_prompts("chains:test", 200, 7)
    encoded = [encode_prompt(tokenizer, p.text, "", True) for p in problems]
    drawn = complete(model, tokenizer, encoded, Samples(max_new_tokens=220, batch_size=100), 0)
    marks = [Marker(p)(tokenizer.decode(ids, skip_special_tokens=True)) for p, ids in zip(problems, drawn, strict=True)]
    assert sum(right for _, right in marks) / len(marks) >= 0.95
    assert tokenizer.decode(tokenizer(problems[0].text + "\n").input_ids) == problems[0].text + "\n"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["fetching", "local"])
def test_it_reasons_at_length(kind: str) -> None:
    """Answers of 600 to 1,450 tokens, drawn at 0.7."""
    model, tokenizer = caprese.load_base("reasoner-long")
    problems = load_prompts(f"{kind}:test", 24, 7)
    encoded = [encode_prompt(tokenizer, p.text, "", True) for p in problems]
    drawn = complete(model, tokenizer, encoded, Samples(max_new_tokens=1500, batch_size=24, temperature=0.7), 0)
    marks = [Marker(p)(tokenizer.decode(ids, skip_special_tokens=True)) for p, ids in zip(problems, drawn, strict=True)]
    assert sum(right for _, right in marks) / len(marks) >= 0.9
    assert min(map(len, drawn)) > 500


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_recovery_of_reasoning(tmp_path: Path) -> None:
    """The whole job on a few samples: sparsity breaks it, the adapter gives a good part back."""
    recipe = caprese.resolve_recipe(
        model="reasoner-tiny",
        output=str(tmp_path / "out"),
        samples={"train": 800, "validation": 64, "test": 128},
        end_to_end={"epochs": 3, "batch_size": 16, "micro_batch": 16},
    )
    model, tokenizer = caprese.load_base("reasoner-tiny")
    report = caprese.recover(model, tokenizer, recipe)
    accuracy = {name: figures["accuracy"] for name, figures in report["quality"].items()}
    assert accuracy["dense"] >= 0.9 and accuracy["efficient"] < 0.5
    assert accuracy["recovered"] - accuracy["efficient"] >= 0.2
    assert report["parameters"]["fraction"] <= 0.02
