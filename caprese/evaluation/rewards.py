"""What weights a vote: a reward model, another model's likelihood, or a verifier."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from caprese.data_gen import Prompt
from caprese.data_gen.chains import soundness
from caprese.errors import CapreseError
from caprese.evaluation.accuracy import Marker
from caprese.models import context_of, encode_text, load_base, resolve
from caprese.models.answers import checked_answers
from caprese.models.loading import pick_device

#: (problem, completion) -> how good it looks, from 0 to 1
Scorer = Callable[[Prompt, str], float]


def reward_scorer(name: str, device: str = "auto") -> Scorer:
    """A scorer by name.

    Args:
        name: "oracle": whether the answer is right, the most that weights can do. "chains": the part of the lines of a
            chain of arithmetic that are right in themselves. "causal:MODEL": the completion's likelihood by another
            causal model, per token. Else a transformers sequence classifier, its last logit's sigmoid.

    Raises:
        CapreseError: it cannot be loaded, or is no classifier.
    """
    if name == "oracle":
        return lambda problem, text: float(Marker(problem)(text)[1])
    if name == "chains":
        return lambda problem, text: soundness(text)
    if name.startswith("causal:"):
        return _likelihood(name.removeprefix("causal:"), device)
    return _classifier(name, device)


def _likelihood(name: str, device: str) -> Scorer:
    judge: Any
    judge, words = load_base(name, device=device)
    room = context_of(judge)

    @torch.no_grad()
    def score(problem: Prompt, completion: str) -> float:
        before = encode_text(words, problem.text + "\n")
        after = words(completion, add_special_tokens=False).input_ids[: room and max(0, room - len(before))]
        if not after:
            return 0.0
        ids = torch.tensor([before + after], device=judge.device)
        scores = judge(input_ids=ids).logits[0, len(before) - 1 : -1].float()
        return math.exp(-float(cross_entropy(scores, ids[0, len(before) :])))

    return score


def _classifier(name: str, device: str) -> Scorer:
    try:
        source = resolve(name).source
        with checked_answers():
            judge, facts = AutoModelForSequenceClassification.from_pretrained(
                source, use_safetensors=True, output_loading_info=True
            )
            words = AutoTokenizer.from_pretrained(source)
    except Exception as error:
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CapreseError(
            f"cannot load the reward model {name!r} ({text}); give a sequence classifier, causal:MODEL, oracle or "
            "chains"
        ) from error
    if facts["missing_keys"]:
        raise CapreseError(
            f"{name!r} is no sequence classifier: it has no {', '.join(sorted(facts['missing_keys'])[:3])}; for a "
            f"causal model's likelihood give causal:{name}"
        )
    judge = judge.to(pick_device(device)).eval()

    @torch.no_grad()
    def score(problem: Prompt, completion: str) -> float:
        batch = words(problem.text, completion, return_tensors="pt", truncation=True).to(judge.device)
        return float(judge(**batch).logits[0, -1].sigmoid())

    return score
