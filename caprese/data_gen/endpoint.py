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
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import chain
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from torch import nn
from transformers import PreTrainedTokenizerBase

from caprese.data_gen.completer import Advance, Asked, number_of
from caprese.data_gen.probes import QUESTIONS, Probe, prove
from caprese.data_gen.samples import KEY, Samples, address_of
from caprese.errors import CapreseError
from caprese.inference.generate import ends_of
from caprese.models.residency import residency_of
from caprese.progress import say

# Further tries of a request that the server could not take, from half a second to eight apart: a minute in all.
_RETRIES = 10
_TIMEOUT, _CONNECT = 1800.0, 10.0
# Draws of a sample whose text does not come back as the tokens that were drawn, before it is given up.
_DRAWS = 8
# What engines do unless they are told: vLLM takes a checkpoint's own defaults, llama.cpp has a top-k and a min-p.
_PLAIN = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "repeat_penalty": 1.0}
_IDS = {"return_token_ids": True, "return_tokens": True}
_PROBES, _PROBE_TOKENS = 6, 24


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

    Nothing of it is wanted before it is first asked: not the address, nor the client.
    """

    def __init__(self, url: str, config: Samples, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        self.url = url
        self.name, self.most = config.teacher_model, config.teacher_concurrency
        self.model, self.tokenizer = model, tokenizer
        self._openai: Any = None
        self._proven = False
        self._ends = ends_of(model, tokenizer)
        self._vocabulary = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
        self._drawn = self._again = self._read_back = 0

    @property
    def note(self) -> str:
        """How many samples' ids are not the engine's own."""
        if not self._read_back and not self._again:
            return ""
        said = f"{self._read_back} of {self._drawn} samples were read back from their text"
        return f"{said}, {self._again} drawn anew as theirs does not give back its tokens" if self._again else said

    def complete(
        self, asked: Iterable[Asked], config: Samples, advance: Advance | None = None
    ) -> Generator[list[list[int]], None, None]:
        """See `Completer.complete`. Requests of the next shards are under way before the last of one have come back.

        Raises:
            CapreseError: no address, no client, or the server is gone, refuses what it is asked, or serves something
                else.
        """
        asked = iter(asked)
        for first in asked:
            client = self._connect()
            rest = chain([first], asked)
            yield from _in_order(lambda put: self._all(client, rest, config, advance, put))  # noqa: B023

    def _connect(self) -> Any:
        if residency_of(self.model) == "sharded":  # the probes are a pass through it, for which all would have to meet
            raise CapreseError(
                "a base that is sharded over processes cannot be compared with an engine's; draw samples first in one "
                "process (`residency=streamed`, end_to_end.epochs=0, any method that it takes, such as griffin), then "
                "run with `overwrite`, which keeps them"
            )
        try:
            import openai
        except ImportError as error:
            raise CapreseError(
                "a teacher behind an endpoint wants OpenAI's client; pip install 'caprese[endpoint]'"
            ) from error
        self._openai, self.url = openai, address_of(self.url)
        key = os.environ.get(KEY) or "none"
        if not key.isascii() or not key.isprintable():
            raise CapreseError(f"{KEY} is no key: it holds what no key does; set it again, without quotes of a text")
        host = urlsplit(self.url).hostname or ""
        near = host in ("localhost", "127.0.0.1", "::1")  # what a proxy would not find
        try:
            return openai.AsyncOpenAI(
                base_url=self.url,
                api_key=key,
                max_retries=_RETRIES,
                timeout=openai.Timeout(_TIMEOUT, connect=_CONNECT),
                http_client=openai.DefaultAsyncHttpxClient(trust_env=not near),
            )
        except Exception as error:  # of any kind: an address, a proxy's, a missing file of certificates
            raise CapreseError(
                f"{self.url} cannot be asked ({error}); see the address, and what the environment says of proxies and "
                "certificates"
            ) from error

    async def _all(
        self,
        opened: Any,
        asked: Iterable[Asked],
        config: Samples,
        advance: Advance | None,
        put: Callable[[Any], None],
    ) -> None:
        async with opened as client:
            free = asyncio.Semaphore(self.most)
            shards = deque[tuple[int, list[asyncio.Task[list[int]]]]]()

            async def one(shard: Asked, at: int) -> list[int]:
                try:
                    found = await self._one(client, shard, at, config)
                    if advance is not None:
                        advance(1)
                    return found
                finally:
                    free.release()

            def hand_over(_: object = None) -> None:
                """All shards at the front that are whole; a failure is the group's."""
                while shards and len(shards[0][1]) == shards[0][0] and all(map(_is_there, shards[0][1])):
                    put([task.result() for task in shards.popleft()[1]])

            async with asyncio.TaskGroup() as group:
                for shard in asked:
                    if not self._proven:
                        await self._prove(client, shard.prompts, config)
                    tasks: list[asyncio.Task[list[int]]] = []
                    shards.append((len(shard.prompts), tasks))
                    for at in range(len(shard.prompts)):
                        await free.acquire()
                        tasks.append(group.create_task(one(shard, at)))
                        tasks[-1].add_done_callback(hand_over)
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
            async with asyncio.timeout(2 * _TIMEOUT):  # with all its tries
                answer = await client.completions.create(
                    model=self.name, prompt=[int(i) for i in prompt], logprobs=1, extra_body=extra, **how
                )
            return self._read(answer.model_dump(), ends, how["max_tokens"])
        except (self._openai.APIError, TimeoutError) as error:
            raise self._refused(error) from error
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise CapreseError(
                f"{self.url} does not answer as OpenAI's completions do ({error!r}); give that of an engine that does"
            ) from error

    def _read(self, answer: dict[str, Any], ends: Collection[int], most: int) -> _Draw:
        (choice,) = answer["choices"]
        text, told = str(choice["text"] or ""), choice.get("logprobs") or {}
        rows = told.get("content")  # llama.cpp's
        logprobs = [float(p) for p in ([row["logprob"] for row in rows] if rows else told.get("token_logprobs") or ())]
        pieces = [row["token"] for row in rows] if rows else told.get("tokens")
        count = answer["usage"]["completion_tokens"]
        found = choice.get("token_ids") or choice.get("response_token_ids") or choice.get("tokens")
        if found is None and rows and all("id" in row for row in rows) and count - len(rows) in (0, 1):
            found = [row["id"] for row in rows]  # a letter of several tokens is one row, of its last
        ended, own = choice["finish_reason"] == "stop", found is not None
        if choice["finish_reason"] not in ("stop", "length"):
            raise ValueError(f"finish_reason {choice['finish_reason']!r}")
        ids = [int(i) for i in found] if own else self._encode(text)
        if any(not 0 <= i < self._vocabulary for i in ids) or (own and len(ids) > most):
            raise ValueError(f"{len(ids)} tokens of at most {most}, up to number {max(ids)}")
        same = own or self._is(ids, text, pieces, count, ended)
        at = next((number for number, i in enumerate(ids) if i in ends), None)
        if at is not None:  # it may not know all ends
            ids = ids[: at + 1]
        elif ended:
            ids.append(self._end(choice.get("stop_reason", choice.get("matched_stop")), ends))
        return _Draw(ids if same else None, text, logprobs[: len(ids)], own)

    def _is(self, ids: list[int], text: str, pieces: Sequence[str] | None, count: int, ended: bool) -> bool:
        """Whether these tokens of a text are those that were drawn, by how many those were and what they said."""
        if self._decode(ids) != text or count - len(ids) not in ((0, 1) if ended else (0,)):
            return False
        own = [self._decode([i]).strip() for i in ids]
        return pieces is None or own == [str(piece).strip() for piece in pieces][: len(ids)]

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
        if status is None or status == 429 or status >= 500:
            return CapreseError(
                f"no answer from {self.url} ({str(error) or type(error).__name__}); see that it runs, then run again "
                "(finished shards are kept)"
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

    async def _prove(self, client: Any, prompts: Sequence[Sequence[int]], config: Samples) -> None:
        """That what is served there is what is loaded here."""
        try:
            served = [each.model_dump() async for each in client.models.list()]
            names = [each["id"] for each in served if not each.get("parent")]  # a LoRA names its base
        except self._openai.APIError as error:
            raise self._refused(error) from error
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise CapreseError(f"{self.url} lists no models ({error!r}); give the address that ends in /v1") from error
        if self.name is None and len(names) != 1:
            said = ", ".join(map(str, names[:10])) or "none"
            raise CapreseError(f"{self.url} serves several models ({said}); name one with `teacher_model`")
        if self.name is not None and self.name not in [each["id"] for each in served]:
            raise CapreseError(f"{self.url} serves no {self.name!r}; it serves {', '.join(map(str, names[:10]))}")
        self.name = self.name or names[0]
        probes = []
        encode = config.encode(self.tokenizer)
        distinct = {tuple(prompt): None for prompt in [*prompts, *map(encode, QUESTIONS)]}
        for prompt in list(distinct)[:_PROBES]:
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
    loop = asyncio.new_event_loop()
    task = loop.create_task(work(lambda each: found.put(("one", each))))

    def run() -> None:
        try:
            loop.run_until_complete(task)
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
            loop.call_soon_threadsafe(task.cancel)
        thread.join()


def _is_there(task: asyncio.Task[Any]) -> bool:
    return task.done() and not task.cancelled() and task.exception() is None


def _first_of(error: BaseException) -> BaseException:
    """Of several requests that failed together, the first one's error."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
