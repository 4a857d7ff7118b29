"""How close an exported checkpoint stays to the dense model, run as any engine runs it: prompts too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from caprese.data_gen import Prompt, Sample
from caprese.distill.batches import Batch, lm_logits, make_batches, whole_hidden
from caprese.evaluation.evaluate import finite
from caprese.evaluation.fidelity import Tally, variant
from caprese.inference.generate import completions, ends_of, generate
from caprese.models import device_of, unwrap
from caprese.progress import bar

#: tokens of the dense model's answers
NEW_TOKENS = 64
_BATCH = 8


@torch.no_grad()
def checkpoint_fidelity(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, checkpoint: Path, prompts: Mapping[str, Sequence[Prompt]]
) -> dict[str, dict[str, float]]:
    """KL(dense || checkpoint), top-1 agreement and perplexity of the dense model's greedy answers, an answer's first
    token among them.

    Args:
        model: an applied model, of which the dense one is taken.
        checkpoint: loaded by transformers alone, in the dense model's type.
        prompts: by kind, with their token ids.

    Returns: by kind that has answers of more than one token, {"samples", "kl", "top1_agreement", "perplexity"}.
    """
    base: Any = unwrap(model)
    written: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=base.dtype)
    written.to(device_of(model)).eval()
    written(torch.zeros(1, 1, dtype=torch.long, device=device_of(model)))  # few bits are unpacked at a first whole pass
    found = {}
    with bar("exported: fidelity", sum(map(len, prompts.values())), "prompts") as advance, variant(model, "dense"):
        for kind, asked in prompts.items():
            tally, samples = Tally(), 0
            for start in range(0, len(asked), _BATCH):
                rows = asked[start : start + _BATCH]
                ids = [list(prompt.ids) for prompt in rows]
                answers = completions(generate(model, ids, NEW_TOKENS, ends=ends_of(model, tokenizer)), len(rows))
                answered = [
                    Sample(p + new, len(p), prompt.text, "")
                    for p, new, prompt in zip(ids, answers, rows, strict=True)
                    if len(new) > 1
                ]
                for batch in make_batches(answered, _BATCH, first=True):
                    at = batch.to(device_of(model))
                    tally.add(_logits(written, at), _logits(model, at), at.predicted)
                samples += len(answered)
                advance(len(rows))
            if samples:
                found[kind] = finite({"samples": samples, **tally.figures()})
    return found


def _logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    return lm_logits(model, whole_hidden(model, batch))
