"""The model hub: an adapter is read at one revision, pushed as one commit. Tokens are huggingface_hub's business."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from caprese import __version__
from caprese.errors import CapreseError
from caprese.models.answers import checked_answers

T = TypeVar("T")
# seconds before each new attempt, where the hub is busy or the connection was cut
_WAITS = (1.0, 3.0, 9.0)
_LOGIN = "`hf auth login`, or HF_TOKEN"


def is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith("/")


def again(name: object) -> str:
    """How to have an adapter anew whose files are damaged: what was fetched stays in the hub's cache as it is."""
    repo = str(name).partition("@")[0]
    if is_hub_id(repo) and not Path(str(name)).is_dir():
        return f"run `hf cache rm model/{repo}` and fetch it again"
    return "fetch or make the adapter again"


def download(repo: str, revision: str | None, files: Iterable[str]) -> Path:
    """The directory with those of `files` that a repository holds, all of one commit.

    Raises:
        CapreseError: no such repository, revision, access or network.
    """
    try:
        with checked_answers():
            found = Path(snapshot_download(repo, revision=revision, allow_patterns=list(files)))
    except CapreseError as error:
        raise CapreseError(f"{repo}: {error}") from error
    except Exception as error:
        raise explain(error, repo, revision=revision) from error
    if not found.is_dir():
        raise CapreseError(f"{repo} holds none of {', '.join(files)}: is it a caprese adapter? If so, {again(repo)}")
    return found


def prepare(repo: str, private: bool | None) -> None:
    """Fail before the work, not after it: make the repository, if it is not there, with a token that may write.

    Raises:
        CapreseError: no token, or one that may not write there, an id that is none, no network, or a public repository
            where a private one is asked for.
    """
    api = _api()
    if not is_hub_id(repo):
        raise CapreseError(f"{repo!r} is no hub id; give one like 'user/name'")

    def make() -> None:
        role = api.whoami().get("auth", {}).get("accessToken", {}).get("role")
        if role == "read":
            raise CapreseError(f"your token may read, but not write to {repo}; {_LOGIN} with one that may")
        api.create_repo(repo, private=private, exist_ok=True)
        _check_private(api, repo, private)

    _patiently(make, repo)


def upload(
    repo: str,
    files: Mapping[str, Path | bytes],
    message: str,
    *,
    private: bool | None = None,
    stale: Callable[[str], bool] = lambda path: False,
) -> tuple[str, str]:
    """Make a repository if it is not there, and put `files` into it in one commit.

    What large files were sent before a failure stays on the hub and is not sent again.

    Args:
        files: path in the repository -> file, or content.
        private: whether a new repository is; None as the account's default.
        stale: of the files in the repository, those to delete if they are not among `files`.

    Returns: the repository's address and the commit.

    Raises:
        CapreseError: no token, no right to write, no network, or the hub stays busy.
    """
    api = _api()

    def commit() -> tuple[str, str]:
        url = api.create_repo(repo, private=private, exist_ok=True)
        _check_private(api, repo, private)
        old = [path for path in api.list_repo_files(repo) if path not in files and stale(path)]
        done = api.create_commit(
            repo,
            [
                *(CommitOperationAdd(path, content) for path, content in files.items()),
                *(CommitOperationDelete(path) for path in old),
            ],
            commit_message=message,
        )
        return str(url), done.oid

    return _patiently(commit, repo)


def _api() -> HfApi:
    return HfApi(library_name="caprese", library_version=__version__)


def _check_private(api: HfApi, repo: str, private: bool | None) -> None:
    if private and not api.repo_info(repo).private:
        raise CapreseError(f"{repo} exists and is public; make it private on the hub first, or choose another name")


def _patiently(work: Callable[[], T], repo: str) -> T:
    """`work()`, again after a while where that can help."""
    if get_token() is None:
        raise CapreseError(f"the hub knows no valid token here; {_LOGIN} with one that may write")
    for wait in (*_WAITS, None):
        try:
            return work()
        except CapreseError:
            raise
        except Exception as error:
            status = _status(error)
            passing = status in (409, 429) or status >= 500 or (status == 0 and _is_connection(error))
            # what was sent in parts, huggingface_hub has tried again already
            if wait is None or not passing or isinstance(error, RuntimeError):
                raise explain(error, repo, writing=True) from error
            time.sleep(wait)
    raise AssertionError


def _status(error: Exception) -> int:
    """The HTTP status, of an error or of what it was raised from; 0 where there was no answer."""
    each = (getattr(getattr(e, "response", None), "status_code", None) for e in (error, error.__cause__))
    return next((int(status) for status in each if status), 0)


def _is_connection(error: Exception) -> bool:
    """Whether the network failed: httpx's errors, whatever it is called in this release of huggingface_hub."""
    each = (error, error.__cause__)
    return any(isinstance(e, ConnectionError) or type(e).__module__.startswith("httpx") for e in each)


def explain(error: Exception, repo: str, *, revision: str | None = None, writing: bool = False) -> CapreseError:
    """What went wrong with a repository, in one line with its remedy."""
    status = _status(error)
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if isinstance(error, HFValidationError):
        return CapreseError(f"{repo!r} is no hub id ({first}); give one like 'user/name'")
    if isinstance(error, LocalTokenNotFoundError) or (status == 401 and writing):
        return CapreseError(f"the hub knows no valid token here; {_LOGIN} with one that may write")
    if isinstance(error, GatedRepoError):
        return CapreseError(f"{repo} is gated: accept its terms on the hub, then {_LOGIN}")
    if isinstance(error, RepositoryNotFoundError):
        return CapreseError(f"no repository {repo!r} on the hub, or it is private; check the spelling, or {_LOGIN}")
    if isinstance(error, RevisionNotFoundError):
        return CapreseError(f"{repo} has no revision {revision!r}; check `revision`")
    if status == 403:
        verb = "write to" if writing else "read"
        return CapreseError(f"your token may not {verb} {repo}; {_LOGIN} with one that may")
    if status == 429:
        return CapreseError(f"the hub asks to slow down (429); run the same again in a while, {repo} is as it was")
    if status in (409, 412):
        return CapreseError(f"{repo} changed while this was pushed ({status}); run the same again")
    if status >= 500:
        return CapreseError(f"the hub has trouble ({status}); run the same again later: what was sent is kept")
    if isinstance(error, LocalEntryNotFoundError) or _is_connection(error):
        kept = "; run the same again, whatever was sent is kept" if writing else ""
        return CapreseError(f"cannot reach the hub for {repo}; check the network and HF_ENDPOINT{kept}")
    if isinstance(error, EntryNotFoundError):
        return CapreseError(f"{repo} lacks a file ({first}); is it a caprese adapter?")
    return CapreseError(f"the hub failed for {repo} ({type(error).__name__}: {first}); check HF_ENDPOINT, or try again")
