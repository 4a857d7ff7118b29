"""An inference engine on loopback, as vLLM's server answers, around a real model: /v1/models and /v1/completions.

One request at a time and alone in its batch, so that a seed always gives the same completion. It can lie in ways in
which real ones differ or fail.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Collection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from caprese.inference.generate import completions, ends_of, generate
from caprese.inference.sampling import greedy, nucleus
from caprese.models import load_base


class Engine:
    """A served model.

    Attributes:
        shape: "vllm" (token_ids), "llama.cpp" (ids among the log-probabilities) or "none" (text alone).
        served: what /v1/models lists.
        failures: statuses that the next requests get; 0 closes the connection.
        changes: of a choice, before it is sent.
        asked: bodies of the requests.
        most: requests that were under way at once.
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, port: int = 0) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.shape, self.delay, self.most, self._now = "vllm", 0.0, 0, 0
        self.served: list[dict[str, Any]] = [{"id": "base", "object": "model", "parent": None}]
        self.failures: list[int] = []
        self.changes: dict[str, Any] = {}
        self.asked: list[dict[str, Any]] = []
        self.key: str | None = None
        self._lock, self._count = threading.Lock(), threading.Lock()
        engine = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def _send(self, status: int, told: dict[str, Any]) -> None:
                body = json.dumps(told).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self) -> None:
                if engine.key and self.headers["Authorization"] != f"Bearer {engine.key}":
                    return self._send(401, {"error": {"message": "no such key"}})
                if self.path == "/v1/models":
                    return self._send(200, {"object": "list", "data": engine.served})
                return self._send(404, {"error": {"message": "Not Found"}})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path != "/v1/completions":
                    return self._send(404, {"error": {"message": "Not Found"}})
                with engine._count:
                    engine._now += 1
                    engine.most = max(engine.most, engine._now)
                    failure = engine.failures.pop() if engine.failures else None
                try:
                    time.sleep(engine.delay)
                    if failure == 0:
                        self.close_connection = True
                        return None
                    if failure is not None:
                        return self._send(failure, {"error": {"message": "not now"}})
                    with engine._lock:
                        engine.asked.append(body)
                        return self._send(200, engine.answer(body))
                finally:
                    with engine._count:
                        engine._now -= 1

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def wait(self) -> None:
        """Until no request is under way, and none has come for a while."""
        quiet = 0
        while quiet < 10:
            time.sleep(0.05)
            quiet = 0 if self._now else quiet + 1

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    @torch.no_grad()
    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        prompt, most, cold = body["prompt"], body["max_tokens"], body["temperature"] == 0
        sampler = greedy if cold else nucleus(1, body["temperature"], body["top_p"], body["seed"], torch.device("cpu"))
        ends: Collection[int] = ends_of(self.model, self.tokenizer) | set(body["stop_token_ids"])
        (ids,) = completions(generate(self.model, [prompt], most, sampler, ends=ends), 1)
        ended = ids[-1] in ends
        logits = self.model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        logprobs = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0].tolist()
        tokens = [self.tokenizer.decode([i]) for i in ids]
        choice: dict[str, Any] = {
            "index": 0,
            "text": self.tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=False),
            "finish_reason": "stop" if ended else "length",
            "stop_reason": ids[-1] if ended and ids[-1] != self.tokenizer.eos_token_id else None,
            "logprobs": {"tokens": tokens, "token_logprobs": logprobs, "text_offset": [], "top_logprobs": []},
        }
        if self.shape == "vllm":
            choice["token_ids"] = ids
        elif self.shape == "llama.cpp":
            rows = zip(ids, tokens, logprobs, strict=True)
            choice["logprobs"] = {"content": [{"id": i, "token": t, "logprob": p} for i, t, p in rows]}
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(ids), "total_tokens": len(prompt) + len(ids)}
        told = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "base", "usage": usage}
        return {**told, "choices": [{**choice, **self.changes}]}


def main() -> None:
    """Serve a base in a process of its own, at a port."""
    model, tokenizer = load_base(sys.argv[1], dtype="float32")
    torch.set_num_threads(1)
    print(Engine(model, tokenizer, int(sys.argv[2])).url, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
