"""One checkpoint in vLLM, timed token by token, in a process of its own, by the Python that has vLLM.

Called with the directory, the count of threads and a first line on stdin, the prompt's ids as JSON; then each line of
stdin asks for that many tokens and is answered with their milliseconds as JSON. Imports nothing of caprese.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

ROOM = 4096  # tokens after the prompt, at most
KV_BYTES = 1 << 30


def main() -> None:
    path, threads = sys.argv[1], sys.argv[2]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM writes its log to stdout
    # in this process, where a step of the engine is one decode step and threads are as told
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": threads, "VLLM_NO_USAGE_STATS": "1"}
    prompt = json.loads(sys.stdin.readline())
    engine = _engine(path, prompt)
    _step(engine)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        times = []
        for _ in range(int(line)):
            begin = time.perf_counter()
            _step(engine)
            times.append(1000 * (time.perf_counter() - begin))
        print(json.dumps(times), file=answers, flush=True)


def _engine(path: str, prompt: list[int]) -> Any:
    """The checkpoint with a prompt to go on with; sequences end where the context does."""
    from vllm import EngineArgs, LLMEngine, SamplingParams
    from vllm.inputs import TokensPrompt

    with open(os.path.join(path, "config.json"), encoding="utf-8") as file:
        context = json.load(file).get("max_position_embeddings") or sys.maxsize
    length = min(context, len(prompt) + ROOM)
    arguments = EngineArgs(
        model=path,
        skip_tokenizer_init=True,
        max_model_len=length,
        max_num_seqs=1,
        kv_cache_memory_bytes=KV_BYTES,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    engine = LLMEngine.from_engine_args(arguments)
    how = SamplingParams(temperature=0.0, max_tokens=length - len(prompt), ignore_eos=True, detokenize=False)
    engine.add_request("bench", TokensPrompt(prompt_token_ids=prompt), how)
    return engine


def _step(engine: Any) -> None:
    """One more token."""
    while not engine.step():  # part of a prompt
        if not engine.has_unfinished_requests():
            sys.exit("vLLM has no room for more tokens")


if __name__ == "__main__":
    main()
