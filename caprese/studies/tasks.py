"""Benchmarks people know: EleutherAI's lm-evaluation-harness on dense, efficient and recovered, next to each other."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from transformers import PreTrainedTokenizerBase

from caprese.adapters import public_id
from caprese.efficient_methods import phases
from caprese.errors import CapreseError
from caprese.evaluation.fidelity import VARIANTS, variant
from caprese.files import at_work, check_writable, path_of, read_json, sha256, write_json
from caprese.models import base_of, ending
from caprese.models.cache import roomy_cache
from caprese.progress import bar, say


def _harness() -> Any:
    try:
        import lm_eval.tasks
        from lm_eval.loggers import EvaluationTracker
        from lm_eval.models.huggingface import HFLM
    except Exception as error:  # half an installation raises more than ImportError
        raise CapreseError(f"`tasks` need lm-eval: pip install 'caprese[eval]' ({error})") from error
    return lm_eval, HFLM, EvaluationTracker


def language_model(model: nn.Module, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> Any:
    """An applied model as lm-eval's HFLM: contexts are prompts, what is scored or generated is completion.

    Generation knows its phases by itself. A scored continuation comes in one pass with its context, so they are said.
    """
    _, HFLM, _ = _harness()

    class Phased(HFLM):  # type: ignore[misc, valid-type]
        def tok_encode(self, string: str, *args: Any, **how: Any) -> list[int]:
            ids: list[int] = super().tok_encode(string, *args, **how)
            end = ending(self.tokenizer, string)  # a context goes on: nothing stands behind it
            return ids[: len(ids) - len(end)] if end and ids[-len(end) :] == end else ids

        def tok_batch_encode(self, strings: list[str], *args: Any, **how: Any) -> tuple[torch.Tensor, torch.Tensor]:
            ids, mask = super().tok_batch_encode(strings, *args, **how)
            end = ending(self.tokenizer, strings[0])
            if end and bool((ids[:, -len(end) :] == torch.tensor(end)).all()):
                return ids[:, : -len(end)], mask[:, : -len(end)]
            return ids, mask

        def _loglikelihood_tokens(
            self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
        ) -> list[tuple[float, bool]]:
            """[(_, context, continuation)] in tokens -> [(log p(continuation | context), whether greedy gives it)]."""
            order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
            found: dict[int, tuple[float, bool]] = {}
            with bar("scoring", len(order), "answers") as advance:
                for begin in range(0, len(order), batch_size):
                    chosen = order[begin : begin + batch_size]
                    rows = [(requests[i][1], requests[i][2]) for i in chosen]
                    found |= dict(zip(chosen, self._score(rows), strict=True))
                    advance(len(chosen))
            return [found[i] for i in range(len(requests))]

        def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **how: Any) -> torch.Tensor:
            # a model's own max_new_tokens would otherwise stand above the task's limit, its kind of cache beside ours
            room: dict[str, Any] = {"max_new_tokens": max_length - context.shape[1], "cache_implementation": None}
            room["past_key_values"] = roomy_cache(model)
            generated: torch.Tensor = super()._model_generate(context, max_length, stop, **room, **how)
            return generated

        @torch.no_grad()
        def _score(self, rows: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
            tokens, prompts = [], []
            for context, continuation in rows:
                kept = (context + continuation)[-(self.max_length + 1) :]  # long contexts lose their beginning
                tokens.append(kept)
                prompts.append(max(0, len(kept) - len(continuation)))
            width = max(map(len, tokens)) - 1
            ids = torch.tensor([t[:-1] + [0] * (width - len(t) + 1) for t in tokens], device=self.device)
            mask = torch.tensor([[1] * (len(t) - 1) + [0] * (width - len(t) + 1) for t in tokens], device=self.device)
            with phases(model, prompts):
                logits = model(input_ids=ids, attention_mask=mask).logits
            out = []
            for row, kept, start in zip(logits, tokens, prompts, strict=True):
                scores = row[start - 1 : len(kept) - 1].float().log_softmax(-1)
                target = torch.tensor(kept[start:], device=self.device)
                chosen = scores.gather(-1, target.unsqueeze(-1))
                out.append((float(chosen.sum()), bool((scores.argmax(-1) == target).all())))
            return out

    return Phased(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, backend="causal")


def _read_tasks(tasks: Sequence[str]) -> tuple[list[str], dict[str, Path]]:
    """(names, files by name): a task is a name lm-eval knows, or a YAML file of one's own."""
    names, files = [], {}
    for task in (each.strip() for each in tasks):
        path = path_of(task)
        if path.suffix not in (".yaml", ".yml"):
            names.append(task)
            continue
        try:
            # lm-eval's loader knows tags such as !function; the name is all that is needed here
            config = yaml.load(path.read_text(), Loader=yaml.BaseLoader)
            name = config["group"] if "group" in config else config["task"]
            files[name] = path.resolve()
        except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
            raise CapreseError(f"{task} is no lm-eval task ({error}); it needs at least a `task:` name") from error
        names.append(name)
    return names, files


def _digest(files: Sequence[Path]) -> list[str]:
    """Checksums of task files and of the local data they name."""
    named = [Path(word) for file in files for word in re.findall(r"[^\s'\"{}\[\],]+", file.read_text())]
    return [sha256(path) for path in sorted({*files, *(path for path in named if path.is_file())})]


@dataclass(frozen=True)
class Tasks:
    """What is asked, and how."""

    #: names lm-eval knows, or YAML files
    names: Sequence[str]
    #: a directory with more task YAMLs
    include: str | None = None
    #: problems of each task
    limit: int | None = None
    #: examples in the context
    num_fewshot: int | None = None
    #: sequences together
    batch_size: int = 8
    chat_template: bool = False
    seed: int = 0
    contenders: Sequence[str] = VARIANTS


def run_tasks(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Tasks,
    output: Path,
    *,
    identity: Any,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Run lm-eval's tasks on each contender; a contender that is done is not run again.

    Args:
        model: from `caprese.load`, fused or not.
        output: for eval.json, and for each contender lm-eval's own results_*.json.
        identity: what the results depend on besides these arguments.
        overwrite: replace results of other settings in `output`.

    Returns: {"tasks": {task: {metric: {contender: value}}}, "stderr": likewise, "files": {contender: path}}.

    Raises:
        CapreseError: lm-eval is missing, an unknown task, or results of other settings in `output`.
    """
    lm_eval, _, Tracker = _harness()
    names, files = _read_tasks(tasks.names)
    check_writable(output)
    more = sorted(path_of(tasks.include).rglob("*.yaml")) if tasks.include else []
    how = [tasks.limit, tasks.num_fewshot, tasks.chat_template, tasks.seed]
    settings = [identity, names, _digest([*files.values(), *more]), *how]
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]
    path = output / "eval.json"
    done: dict[str, Any] = {}
    if path.is_file():
        held = read_json(path, "delete it and run again")
        if held.get("identity") == key:
            done = held["results"]
        elif not overwrite:
            raise CapreseError(
                f"{path} is of other settings or data; choose another `output`, or give `overwrite=True`"
            )
    # thousands of files to look through, for nothing where all tasks are one's own
    places = [*([tasks.include] if tasks.include else []), *sorted({str(file.parent) for file in files.values()})]
    manager = lm_eval.tasks.TaskManager(include_path=places or None, include_defaults=len(files) < len(names))
    if unknown := sorted(set(names) - set(manager.all_tasks)):
        raise CapreseError(f"lm-eval knows no task {', '.join(unknown)}; give a YAML file, or see `lm-eval ls tasks`")
    for name, file in files.items():
        entry = manager.task_index[name]
        found = entry["yaml_path"] if isinstance(entry, dict) else entry.yaml_path
        if Path(found).resolve() != file:
            raise CapreseError(f"{file} and {found} are both named {name!r}; give one of them another name")
    lm = language_model(model, tokenizer, tasks.batch_size)
    with at_work(output):
        for name in tasks.contenders:
            if name in done:
                continue
            say(f"lm-eval: {name} on {', '.join(names)}")
            tracker = Tracker(output_path=str(output / name))
            before = set((output / name).rglob("results_*.json"))
            with variant(model, name):
                results = lm_eval.simple_evaluate(
                    lm,
                    model_args={"pretrained": public_id(base_of(model).model_id)},
                    tasks=names,
                    num_fewshot=tasks.num_fewshot,
                    limit=tasks.limit,
                    task_manager=manager,
                    evaluation_tracker=tracker,
                    apply_chat_template=tasks.chat_template,
                    random_seed=tasks.seed,
                    bootstrap_iters=1000,
                )
            samples = results.pop("samples", None)
            tracker.save_results_aggregated(results=results, samples=samples)
            made = set((output / name).rglob("results_*.json")) - before
            if not made:  # it only logs why
                raise CapreseError(
                    f"lm-eval could not write its results to {output / name}; free space, then run again"
                )
            done[name] = {
                "scores": {task: results["results"][task] for task in results["results"]},
                "file": str(made.pop().relative_to(output)),
            }
            write_json(path, {"identity": key, "results": done, **_table(done)})
    return {"identity": key, **_table(done)}


def _table(done: dict[str, Any]) -> dict[str, Any]:
    """Scores by task, metric and contender. lm-eval names them "metric,filter" and "metric_stderr,filter"."""
    tables: dict[str, dict[str, dict[str, dict[str, float]]]] = {"tasks": {}, "stderr": {}}
    for name, each in done.items():
        for task, scores in each["scores"].items():
            for metric, value in scores.items():
                if not isinstance(value, int | float) or "," not in metric:
                    continue
                which, label = (
                    ("stderr", metric.replace("_stderr,", ",")) if "_stderr," in metric else ("tasks", metric)
                )
                tables[which].setdefault(task, {}).setdefault(label.removesuffix(",none"), {})[name] = value
    return {**tables, "files": {name: each["file"] for name, each in done.items()}}
