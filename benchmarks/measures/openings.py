"""How an exported checkpoint's answers begin, in the engines that serve it: with an answer, or with a stray turn.

Settings of a cell: model, the dense one, whose tokenizer and chat template it is; checkpoint, a directory that
`caprese export` wrote, its GGUF file, or nothing for the dense model; engine, transformers or llama.cpp; prompts, of
those elsewhere; tokens, of each greedy answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import caprese
from caprese.data_gen import Samples, load_elsewhere
from caprese.evaluation import environment

#: another speaker's turn where an answer should begin
STRAY = re.compile(r"\s*(<\||(system|user|assistant)\b\s*(\n|:|$))", re.IGNORECASE)


class Measure:
    """Holds the prompts, and asks one engine after the other."""

    def __init__(self) -> None:
        self.known: dict[str, Any] = {}

    def environment(self) -> dict[str, Any]:
        return environment(self.known["model"])

    def __call__(self, cell: dict[str, Any]) -> dict[str, Any]:
        if not self.known:
            model, tokenizer = caprese.load_base(cell["model"])
            self.known = {"model": model, "tokenizer": tokenizer}
        model, tokenizer = self.known["model"], self.known["tokenizer"]
        prompts = load_elsewhere(Samples(elsewhere=cell["prompts"], max_new_tokens=cell["tokens"]), tokenizer, model)
        answer = self._engine(cell)
        texts = [tokenizer.decode(answer(prompt.ids)) for prompt in prompts]
        stray = [text for text in texts if STRAY.match(text)]
        return {"answers": len(texts), "stray": len(stray), "empty": sum(not t.strip() for t in texts), "which": stray}

    def _engine(self, cell: dict[str, Any]) -> Callable[[list[int]], list[int]]:
        """Prompt ids -> the answer's."""
        if cell["engine"] == "llama.cpp":
            from llama_cpp import Llama

            # its extra buffer types crash on virtual machines with AMX
            engine = Llama(str(Path(cell["checkpoint"])), n_ctx=1024, verbose=False, use_extra_bufts=False)
            end = engine.token_eos()

            def answer(ids: list[int]) -> list[int]:
                engine.reset()
                found: list[int] = []
                for token in engine.generate(ids, temp=0.0, top_k=1):
                    if token == end or len(found) == cell["tokens"]:
                        break
                    found.append(token)
                return found

            return answer
        written: Any = self.known["model"]
        if cell["checkpoint"]:
            written = AutoModelForCausalLM.from_pretrained(cell["checkpoint"]).eval()

        def greedy(ids: list[int]) -> list[int]:
            whole = torch.tensor([ids])
            with torch.no_grad():
                out = written.generate(whole, max_new_tokens=cell["tokens"], do_sample=False)
            return [token for token in out[0, len(ids) :].tolist() if token != self.known["tokenizer"].eos_token_id]

        return greedy
