"""What a mixer's start, what stays beside it and its training are worth: held-out KL over tokens seen, at equal tokens.

Settings of a cell: model; samples; count; method, a mamba with its settings; alignment, hidden_states and end_to_end,
the passes over the samples of each part; matrices, the weight of mixing matrices in the alignment; rounds; batch; rate;
seed; problems, whose answers are marked (0: none); kind, of these problems (chains); temperature, of end_to_end (1);
free, whether nothing is trained and what is measured is the window alone that a student is compared with.
"""

from __future__ import annotations

from typing import Any

import caprese
from caprese.adapters import attach_adapter
from caprese.distill import Alignment, Branches, Checkpoints, Distillation, EndToEnd, Layerwise, fit, make_batches
from caprese.distill.sensitivity import select_layers
from caprese.efficient_methods import untrained
from caprese.evaluation import environment
from caprese.evaluation.fidelity import fidelity
from measures.recovery import Answers, read_samples


class Measure:
    """A fresh model for every cell."""

    def environment(self) -> dict[str, Any]:
        return environment(self.model)

    def __call__(self, cell: dict[str, Any]) -> dict[str, Any]:
        self.model, tokenizer = caprese.load_base(cell["model"])
        train = read_samples(cell["samples"], "train")[: cell["count"]]
        validation = read_samples(cell["samples"], "validation")[:64]
        (method,) = caprese.resolve_recipe(method=cell["method"]).methods
        how = {"learning_rate": cell["rate"], "batch_size": cell["batch"], "micro_batch": cell["batch"]}
        config = Distillation(
            Branches(1),
            Alignment(epochs=cell["alignment"], hidden_epochs=cell["hidden_states"], matrices=cell["matrices"], **how),
            Layerwise(how="none", batch_size=cell["batch"]),
            EndToEnd(
                epochs=cell["end_to_end"] // cell["rounds"],
                rounds=cell["rounds"],
                temperature=cell.get("temperature", 1.0),
                **how,
            ),
        )
        if method.undecided:
            first = not method.dense_prompts
            rows, held_out = (make_batches(some, cell["batch"], first) for some in (train, validation))
            method, _ = select_layers(self.model, method, rows, held_out, config.alignment, 1.0)
        caprese.apply(self.model, method)
        answers = Answers(tokenizer, cell["problems"], cell.get("kind", "chains")) if cell["problems"] else None
        if cell.get("free"):
            made = attach_adapter(self.model, 1)
            (figures,) = fidelity(made, make_batches(validation, cell["batch"], True), ["efficient"]).values()
            with untrained(made):
                found = {"answers": answers.of(made)} if answers else {}
            return {"best": figures["kl"], "kept": method.in_words(), **found}
        fitted = fit(self.model, train, validation, config, Checkpoints(cell["seed"]))
        tokens = sum(batch.tokens for batch in make_batches(train, cell["batch"], True))
        passed = cell["alignment"] + cell["hidden_states"] + cell["end_to_end"] - cell["end_to_end"] // cell["rounds"]
        first, _, *epochs = fitted.curves["validation"]
        curve = [{"tokens": passed * tokens, "kl": first["kl"]}]
        curve += [{"tokens": (passed + i) * tokens, "kl": point["kl"]} for i, point in enumerate(epochs, 1)]
        result = {"kl": curve[-1]["kl"], "best": fitted.kl["end_to_end"], "curve": curve, "kept": method.in_words()}
        if answers:
            result["answers"] = answers.of(fitted.model)
        return result
