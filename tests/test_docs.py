"""Every code block on these pages runs, in order, in a directory of its own."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REAL_HUB
from typer.testing import CliRunner

from caprese.cli import app

DOCS = Path(__file__).parent.parent / "docs"
PAGES = ["peft", "hub", "export", "evaluation"]
runner = CliRunner()


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, code) of each fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", (DOCS / f"{page}.md").read_text(), re.S | re.M)


def shell(code: str) -> None:
    """Our own commands in this process, which saves their start; the rest in bash."""
    rest = []
    for line in code.replace("\\\n", " ").splitlines(keepends=True):
        if not line.startswith("caprese "):
            rest.append(line)
            continue
        bash("".join(rest))
        rest = []
        done = runner.invoke(app, shlex.split(line)[1:], catch_exceptions=False)
        assert done.exit_code == 0, f"{line}{done.output}"
    bash("".join(rest))


def bash(code: str) -> None:
    if code.strip():
        subprocess.run(["bash", "-e", "-c", code], check=True)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """What the command that every page begins with leaves: the pages then find it done."""
    (command,) = {blocks(page)[0][1].splitlines()[0] for page in PAGES}
    place = tmp_path_factory.mktemp("docs")
    args = [str(place / "out") if word == "out" else word for word in shlex.split(command)[1:]]
    done = runner.invoke(app, args, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return place / "out"


@pytest.mark.skipif(REAL_HUB, reason="alice is not you")
@pytest.mark.parametrize("page", PAGES)
def test_page(page, first, hub, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(first, tmp_path / "out")
    names: dict[str, object] = {}
    found = blocks(page)
    assert {language for language, _ in found} <= {"sh", "python"} and len(found) > 1
    for language, code in found:
        if language == "sh":
            shell(code)
        else:
            exec(compile(code, f"{page}.md", "exec"), names)


def test_the_pages_are_linked():
    readme = (DOCS.parent / "README.md").read_text()
    assert all(f"docs/{page}.md" in readme for page in PAGES)


def slug(title: str) -> str:
    """What a heading is linked by."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", sorted([*DOCS.glob("*.md"), *DOCS.parent.glob("*.md")]), ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", file.read_text(), flags=re.M | re.S), re.M)
            assert anchor in map(slug, headings), target
