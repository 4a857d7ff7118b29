"""Samples from an engine behind an OpenAI-compatible endpoint: vLLM, SGLang, llama.cpp's server, near or far.

Prompts go there as token ids, so that no other chat template comes between, and ids come back where the engine gives
them. Before the first sample the endpoint shows on a few probes that it runs the weights that are loaded here.
"""

from __future__ import annotations

import asyncio
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedTokenizerBase

from caprese.data_gen.completer import Advance, Asked, number_of
from caprese.data_gen.probes import Probe, prove
from caprese.data_gen.samples import KEY, Samples, address_of
from caprese.errors import CapreseError
from caprese.inference.generate import ends_of
from caprese.progress import say

# Further tries of a request that the server could not take, from half a second to eight apart: a minute in all.
_RETRIES = 10
_TIMEOUT = 1800.0
# Draws of a sample whose text does not come back as the tokens that were drawn, before it is given up.
_DRAWS = 8
# What engines do unless they are told: vLLM takes a checkpoint's own defaults, llama.cpp has a top-k and a min-p.
_PLAIN = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "repeat_penalty": 1.0}
_IDS = {"return_token_ids": True, "return_tokens": True}
_FIRST_PROBES = 6
_PROBE_TOKENS = 24


class _Draw(NamedTuple):
    """A completion as it came back; no ids if its text does not give back the tokens that were drawn."""

    ids: list[int] | None
    text: str
    logprobs: list[float]
    own_ids: bool


class Endpoint:
    """A server that completes prompts.

    Args:
        url: as OpenAI's clients take it, with /v1 at its end or without.
        config: says which model where it serves several, and how many requests are under way at once.
        model: the dense base, whose weights it has to have; it is left as it is.

    Raises:
        CapreseError: no address, or the client is not installed.
    """

    def __init__(self, url: str, config: Samples, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        try:
            import openai
        except ImportError as error:
            raise CapreseError(
                "a teacher behind an endpoint wants OpenAI's client; pip install 'caprese[endpoint]'"
            ) from error
        self.url = address_of(url)
        self.name, self.most = config.teacher_model, config.teacher_concurrency
        self.model, self.tokenizer = model, tokenizer
        self._openai = openai
        self._proven = False
        self._ends = ends_of(model, tokenizer)
        self._vocabulary = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
        self._drawn = self._again = self._read_back = 0

    @property
    def note(self) -> str:
        """How many samples' ids are not the engine's own."""
        if not self._read_back:
            return ""
        said = f"{self._read_back} of {self._drawn} samples were read back from their text"
        return f"{said}, {self._again} drawn anew as theirs does not give back its tokens" if self._again else said

    def complete(
        self, asked: Iterable[Asked], config: Samples, advance: Advance | None = None
    ) -> Iterator[list[list[int]]]:
        """See `Completer.complete`. Requests of the next shards are under way before the last of one have come back.

        Raises:
            CapreseError: the server is gone, refuses what it is asked, or serves something else.
        """
        yield from _in_order(lambda put: self._all(asked, config, advance, put))

    async def _all(
        self, asked: Iterable[Asked], config: Samples, advance: Advance | None, put: Callable[[Any], None]
    ) -> None:
        key = os.environ.get(KEY) or "none"
        async with self._openai.AsyncOpenAI(
            base_url=self.url, api_key=key, max_retries=_RETRIES, timeout=_TIMEOUT
        ) as client:
            free, shards = asyncio.Semaphore(self.most), deque[list[asyncio.Task[list[int]]]]()

            async def one(shard: Asked, at: int) -> list[int]:
                try:
                    found = await self._one(client, shard, at, config)
                    if advance is not None:
                        advance(1)
                    return found
                finally:
                    free.release()

            def hand_over() -> None:
                while shards and all(task.done() for task in shards[0]):
                    put([task.result() for task in shards.popleft()])

            async with asyncio.TaskGroup() as group:
                for shard in asked:
                    if not self._proven:
                        await self._prove(client, shard.prompts)
                    tasks: list[asyncio.Task[list[int]]] = []
                    shards.append(tasks)
                    for at in range(len(shard.prompts)):
                        await free.acquire()
                        tasks.append(group.create_task(one(shard, at)))
                    hand_over()
                while shards:
                    await asyncio.wait(shards[0])
                    hand_over()

    async def _one(self, client: Any, shard: Asked, at: int, config: Samples) -> list[int]:
        """One completion; drawn anew where its tokens are not known."""
        how = {"max_tokens": config.max_new_tokens, "temperature": config.temperature, "top_p": config.top_p}
        for number in range(_DRAWS):
            seed = number_of(shard.seed, at, number) % 2**31  # llama.cpp's are of 32 bits, and the last one is chance
            found = await self._ask(client, shard.prompts[at], {*self._ends, *shard.ends}, seed=seed, **how)
            self._again += found.ids is None
            if found.ids is not None:
                self._drawn += 1
                self._read_back += not found.own_ids
                return found.ids
        raise self._unread()

    async def _ask(self, client: Any, prompt: Sequence[int], ends: Collection[int], **how: Any) -> _Draw:
        extra = {**_PLAIN, **_IDS, "stop_token_ids": sorted(ends), "skip_special_tokens": False}
        try:
            answer = await client.completions.create(
                model=self.name, prompt=[int(i) for i in prompt], logprobs=1, extra_body=extra, **how
            )
            return self._read(answer.model_dump(), ends, how["max_tokens"])
        except self._openai.APIError as error:
            raise self._refused(error) from error
        except (LookupError, TypeError, ValueError) as error:
            raise CapreseError(
                f"{self.url} does not answer as OpenAI's completions do ({error!r}); is it one?"
            ) from None

    def _read(self, answer: dict[str, Any], ends: Collection[int], most: int) -> _Draw:
        (choice,) = answer["choices"]
        text, told = str(choice["text"] or ""), choice.get("logprobs") or {}
        rows = told.get("content")  # llama.cpp's
        logprobs = [row["logprob"] for row in rows] if rows else list(told.get("token_logprobs") or ())
        found = choice.get("token_ids") or choice.get("response_token_ids") or choice.get("tokens")
        if found is None and rows and all("id" in row for row in rows):
            found = [row["id"] for row in rows]
        ended, own = choice["finish_reason"] == "stop", found is not None
        if choice["finish_reason"] not in ("stop", "length"):
            raise ValueError(f"finish_reason {choice['finish_reason']!r}")
        ids = [int(i) for i in found] if own else self._encode(text)
        if ended and not (ids and ids[-1] in ends):
            ids.append(self._end(choice.get("stop_reason"), ends))
        if any(not 0 <= i < self._vocabulary for i in ids) or (own and len(ids) > most):
            raise ValueError(f"{len(ids)} tokens of at most {most}, up to number {max(ids)}")
        if not own:
            count = answer["usage"]["completion_tokens"]
            same = len(ids) - count in ((0, 1) if ended else (0,)) and self._decode(ids[: len(ids) - ended]) == text
            return _Draw(ids if same else None, text, logprobs, own)
        return _Draw(ids, text, logprobs, own)

    def _end(self, reason: Any, ends: Collection[int]) -> int:
        """What ended a completion whose last token was not sent along."""
        own = self.tokenizer.eos_token_id
        return int(reason) if reason in ends else own if own in ends else min(ends)

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False))

    def _unread(self) -> CapreseError:
        return CapreseError(
            f"{self.url} gives no token ids, and its texts do not give back those that were drawn: another vocabulary, "
            "or texts that break off within a letter; use an engine that returns ids (vLLM, SGLang, llama.cpp)"
        )

    def _refused(self, error: Exception) -> CapreseError:
        status = getattr(error, "status_code", None)
        if status is None:
            return CapreseError(
                f"no answer from {self.url} ({error}); start it again, then run again (finished shards are kept)"
            )
        body = getattr(error, "body", None)
        said = body.get("message") if isinstance(body, dict) else None
        first = (str(said or error).strip().splitlines() or ["no message"])[0][:300]
        if status in (401, 403):
            return CapreseError(f"{self.url} wants a key ({first}); set {KEY}")
        if status == 404:
            return CapreseError(f"{self.url} has no completions ({first}); give the address that ends in /v1")
        return CapreseError(
            f"{self.url} refuses a prompt ({status}: {first}); it has to take token ids and seeds, as vLLM, SGLang and "
            "llama.cpp's server do, and a context as long as `max_new_tokens` wants"
        )

    async def _prove(self, client: Any, prompts: Sequence[Sequence[int]]) -> None:
        """That what is served there is what is loaded here."""
        try:
            served = [each.model_dump() async for each in client.models.list()]
        except self._openai.APIError as error:
            raise self._refused(error) from error
        names = [each["id"] for each in served if not each.get("parent")]  # a LoRA names its base
        if self.name is None and len(names) != 1:
            said = ", ".join(map(str, names[:10])) or "none"
            raise CapreseError(f"{self.url} serves several models ({said}); name one with `teacher_model`")
        if self.name is not None and self.name not in [each["id"] for each in served]:
            raise CapreseError(f"{self.url} serves no {self.name!r}; it serves {', '.join(map(str, names[:10]))}")
        self.name = self.name or names[0]
        probes = []
        for prompt in prompts[:_FIRST_PROBES]:
            found = await self._ask(client, prompt, self._ends, seed=0, max_tokens=_PROBE_TOKENS, temperature=0.0)
            if found.ids is not None:
                probes.append(Probe(list(prompt), found.ids, found.text, found.logprobs))
        if not probes:
            raise self._unread()
        said = await asyncio.to_thread(prove, self.model, self.tokenizer, probes, f"{self.name} at {self.url}")
        say(said)
        self._proven = True


def _in_order(work: Callable[[Callable[[Any], None]], Any]) -> Iterator[Any]:
    """What `work`, a coroutine on a thread of its own, puts, as it comes; its error, when that comes."""
    found: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
    loop, task = asyncio.new_event_loop(), list[asyncio.Task[Any]]()

    async def main() -> None:
        task.append(asyncio.current_task())  # type: ignore[arg-type]
        await work(lambda each: found.put(("one", each)))

    def run() -> None:
        try:
            loop.run_until_complete(main())
            found.put(("end", None))
        except BaseException as error:
            found.put(("error", error))
        finally:
            loop.close()

    thread = threading.Thread(target=run, name="caprese-endpoint", daemon=True)
    thread.start()
    try:
        while True:
            kind, each = found.get()
            if kind == "error":
                raise _first_of(each)
            if kind == "end":
                return
            yield each
    finally:
        with suppress(RuntimeError):  # it is done
            loop.call_soon_threadsafe(lambda: task[0].cancel())
        thread.join()


def _first_of(error: BaseException) -> BaseException:
    """Of several requests that failed together, the first one's error."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
