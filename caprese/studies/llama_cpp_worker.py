"""One GGUF in llama.cpp, timed token by token, in a process of its own: two models in one have crashed it.

Called with the file, the count of threads and a first line on stdin, the prompt's ids as JSON; then each line of stdin
asks for that many tokens and is answered with their milliseconds as JSON. Imports nothing of caprese.
"""

from __future__ import annotations

import json
import sys
import time

import llama_cpp
import numpy as np


def main() -> None:
    path, threads = sys.argv[1], int(sys.argv[2])
    prompt = json.loads(sys.stdin.readline())
    llama_cpp.llama_backend_init()
    settings = llama_cpp.llama_model_default_params()
    settings.use_extra_bufts = False  # its AMX code crashes on some virtual machines
    model = llama_cpp.llama_model_load_from_file(path.encode(), settings)
    if not model:
        sys.exit(f"llama.cpp does not load {path}")
    options = llama_cpp.llama_context_default_params()
    options.n_ctx, options.n_threads, options.n_threads_batch = len(prompt) + 4096, threads, threads
    context = llama_cpp.llama_init_from_model(model, options)
    if not context:
        sys.exit(f"llama.cpp has no memory for {path}")
    words = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    token = _decode(context, prompt, words)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        times = []
        for _ in range(int(line)):
            begin = time.perf_counter()
            token = _decode(context, [token], words)
            times.append(1000 * (time.perf_counter() - begin))
        print(json.dumps(times), flush=True)


def _decode(context: object, tokens: list[int], words: int) -> int:
    """Read tokens; the likeliest next one."""
    array = (llama_cpp.llama_token * len(tokens))(*tokens)
    if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(array, len(tokens))):
        sys.exit("llama.cpp failed to decode")
    logits = llama_cpp.llama_get_logits_ith(context, -1)

    return int(np.ctypeslib.as_array(logits, shape=(words,)).argmax())


if __name__ == "__main__":
    main()
