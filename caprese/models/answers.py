"""What a hub answers, before huggingface_hub acts on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.utils import get_session

from caprese.errors import CapreseError
from caprese.files import free_bytes

#: bytes of a file that is read whole; the largest tokenizer.json is a tenth of it
_READ_WHOLE = 256 << 20
_NAMES = ("x-repo-commit", "x-linked-etag", "etag")
_WHOLE = (".json", ".yaml", ".md", ".txt", ".jinja", ".html")


@contextmanager
def checked_answers() -> Iterator[None]:
    """Inside, an answer is refused that names a place outside of the cache, of whose parts huggingface_hub makes paths,
    or that announces a file larger than can be.

    Raises:
        CapreseError: there was such an answer.
    """
    hooks = get_session().event_hooks["response"]
    hooks.append(_check)
    try:
        yield
    finally:
        hooks.remove(_check)


def _check(response: Any) -> None:
    headers, url = response.headers, response.request.url
    file, listing = url.path.rpartition("/")[2], "/api/models/" in url.path
    names = {name: headers.get(name, "").removeprefix("W/").strip('"') for name in _NAMES}
    if not listing and not names["x-repo-commit"]:  # of another host, to which a large file was sent: it names nothing
        return
    size = headers.get("x-linked-size") or headers.get("content-length") or "0"
    size = int(size) if size.isdecimal() and len(size) < 20 else 10**20
    free = free_bytes(Path(constants.HF_HUB_CACHE).absolute())
    announced = f"{url.host} announces {size / 1e9:.1f} GB for {file}"
    if (listing or file.endswith(_WHOLE)) and size > _READ_WHOLE:
        raise CapreseError(f"{announced}, which nobody reads whole; check the id")
    if size > free:
        has = f"{constants.HF_HUB_CACHE} has {free / 1e9:.1f} GB left"
        raise CapreseError(f"{announced}, and {has}; free space, or set HF_HOME")
    if listing and response.is_success:
        response.read()
        with suppress(ValueError, AttributeError):
            names["sha"] = str(response.json().get("sha") or "")
    for name, said in names.items():
        if "/" in said or "\\" in said or said in (".", ".."):
            raise CapreseError(
                f"{url.host} says a path in place of {name} ({said[:80]!a}); do not trust that hub (HF_ENDPOINT)"
            )
