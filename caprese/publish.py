"""A finished adapter directory as a repository on the model hub: one commit, with its card and report; and back."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from caprese.adapters import Adapter, hub
from caprese.adapters.adapter import RECIPE, REPORT
from caprese.adapters.sidecar import FILES
from caprese.efficient_methods import describe_methods
from caprese.errors import CapreseError
from caprese.files import path_of, sha256
from caprese.models import TERMS, base_terms
from caprese.report import summary
from caprese.report.card import LOAD_SNIPPET, front_matter, load_arguments, render_card

#: beside the adapter's own files, what a repository holds of a run
_RUN = (RECIPE, REPORT, "report.html")


def push(
    directory: str | os.PathLike[str], repo: str, *, private: bool | None = None, dry_run: bool = False
) -> dict[str, Any]:
    """Put what `recover` (or `save`) left in a directory on the hub, as one commit: adapter, recipe, report and card.

    Args:
        repo: "user/name"; made if it is not there.
        private: whether a new repository is; None as the account's default.
        dry_run: say what would be sent, send nothing.

    Returns: {"repo", "url", "commit", "files": {path: bytes}, "license"}; url and commit None in a dry run.

    Raises:
        CapreseError: not a finished adapter, altered files, no token, no right to write, or no network.
    """
    source = path_of(directory)
    if not source.is_dir():
        raise CapreseError(f"no directory {str(directory)!r}; give one that caprese recover wrote")
    if not hub.is_hub_id(repo):
        raise CapreseError(f"{repo!r} is no hub id; give one like 'user/name'")
    adapter = Adapter.open(source)
    adapter.check()
    base, report = adapter.sidecar.base, adapter.report()
    terms = {key: report[key] for key in TERMS if report and report.get(key)}
    if not terms and hub.is_hub_id(base.id):
        terms = base_terms(base.id)
    files: dict[str, Path | bytes] = {name: source / name for name in adapter.files}
    if report is not None:
        _check_run(source, report, adapter.files)
        files |= {name: source / name for name in _RUN if (source / name).is_file()}
        files |= {f"plots/{path.name}": path for path in sorted((source / "plots").glob("*.png"))}
    card = _card(report, terms, repo) if report else _bare_card(adapter, terms, repo)
    files["README.md"] = card.encode()
    sizes = {name: len(f) if isinstance(f, bytes) else f.stat().st_size for name, f in files.items()}
    facts = {"repo": repo, "url": None, "commit": None, "license": terms.get("license"), "files": sizes}
    if not dry_run:
        message = f"{describe_methods(adapter.methods)} for {base.id}, by caprese {adapter.sidecar.caprese_version}"
        ours = {*FILES, *_RUN}
        facts["url"], facts["commit"] = hub.upload(
            repo, files, message, private=private, stale=lambda path: path in ours or path.startswith("plots/")
        )
    return facts


def _card(report: dict[str, Any], terms: dict[str, str], repo: str) -> str:
    with _holding():
        return render_card({**report, **terms}, repo)


@contextmanager
def _holding() -> Iterator[None]:
    """What is read of a report inside has the shape that a report has, or one line says that it has not."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise CapreseError(
            f"{REPORT} does not hold what a report does ({error!r}); run caprese recover again"
        ) from error


def _check_run(directory: Path, report: dict[str, Any], own: Collection[str]) -> None:
    """What is sent is as the run left it: the adapter's own files, and what goes along."""
    for name, digest in report.get("files", {}).items():  # caprese 0.1.0 noted none
        path = directory / name
        if (name in {*_RUN, *own} or name.startswith("plots/")) and not (path.is_file() and sha256(path) == digest):
            raise CapreseError(f"{path} is damaged or missing; run caprese recover again, which makes it anew")


def _bare_card(adapter: Adapter, terms: dict[str, str], repo: str) -> str:
    """For an adapter that was saved without a report."""
    base = adapter.sidecar.base
    matter = front_matter(base.id, base.revision, [method.name for method in adapter.methods], terms)
    how = LOAD_SNIPPET.format(base=load_arguments(base.id, base.revision), adapter=repo)
    what = describe_methods(adapter.methods)
    return f"---\n{matter}---\n\n# {repo}\n\n{what}, with a recovery adapter.\n\n```python\n{how}\n```\n"


def info(
    adapter: str | os.PathLike[str], *, revision: str | None = None, model: str | None = None, **how: Any
) -> dict[str, Any]:
    """What an adapter is, what it needs, and with `model` whether it fits that base.

    Args:
        adapter: directory or hub id.
        revision: of the adapter, on the hub.
        model: a base to check it against, by its weights.
        how: of loading that base (see `load_base`).

    Raises:
        CapreseError: no such adapter, incomplete or damaged, or beside the report of another.
    """
    opened = Adapter.open(adapter, revision)
    opened.check()
    sidecar, ranks = opened.sidecar, sorted(set(opened.ranks.values()))
    needs = [f"the weights of {sidecar.base.id}" + (f" at {sidecar.base.revision}" if sidecar.base.revision else "")]
    method = " + ".join(m["name"] for m in sidecar.methods)
    try:
        method = describe_methods(opened.methods)
        for each in opened.methods:
            each.check()
    except CapreseError as error:
        needs.append(str(error))
    facts: dict[str, Any] = {
        "adapter": opened.name,
        "commit": opened.commit,
        "base": sidecar.base.id,
        "base_revision": sidecar.base.revision,
        "method": method,
        "reselect_every": sidecar.reselect_every,
        "prefill": sidecar.prefill,
        "rank": ranks[0] if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}",
        "caprese_version": sidecar.caprese_version,
        "needs": needs,
    }
    report = opened.report()
    if report is not None:
        with _holding():
            facts["parameters"] = report.get("parameters", {}).get("adapter")
            facts["recovered"] = summary.recovered(report)
            facts["quality"] = {name: dict(each) for name, each in (report.get("quality") or {}).items() if each}
    if model is not None:
        loaded, _ = opened.load_base(model, **how)
        try:
            opened.check_base(loaded)
            facts |= {"fits": True, "why_not": None}
        except CapreseError as error:
            facts |= {"fits": False, "why_not": str(error)}
    return facts
