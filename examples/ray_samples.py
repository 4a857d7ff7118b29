"""Samples drawn by vLLM on many nodes, through Ray Data, and a recovery from them.

ray start --head                                # on one node; ray start --address=HEAD:6379 on the others
python examples/ray_samples.py --model meta-llama/Llama-3.1-8B-Instruct --engines 16
python examples/ray_samples.py --engines 2 --cpus 1 --engine '{"enforce_eager": true}'    # two on this machine's CPUs

Every node needs ray, vLLM and the base (a hub id, or a directory that is the same everywhere), and this one caprese.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Generator, Iterable, Iterator
from typing import Any

import ray
from ray.data.llm import build_processor, vLLMEngineProcessorConfig
from torch import nn
from transformers import PreTrainedTokenizerBase

import caprese
from caprese.data_gen import Asked, Samples
from caprese.data_gen.completer import Advance, number_of
from caprese.data_gen.probes import QUESTIONS, Probe, prove
from caprese.inference.generate import ends_of
from caprese.models import base_of
from caprese.progress import say

PROBES, PROBE_TOKENS = 6, 24


class RayTeacher:
    """vLLM's engines on a Ray cluster. One shows first that it runs this base; Ray Data starts all for each split.

    Args:
        model: the dense base.
        engines: how many, and what they are given.
    """

    note = ""

    def __init__(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, engines: vLLMEngineProcessorConfig
    ) -> None:
        self.model, self.tokenizer, self.engines = model, tokenizer, engines
        self._proven = False

    def complete(
        self, asked: Iterable[Asked], config: Samples, advance: Advance | None = None
    ) -> Generator[list[list[int]], None, None]:
        """See `caprese.data_gen.Completer`."""
        shards = list(asked)
        if not shards:
            return
        if not self._proven:
            self._prove(shards[0], config)
        ends = [ends_of(self.model, self.tokenizer).union(shard.ends) for shard in shards]
        how = {"temperature": config.temperature, "top_p": config.top_p, "max_tokens": config.max_new_tokens}
        rows = [
            {
                "shard": number,
                "at": at,
                "tokenized_prompt": list(prompt),
                "sampling_params": {
                    **how,
                    "stop_token_ids": sorted(ends[number]),
                    "seed": number_of(shard.seed, at, 0) % 2**31,
                },
            }
            for number, shard in enumerate(shards)
            for at, prompt in enumerate(shard.prompts)
        ]
        found: list[dict[int, list[int]]] = [{} for _ in shards]
        front = 0
        for row in draw(rows, self.engines):
            ids = row["ids"]
            end = next((at for at, i in enumerate(ids) if i in ends[row["shard"]]), len(ids))
            found[row["shard"]][row["at"]] = ids[: end + 1]
            if advance is not None:
                advance(1)
            while front < len(shards) and len(found[front]) == len(shards[front].prompts):
                yield [found[front][at] for at in range(len(found[front]))]
                front += 1

    def _prove(self, shard: Asked, config: Samples) -> None:
        how = {
            "temperature": 0.0,
            "max_tokens": PROBE_TOKENS,
            "logprobs": 0,  # that of the token alone
            "skip_special_tokens": False,
            "stop_token_ids": sorted(ends_of(self.model, self.tokenizer)),
        }
        asked = [*shard.prompts, *map(config.encode(self.tokenizer), QUESTIONS)]
        prompts = [list(ids) for ids in dict.fromkeys(map(tuple, asked))][:PROBES]
        rows = [
            {"shard": 0, "at": at, "tokenized_prompt": ids, "sampling_params": how} for at, ids in enumerate(prompts)
        ]
        one = self.engines.model_copy(update={"concurrency": 1})
        answers = draw(rows, one)
        probes = [Probe(prompts[row["at"]], row["ids"], row["text"], row["logprobs"]) for row in answers]
        say(prove(self.model, self.tokenizer, probes, f"{self.engines.model_source} on Ray"))
        self._proven = True


def draw(rows: list[dict[str, Any]], engines: vLLMEngineProcessorConfig) -> Iterator[dict[str, Any]]:
    """The answers to rows of prompts, as they come."""
    most = engines.concurrency if isinstance(engines.concurrency, int) else max(engines.concurrency)
    # the first engine that is up takes as many batches as it may: no more than its share
    size = max(1, min(engines.batch_size, len(rows) // (most * engines.max_concurrent_batches)))
    engines = engines.model_copy(update={"batch_size": size})
    # what goes in and out takes no CPU, of which the engines may have all
    free = {"num_cpus": 0}
    run = build_processor(engines, postprocess=answer, preprocess_map_kwargs=free, postprocess_map_kwargs=free)
    dataset = ray.data.from_items(rows, override_num_blocks=-(-len(rows) // size))
    for row in run(dataset).iter_rows():
        yield {**row, "ids": [int(i) for i in row["ids"]], "logprobs": [float(p) for p in row["logprobs"]]}


def answer(row: dict[str, Any]) -> dict[str, Any]:
    """What is kept of an engine's answer; of each token its own log-probability, if it was asked for."""
    ids, told = [int(i) for i in row["generated_tokens"]], row["logprobs"]
    logprobs = [] if told is None else [float(at[i]["logprob"]) for i, at in zip(ids, told, strict=True)]
    return {"shard": row["shard"], "at": row["at"], "ids": ids, "text": row["generated_text"], "logprobs": logprobs}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="else the recipe's, or smollm2-135m")
    parser.add_argument("--recipe", help="a recipe's name or file; else that of the model")
    parser.add_argument("--output", default="out-ray")
    parser.add_argument("--engines", type=int, default=2)
    parser.add_argument("--cpus", type=int, default=0, help="an engine takes these instead of GPUs")
    parser.add_argument("--engine", type=json.loads, default={}, help="what vLLM's engine is given, as JSON")
    args = parser.parse_args()

    recipe = caprese.resolve_recipe(
        args.recipe,
        args.model or (None if args.recipe else "smollm2-135m"),
        output=args.output,
        samples={"teacher": "endpoint"},  # each engine's draws are its own
    )
    model, tokenizer = caprese.load_base(
        recipe.model, revision=recipe.revision, dtype=recipe.dtype, device=recipe.device
    )
    base = base_of(model)
    # top-k and penalties as they are said, not as the checkpoint has them
    given = {"generation_config": "vllm", "dtype": str(base.dtype or model.dtype).removeprefix("torch.")}
    given |= {"revision": base.revision} if base.revision else {}
    place: dict[str, Any] = {}
    if args.cpus:
        given["enable_chunked_prefill"] = False  # a prompt in parts and a seed stop vLLM's engine on CPUs
        # engines of one node would all go to its first cores
        environment = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(args.cpus)}
        place = {
            "placement_group_config": {"bundle_per_worker": {"CPU": args.cpus}},
            "runtime_env": {"env_vars": environment},
        }
    engines = vLLMEngineProcessorConfig(
        model_source=base.source,
        engine_kwargs={**given, **args.engine},
        concurrency=(args.engines, args.engines),
        max_concurrent_batches=8,
        max_tasks_in_flight_per_actor=8,
        chat_template_stage=False,  # prompts are tokens, and so are answers
        tokenize_stage=False,
        detokenize_stage=False,
        log_engine_metrics=False,  # for which Ray wants more packages, and nothing here reads them
        **place,
    )
    report = caprese.recover(model, tokenizer, recipe, teacher=RayTeacher(model, tokenizer, engines))
    print(f"KL {report['quality']['efficient']['kl']:.3f} -> {report['quality']['recovered']['kl']:.3f}")


if __name__ == "__main__":
    main()
