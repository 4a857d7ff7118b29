"""What end-to-end distillation has to make small so that a draft is accepted: KL, or what decides it, on what text.

Settings of a cell: model; prompts, as a recipe names them; train, test, samples of each kind; new_tokens; method; rank;
calibration, prompts; layerwise; text, sampled (at the temperature of a recipe's samples) or greedy: what is trained on;
objective, temperature, rate, epochs: of the end-to-end stage, 0 epochs leave it out.

Measured on held-out prompts of the same source and on those from elsewhere: how often the draft's likeliest token is
the dense model's on its own greedy text (greedy acceptance), and 1 - total variation on its sampled text (acceptance
when sampling). The text before each token is the dense model's, as in the first token of each draft.
"""

from __future__ import annotations

from typing import Any

import caprese
from caprese.data_gen import Prompt, Sample, Samples, complete, load_elsewhere, load_prompts
from caprese.distill import Branches, EndToEnd, HeldOut, Layerwise, Teacher, make_batches
from caprese.distill.fit import fit_end_to_end, fit_layers
from caprese.distill.losses import total_variation
from caprese.efficient_methods import calibrate, needs_calibration
from caprese.evaluation import fidelity
from measures import Once


class Measure(Once):
    """Holds one model and its texts, and takes cells one by one."""

    def _texts(self, cell: dict[str, Any], split: str, text: str) -> list[Sample]:
        model, tokenizer = self.known["model"]
        config = Samples(prompts=cell["prompts"], max_new_tokens=cell["new_tokens"], elsewhere=cell["test"])
        prompts: list[Prompt] = load_elsewhere(config, tokenizer, model)
        if split != "elsewhere":
            several = load_prompts(cell["prompts"], cell["train"] + cell["test"], 0, encode=config.encode(tokenizer))
            prompts = several[: cell["test"]] if split == "test" else several[cell["test"] :]
        if text == "greedy":
            config = config.model_copy(update={"temperature": 0.0})
        drawn = complete(model, tokenizer, [p.ids for p in prompts], config, split)
        pairs = zip(prompts, drawn, strict=True)
        return [Sample([*p.ids, *new], len(p.ids), p.text, "", p.answer) for p, new in pairs if len(new) > 2]

    def __call__(self, cell: dict[str, Any]) -> dict[str, Any]:
        model, _ = self.once("model", lambda: caprese.load_base(cell["model"]))
        texts = {
            (split, text): self.once(f"{split} {text}", lambda s=split, t=text: self._texts(cell, s, t))
            for split in ("train", "test", "elsewhere")
            for text in ("sampled", "greedy")
        }
        train = texts["train", cell["text"]]
        methods = caprese.resolve_recipe(method=cell["method"]).methods
        calibration = None
        if needs_calibration(methods):
            batches = make_batches(train[: cell["calibration"]], 8)
            calibration = calibrate(model, methods, [batch.whole() for batch in batches])
        applied: Any = caprese.apply(model, methods, calibration=calibration)

        def figures(of: Any) -> dict[str, Any]:
            found: dict[str, Any] = {}
            for split in ("test", "elsewhere"):
                greedy = make_batches(texts[split, "greedy"], 8)
                sampled = HeldOut(of, make_batches(texts[split, "sampled"], 8), 0.0)
                found[split] = {
                    "greedy": fidelity(of, greedy, ("recovered",))["recovered"]["top1_agreement"],
                    "sampled": 1 - sampled.mean(total_variation),
                    "kl": sampled.kl(),
                }
            return found

        row: dict[str, Any] = {}
        try:
            if cell["rank"]:
                held_out = HeldOut(applied, make_batches(texts["test", cell["text"]][:16], 8), 1.0)
                teacher = Teacher(applied, make_batches(train, 8), 2.0)
                layerwise = Layerwise(how=cell["layerwise"], batch_size=8)
                applied, _ = fit_layers(applied, teacher, held_out, Branches(cell["rank"]), layerwise)
                row["layerwise"] = figures(applied)
                if cell["epochs"]:
                    config = EndToEnd(
                        objective=cell["objective"],
                        temperature=cell["temperature"],
                        learning_rate=cell["rate"],
                        epochs=cell["epochs"],
                        batch_size=8,
                    )
                    start = held_out.mean(config.divergence)
                    row["course"] = [start, fit_end_to_end(applied, teacher, held_out, config, start).best]
            row["draft"] = figures(applied)
        finally:
            caprese.remove(applied)
        return row
