"""What a hub answers, before huggingface_hub acts on it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.utils import _http, get_session

from caprese.errors import CapreseError
from caprese.files import existing

#: bytes of a file that is read whole; the largest tokenizer.json is a tenth of it
_READ_WHOLE = 256 << 20
_NAMES = ("x-repo-commit", "x-linked-etag", "etag")
_WHOLE = (".json", ".yaml", ".md", ".txt", ".jinja", ".html")


@contextmanager
def checked_answers() -> Iterator[None]:
    """Inside, an answer is refused that would make huggingface_hub write outside of its cache (it makes paths of
    commits and ETags), or that announces a file larger than can be.

    Raises:
        CapreseError: there was such an answer.
    """
    make = _http._GLOBAL_CLIENT_FACTORY

    def checking() -> Any:
        client = make()
        client.event_hooks["response"].append(_check)
        return client

    hooks = get_session().event_hooks["response"]
    hooks.append(_check)
    _http._GLOBAL_CLIENT_FACTORY = checking  # a connection that was refused has the client closed, and another made
    try:
        yield
    finally:
        _http._GLOBAL_CLIENT_FACTORY = make
        now = get_session().event_hooks["response"]
        for each in [hooks] if now is hooks else [hooks, now]:
            if _check in each:
                each.remove(_check)


def _check(response: Any) -> None:
    headers, url = response.headers, response.request.url
    file, listing = url.path.rpartition("/")[2], "/api/models/" in url.path
    names = {name: headers.get(name, "").removeprefix("W/").strip('"') for name in _NAMES}
    sizes = [_size(headers.get(name, "0")) for name in ("x-linked-size", "content-length")]
    if (listing or file.endswith(_WHOLE)) and max(sizes) > _READ_WHOLE:
        raise CapreseError(f"{url.host} announces {max(sizes):,} bytes of {file}, which is read whole; check the id")
    disk = shutil.disk_usage(existing(Path(constants.HF_HUB_CACHE)))
    coming = sizes[1] if response.request.method == "GET" else 0  # of an interrupted download, the rest
    if max(sizes) > disk.total or coming > disk.free:
        raise CapreseError(
            f"{url.host} announces {max(sizes):,} bytes of {file}, and {constants.HF_HUB_CACHE} has {disk.free:,} "
            "left; free space, or set HF_HOME"
        )
    if listing and response.is_success:
        response.read()
        with suppress(ValueError, AttributeError):
            names["sha"] = str(response.json().get("sha") or "")
    elif not names["x-repo-commit"]:  # of another host, to which a large file was sent: no path is made of it
        return
    for name, said in names.items():
        if "/" in said or "\\" in said or said in (".", ".."):
            raise CapreseError(
                f"{url.host} says a path in place of {name} ({said[:80]!a}); do not trust that hub (HF_ENDPOINT)"
            )


def _size(said: str) -> int:
    return int(said) if said.isdecimal() and len(said) < 20 else 10**20
