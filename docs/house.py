"""The house as it stands, read from its imports: checks it, and draws docs/architecture.svg.

python docs/house.py check    what the layout promises; one line for each broken promise
python docs/house.py draw     docs/architecture.svg anew
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = "caprese"
SVG = ROOT / "docs" / "architecture.svg"
#: ground floor first: a room imports only from rooms before it
ROOMS = (
    "models",
    "kernels",
    "efficient_methods",
    "adapters",
    "inference",
    "data_gen",
    "distill",
    "exports",
    "serving",
    "evaluation",
    "studies",
    "report",
    "recipes",
    "recovery",
    "plan",
    "publish",
    "doctor",
    "commands",
    "cli",
)
#: what every room may use, and what only names the others for `import caprese`
GROUND = ("errors", "files", "limits", "progress")
DOORS = ("", "__main__")
#: all that may lie at the root
FILES = {
    ".gitattributes",
    ".gitignore",
    ".pre-commit-config.yaml",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "Makefile",
    "README.md",
    "SECURITY.md",
    "pyproject.toml",
}
FOLDERS = {".ci", ".github", "benchmarks", "caprese", "docs", "examples", "tests"}
LINKS = {"adapters", "data_gen", "efficient_methods", "recipes"}
#: words that belong to one room, and where names are listed for people
OWN_WORDS = {
    "mamba": ("efficient_methods.mamba", "kernels.scan"),
}
LISTS = ("", "efficient_methods", "efficient_methods.compose", "doctor")
MOST_LINES, MOST_CLI_LINES, MOST_PAGE_LINES, MOST_PARAMETERS = 400, 80, 150, 8


@dataclass
class Module:
    """One file: its name in the package ("models.ffn"), and what it imports of the package."""

    name: str
    path: Path
    imports: set[str] = field(default_factory=set)

    @property
    def room(self) -> str:
        return self.name.partition(".")[0]

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def sentence(self) -> str:
        """The first line of its docstring."""
        return (ast.get_docstring(self.tree) or "").partition("\n")[0]


def read() -> dict[str, Module]:
    """Every module of the package by name."""
    modules = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        modules[name] = Module(name, path)
    for module in modules.values():
        for node in ast.walk(module.tree):
            for target in _targets(node):
                while target and target not in modules:
                    target = target.rpartition(".")[0]
                module.imports.add(target)
        module.imports -= {module.name, ""}
    return modules


def _targets(node: ast.AST) -> Iterator[str]:
    """What an import statement may name, without the package's own name."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
        names = [f"{node.module}.{alias.name}" for alias in node.names]
    else:
        return
    yield from (name.removeprefix(f"{PACKAGE}.") for name in names if name.startswith(f"{PACKAGE}."))


def rooms_used(modules: dict[str, Module]) -> dict[str, set[str]]:
    """By room, the other rooms that it imports from."""
    used: dict[str, set[str]] = {room: set() for room in ROOMS}
    for module in modules.values():
        if module.room in used:
            used[module.room] |= {name.partition(".")[0] for name in module.imports} - {module.room}
    return used


def circles(modules: dict[str, Module]) -> list[list[str]]:
    """Files that import one another, by whatever way round."""
    found, done = [], set()
    path: list[str] = []

    def visit(name: str) -> None:
        if name in path:
            found.append([*path[path.index(name) :], name])
            return
        if name in done:
            return
        path.append(name)
        for target in sorted(modules[name].imports):
            # a package's own page names its parts, and they come from behind it
            if not (name.startswith(f"{target}.") and modules[target].path.name == "__init__.py"):
                visit(target)
        path.pop()
        done.add(name)

    for name in modules:
        visit(name)
    return found


def check() -> list[str]:
    """What is not as the layout promises."""
    modules = read()
    wrong = []
    for name, module in modules.items():
        if module.room not in (*ROOMS, *GROUND, *DOORS):
            wrong.append(f"{name}: a file or room that docs/house.py does not know")
        most = MOST_CLI_LINES if name == "cli" else MOST_PAGE_LINES if name == "recovery.recover" else MOST_LINES
        lines = module.text.count("\n")
        if lines > most:
            wrong.append(f"{name}: {lines} lines, {most} at most")
        for function in ast.walk(module.tree):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef) and not _may_be_long(module, function):
                a = function.args
                count = len([p for p in (*a.posonlyargs, *a.args, *a.kwonlyargs) if p.arg not in ("self", "cls")])
                if count > MOST_PARAMETERS:
                    wrong.append(f"{name}.{function.name}: {count} parameters, {MOST_PARAMETERS} at most")
    for room, used in rooms_used(modules).items():
        before = ROOMS[: ROOMS.index(room)]
        if late := sorted(used - set(before) - set(GROUND)):
            wrong.append(f"{room} imports from {', '.join(late)}, which stand above it")
    wrong += [f"a circle of imports: {' -> '.join(circle)}" for circle in circles(modules)]
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    top = {path.partition("/")[0] for path in tracked.split("\0") if path and (ROOT / path).exists()}
    known = FILES | FOLDERS | LINKS | {name for name in top if name.endswith("constraints.txt")}
    wrong += [
        f"{name} at the root: nothing a newcomer has a use for (see docs/architecture.md)" for name in top - known
    ]
    wrong += [
        f"{name} at the root is to be a link into the package" for name in LINKS if not (ROOT / name).is_symlink()
    ]
    for word, places in OWN_WORDS.items():
        named = (name for name, module in modules.items() if word in module.text.lower() and name not in LISTS)
        wrong += [f"{name} names {word}, which is its room's business" for name in named if not name.startswith(places)]
    if not SVG.exists() or SVG.read_text(encoding="utf-8") != draw():
        wrong.append("docs/architecture.svg is not of these imports: python docs/house.py draw")
    return sorted(wrong)


def _may_be_long(module: Module, function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Triton's kernels take their tensors one by one."""
    names = {ast.unparse(decorator).partition("(")[0] for decorator in function.decorator_list}
    return "triton.jit" in names


def draw() -> str:
    """The rooms as an SVG: ground floor at the bottom, each with its files; arcs lead to the rooms it imports from."""
    modules = read()
    used = rooms_used(modules)
    row, left, width, arcs = 46, 20, 640, 260
    height = row * len(ROOMS) + 70
    y = {room: 40 + row * i for i, room in enumerate(reversed(ROOMS))}
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + arcs} {height}" '
        'font-family="system-ui, sans-serif" font-size="12">',
        "<title>The rooms of caprese and what each imports from</title>",
        "<style>text{fill:#24292b}.room{fill:#f6f7f6;stroke:#c9cfd1}.files{fill:#5f686d;font-size:10px}"
        ".arc{fill:none;stroke:#0a7a6d;stroke-opacity:.45}.dot{fill:#0a7a6d}"
        "@media (prefers-color-scheme:dark){text{fill:#e6eaeb}.room{fill:#1c2124;stroke:#343b3e}.files{fill:#a0a9ad}"
        ".arc{stroke:#3cc7b5}.dot{fill:#3cc7b5}}</style>",
        f'<text x="{left}" y="24">A room imports only from rooms below it; each arc ends, with a dot, '
        "at the room that is used.</text>",
    ]
    for room in ROOMS:
        own = [m for m in modules.values() if m.room == room and m.name != room]
        names = sorted({m.name.split(".")[1] for m in own})
        names = [name + "/" * _is_package(modules, f"{room}.{name}") for name in names]
        sentence = modules[room].sentence if room in modules else ""
        top = y[room]
        parts.append(f'<rect class="room" x="{left}" y="{top}" width="{width}" height="{row - 6}" rx="6"/>')
        title = room + ("" if _is_package(modules, room) else ".py")
        parts.append(
            f'<text x="{left + 10}" y="{top + 16}"><tspan font-weight="600">{escape(title)}</tspan>'
            f'<tspan dx="8">{escape(_short(sentence, 84 - len(title)))}</tspan></text>'
        )
        parts.append(
            f'<text class="files" x="{left + 10}" y="{top + 32}">{escape(_short("  ".join(names), 118))}</text>'
        )
    for room in ROOMS:
        for target in sorted(used[room] & set(ROOMS), key=ROOMS.index):
            begin, end = y[room] + row / 2 - 9, y[target] + row / 2 + 3
            x, bend = left + width, 14 + (arcs - 30) * abs(begin - end) / height * 1.15
            parts.append(
                f'<path class="arc" d="M{x} {begin:g}C{x + bend:.0f} {begin:g} {x + bend:.0f} {end:g} {x} {end:g}"/>'
                f'<circle class="dot" cx="{x}" cy="{end:g}" r="2.5"/>'
            )
    ground = ", ".join(f"{name}.py" for name in GROUND)
    parts.append(f'<text class="files" x="{left}" y="{height - 14}">Under all of them: {ground}.</text>')
    return "\n".join([*parts, "</svg>", ""])


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1].rstrip(" ,;:") + "…"


def _is_package(modules: dict[str, Module], name: str) -> bool:
    return name in modules and modules[name].path.name == "__init__.py"


def main() -> None:
    if sys.argv[1:] == ["draw"]:
        SVG.write_text(draw(), encoding="utf-8")
        return
    if sys.argv[1:] != ["check"]:
        sys.exit(__doc__)
    if wrong := check():
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
