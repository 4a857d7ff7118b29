"""Every reader of what comes from outside, given what hypothesis makes of good files: a result, or one line."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
import yaml
from conftest import tiny_llama
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

import caprese
from caprese.adapters import Adapter
from caprese.data_gen import load_prompts, read_shard
from caprese.data_gen.shards import shard_settings
from caprese.doctor import directory
from caprese.errors import CapreseError
from caprese.files import path_of, read_sealed, read_tensors, write_sealed, write_tensors
from caprese.models import load_config, resolve
from caprese.publish import info, push
from caprese.recipes import resolve_recipe
from caprese.recovery.run import Run
from faults.jobs import REPO, House

#: seconds that a reader may take for anything
LIMIT = 20.0
SCALARS = (
    st.none()
    | st.booleans()
    | st.sampled_from([0, 1, -1, 2**31, 2**63, 2**70, 10**400, 1e-300, 1e308, -0.0, 0.5])
    | st.floats()
    | st.sampled_from(["", "\0", "\ud83d", "x" * 5000, "../../etc", "~nosuchuser", "nan", "1e999", "griffin", "[bold]"])
    | st.text(max_size=8)
)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner))
DEEP: Any = []
for _ in range(3000):
    DEEP = [DEEP]


@dataclass(frozen=True)
class Reader:
    """Something that reads a file.

    Attributes:
        good: files as they should be.
        read: what reads the file at a path; it may be given damaged content.
        make: hypothesis's ways of spoiling a file.
        file: its name.
    """

    name: str
    good: list[bytes]
    read: Callable[[Path], object]
    make: Callable[[bytes], st.SearchStrategy[bytes]]
    file: str = "file.yaml"


def spoilt_bytes(good: bytes) -> st.SearchStrategy[bytes]:
    """Some bytes changed, put in, cut out, or cut off."""

    @st.composite
    def spoil(draw: st.DrawFn) -> bytes:
        data = bytearray(good)
        for _ in range(draw(st.integers(1, 3))):
            at = draw(st.integers(0, len(data)))
            how = draw(st.sampled_from(["set", "insert", "cut", "end", "bit"]))
            if how == "end":
                del data[at:]
            elif how == "cut":
                del data[at : at + draw(st.integers(1, 64))]
            elif how == "insert":
                data[at:at] = draw(
                    st.binary(max_size=16) | st.sampled_from([b"\xff\xfe", b"\0", b"\xed\xa0\xbd", b"{", b"9" * 5000])
                )
            elif at < len(data):
                data[at] = data[at] ^ (1 << draw(st.integers(0, 7))) if how == "bit" else draw(st.integers(0, 255))
        return bytes(data)

    return spoil()


def paths_in(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Of a tree of dicts and lists, the paths to all that is in it."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from paths_in(inner, (*path, key))


def spoilt_tree(good: Any) -> st.SearchStrategy[Any]:
    """One to three values replaced, left out, or given another key."""
    paths = list(paths_in(good))

    @st.composite
    def spoil(draw: st.DrawFn) -> Any:
        whole = [copy.deepcopy(good)]
        for _ in range(draw(st.integers(1, 3))):
            path = (0, *draw(st.sampled_from(paths)))
            with contextlib.suppress(LookupError, TypeError):  # an earlier change took it away
                inner: Any = whole
                for key in path[:-1]:
                    inner = inner[key]
                how = draw(st.sampled_from(["replace", "replace", "leave out", "another key", "a list of it", "deep"]))
                if how == "replace":
                    inner[path[-1]] = draw(VALUES)
                elif how == "a list of it":
                    inner[path[-1]] = [inner[path[-1]]]
                elif how == "deep":
                    inner[path[-1]] = DEEP
                elif how == "leave out" and len(path) > 1:
                    del inner[path[-1]]
                elif isinstance(inner, dict):
                    inner[draw(st.text(max_size=6))] = inner.pop(path[-1])
        return whole[0]

    return spoil()


def spoilt_json(good: bytes) -> st.SearchStrategy[bytes]:
    return spoilt_tree(json.loads(good)).map(_dumped) | spoilt_bytes(good)


def spoilt_yaml(good: bytes) -> st.SearchStrategy[bytes]:
    return spoilt_tree(yaml.safe_load(good)).map(_as_yaml) | spoilt_bytes(good)


def _dumped(value: Any) -> bytes:
    try:
        return json.dumps(value).encode(errors="surrogatepass")
    except (RecursionError, ValueError):
        return b"[" * 100_000 + b"]" * 100_000


def _as_yaml(value: Any) -> bytes:
    try:
        return yaml.safe_dump(value, sort_keys=False).encode(errors="surrogatepass")
    except (RecursionError, ValueError, yaml.YAMLError):
        return b"[" * 100_000 + b"]" * 100_000


def spoilt_text(good: bytes) -> st.SearchStrategy[bytes]:
    """A method's spelling: pieces of it, of others, and numbers of any size, in any order."""
    pieces = ["griffin", "cats", "static", "mamba", "int8", "q4", "+", ":", "=", ",", "sparsity", "0.5", "-1", "1e999"]
    pieces += ["layers", "first-half", "0-9", "0-999999999999", "keep_attention", "window", "9" * 5000, "all", "[", "]"]
    return st.lists(st.sampled_from(pieces) | st.text(max_size=3), max_size=9).map(
        lambda parts: "".join(parts).encode(errors="surrogatepass")
    ) | spoilt_bytes(good)


class Files:
    """Good files of every kind, and what reads them."""

    def __init__(self, house: House) -> None:
        self.room, self.hub, self.base = house.room / "fuzz", house.hub, house.base
        self.room.mkdir()
        self.out = house.adapter("griffin")
        self.model = tiny_llama()
        self.weights = {name: value.clone() for name, value in self.model.state_dict().items()}

    def readers(self) -> list[Reader]:
        adapter = {
            name: (self.out / name).read_bytes()
            for name in ("caprese_config.json", "adapter_config.json", "adapter_model.safetensors")
        }
        shard = next(self.out.glob("samples/*.parquet")).read_bytes()
        recipes = [
            (self.out / "recipe.yaml").read_bytes(),
            b"model: reasoner-tiny\nmethod: griffin:0.5+q8\nlayers: 0-3\n",
        ]
        prompts = b'{"prompt": "1+1", "answer": "2"}\n{"prompt": "2+2", "answer": "4"}\n'
        tensors = self.room / "tensors.safetensors"
        write_tensors(tensors, {"a": torch.ones(3)}, {"identity": "x", "step": 3})
        report = (self.out / "report.json").read_bytes()
        told = {key: value for key, value in json.loads(report).items() if key != "sha256"}
        return [
            *(Reader(name, [data], self.adapter(name), spoilt_json) for name, data in list(adapter.items())[:2]),
            Reader(
                "adapter_model.safetensors",
                [adapter["adapter_model.safetensors"]],
                self.adapter("adapter_model.safetensors"),
                spoilt_bytes,
            ),
            Reader("report.json", [report], self.adapter("report.json"), spoilt_json),
            Reader("a report of other shapes", [json.dumps(told).encode()], self.report, spoilt_json),
            Reader("recipe.yaml", recipes, lambda path: resolve_recipe(str(path)), spoilt_yaml),
            Reader(
                "a method", [b"mamba:keep_attention=0.5+griffin:0.5", b"cats:sparsity=0.5"], self.method, spoilt_text
            ),
            Reader("a shard", [shard], lambda path: (shard_settings(path), read_shard(path)), spoilt_bytes),
            Reader("prompts", [prompts], lambda path: load_prompts(str(path), 4, 0), spoilt_json_lines, "file.jsonl"),
            Reader(
                "prompts.parquet",
                [self.parquet()],
                lambda path: load_prompts(str(path), 4, 0),
                spoilt_bytes,
                "file.parquet",
            ),
            Reader("config.json", [(self.base / "config.json").read_bytes()], self.config, spoilt_json),
            Reader("state.safetensors", [tensors.read_bytes()], lambda path: read_tensors(path, "again"), spoilt_bytes),
            Reader(
                "identity.json",
                [b'{"identity": "0123456789abcdef"}'],
                self.mark,
                spoilt_json,
            ),
            Reader("a hub's listing", [self.listed()], self.listing, spoilt_json),
            Reader(
                "a path",
                [b"out/adapter"],
                lambda path: path_of(path.read_bytes().decode(errors="surrogateescape")),
                spoilt_text,
            ),
        ]

    def adapter(self, name: str) -> Callable[[Path], object]:
        """Whoever reads a file of an adapter: what it is, is it whole, put on a base, sent."""

        def read(path: Path) -> None:
            at = self.room / "spoilt"
            if not at.exists():
                shutil.copytree(self.out, at)
            shutil.copy(path, at / name)
            refused: list[CapreseError] = []
            readers: list[Callable[[], object]] = [
                lambda: info(at),
                lambda: directory(str(at)),
                lambda: push(at, REPO, dry_run=True),
                lambda: caprese.remove(caprese.load(self.model, at)),
            ]
            try:
                for reads in readers:
                    try:
                        reads()
                    except CapreseError as error:
                        refused.append(error)
                for key, value in self.model.state_dict().items():
                    assert key in self.weights and value.equal(self.weights[key]), f"{key} of the base was changed"
            finally:
                shutil.copy(self.out / name, at / name)
            if refused:
                raise refused[0]

        return read

    def report(self, path: Path) -> None:
        """A report that vouches for itself, and holds anything."""
        try:
            told = json.loads(path.read_bytes())
        except (ValueError, RecursionError):
            return
        if isinstance(told, dict):
            sealed = path.with_name("sealed.json")
            try:
                write_sealed(sealed, told)
            except (ValueError, RecursionError):  # no JSON that anybody could have written
                return
            read_sealed(sealed, "again")
            self.adapter("report.json")(sealed)

    def mark(self, path: Path) -> None:
        """Whose a directory is, by the mark of a run that is half way through."""
        run = Run(self.room / "half", "0123456789abcdef")
        run.state.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, run.state / "identity.json")
        run.claim(overwrite=False)

    @staticmethod
    def method(path: Path) -> object:
        return resolve_recipe(method=path.read_bytes().decode(errors="surrogateescape"))

    def config(self, path: Path) -> object:
        at = self.room / "config"
        at.mkdir(exist_ok=True)
        shutil.copy(path, at / "config.json")
        return resolve(str(at)), load_config(str(at))

    def parquet(self) -> bytes:
        import pyarrow as pa

        out = io.BytesIO()
        pq.write_table(pa.table({"prompt": ["1+1", "2+2"], "answer": ["2", "4"]}), out, compression="none")
        return out.getvalue()

    def listed(self) -> bytes:
        if REPO not in self.hub.repos:
            push(self.out, REPO)
        files = sorted(self.hub.repos[REPO].commits[-1].files)
        facts = {"id": REPO, "sha": self.hub.repos[REPO].commits[-1].oid, "siblings": [{"rfilename": f} for f in files]}
        entries = [{"type": "file", "oid": "0" * 40, "size": 3, "path": name} for name in files]
        return json.dumps({"info": facts, "tree": entries}).encode()

    def listing(self, path: Path) -> None:
        try:
            said = json.loads(path.read_bytes())
        except (ValueError, RecursionError):
            said = None
        said = said if isinstance(said, dict) else {}

        def lie(status: int, body: bytes, headers: dict[str, str]) -> tuple[int, bytes, dict[str, str]]:
            tree = body.lstrip().startswith(b"[")
            other = _dumped(said.get("tree" if tree else "info"))
            return status, other, {**headers, "Content_Length": str(len(other))}

        self.hub.lies[:] = [(r"GET /api/models/", lie)]
        try:
            Adapter.open(REPO)
        finally:
            self.hub.lies.clear()


def spoilt_json_lines(good: bytes) -> st.SearchStrategy[bytes]:
    first, rest = good.split(b"\n", 1)
    return spoilt_json(first).map(lambda line: line + b"\n" + rest) | spoilt_bytes(good)


def fuzz(readers: list[Reader], seconds: float, examples: int, start: int) -> dict[str, dict[str, Any]]:
    """Rounds of `examples` for each reader and good file until `seconds` are over (one round if 0).

    Returns: by reader {"examples", "refused", "failures": tracebacks}.
    """
    begin, found, turn = time.monotonic(), {r.name: {"examples": 0, "refused": 0, "failures": []} for r in readers}, 0
    while turn == 0 or time.monotonic() - begin < seconds:
        for reader in readers:
            if found[reader.name]["failures"]:
                continue
            for good in reader.good:
                _round(reader, good, examples, start + turn, found[reader.name])
            said = {key: value for key, value in found[reader.name].items() if key != "failures"}
            print(f"{time.monotonic() - begin:6.0f} s {reader.name}: {said}", file=sys.stderr, flush=True)
        turn += 1
    return found


def _round(reader: Reader, good: bytes, examples: int, number: int, counts: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as room:
        path = Path(room) / reader.file

        def attempt(data: bytes) -> None:
            counts["examples"] += 1
            path.write_bytes(data)
            begin = time.monotonic()
            try:
                reader.read(path)
            except CapreseError as error:
                counts["refused"] += 1
                assert str(error).strip() and "\n" not in str(error), f"not one line: {error}"
            assert time.monotonic() - begin < LIMIT, "took too long"

        attempt(good)
        test = settings(
            max_examples=examples,
            deadline=None,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )(seed(number)(given(reader.make(good))(attempt)))
        try:
            test()
        except Exception:
            lines = [line[:300] for line in traceback.format_exc().splitlines()]  # an example may fill pages
            counts["failures"].append("\n".join(lines[-60:]))
            print(counts["failures"][-1], file=sys.stderr, flush=True)
