"""Scores of texts in llama.cpp, in a process of its own: two models in one have crashed it.

Called with the file, a JSON of [[ids, first], ...] and the .npy to write: for each text the scores from place
`first - 1` to the one before its last, one after the other, float32 [n, V]. Imports nothing of caprese.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import llama_cpp
import numpy as np


def main() -> None:
    path, texts, target = sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), sys.argv[3]
    longest = max(len(ids) for ids, _ in texts)
    llama_cpp.llama_backend_init()
    settings = llama_cpp.llama_model_default_params()
    settings.use_extra_bufts = False  # its AMX code crashes on some virtual machines
    model = llama_cpp.llama_model_load_from_file(path.encode(), settings)
    options = llama_cpp.llama_context_default_params()
    options.n_ctx = options.n_batch = options.n_ubatch = longest + 8
    options.n_threads = options.n_threads_batch = 2
    context = llama_cpp.llama_init_from_model(model, options) if model else None
    if not context:
        sys.exit(f"llama.cpp does not load {path}")
    words = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    batch = llama_cpp.llama_batch_init(longest, 0, 1)
    rows = []
    for ids, first in texts:
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, i, 1, 0
            batch.logits[i] = i >= first - 1
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        if llama_cpp.llama_decode(context, batch):
            sys.exit("llama.cpp failed to decode")
        for i in range(first - 1, len(ids) - 1):
            scores = llama_cpp.llama_get_logits_ith(context, i)
            rows.append(np.ctypeslib.as_array(scores, shape=(words,)).copy())
    np.save(target, np.stack(rows))


if __name__ == "__main__":
    main()
