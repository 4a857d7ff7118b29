"""One recovery job on disk: whose it is, what it has done, and the mark that it is finished.

Every stage leaves its result in OUTPUT/.state, and a later attempt goes on from it. report.json is the finished mark:
it is written last, holds a digest of every other file, and goes first when anything is replaced.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from caprese.adapters import Adapter
from caprese.adapters.sidecar import SIDECAR
from caprese.data_gen import VERSION, Samples, trained_prompts
from caprese.distill import Checkpoints
from caprese.distill.checkpoints import Kept, shared
from caprese.efficient_methods import Method, facts_of
from caprese.errors import CapreseError
from caprese.files import read_json, read_sealed, read_tensors, sha256, write_json, write_sealed, write_tensors
from caprese.progress import bar, say
from caprese.recipes import Recipe, resolve_recipe
from caprese.recovery.peak import Peak
from caprese.report.write import PAGES, write_report

STATE = ".state"
_AGAIN = "delete it and run again to repeat this stage"
#: how the work is counted for those who wait; what comes before the layer-wise fit counts as it
_PARTS = {"samples": 1, "layerwise": 2, "end_to_end": 3, "evaluation": 4}


class Run(Checkpoints):
    """The directory of a job, whose it is, its seed, its processes, and what it says of its stages.

    Every process calls every method; only the main one writes, and what it wrote is what all go on from.

    Args:
        directory: of the result.
        identity: a digest of all that decides the result; another's directory is refused.
        seed: of everything random.
    """

    def __init__(self, directory: Path, identity: str, seed: int = 0) -> None:
        super().__init__(seed)
        self.directory, self.identity = directory, identity
        self.state = directory / STATE
        self.part = 1
        self.main = PartialState().is_main_process

    def claim(self, overwrite: bool) -> None:
        """Mark the directory as this job's.

        Raises:
            CapreseError: it is another's, and `overwrite` is not given.
        """
        mark = self.state / "identity.json"
        ours = mark.exists() or any((self.directory / name).exists() for name in ("report.json", SIDECAR))
        strange = [page for page in PAGES if any(self.directory.glob(page))]
        if strange and not ours and not overwrite:
            raise CapreseError(
                f"{self.directory} holds {', '.join(strange)} that no run left there; choose another `output`, or give "
                "`overwrite=True`"
            )
        if not overwrite:
            held = "is half way through" if mark.exists() else "holds the result of"
            path = mark if mark.exists() else self.directory / "report.json"
            if path.exists() and _identity_in(path) is None:
                raise CapreseError(
                    f"{path} is damaged, so that nobody knows whose result this is; give `overwrite=True` to make it "
                    "again"
                )
            if path.exists() and _identity_in(path) != self.identity:
                raise CapreseError(
                    f"{self.directory} {held} another recipe or base; choose another `output`, or give `overwrite=True`"
                )
        elif self.main and mark.exists() and _identity_in(mark) != self.identity:
            shutil.rmtree(self.state)
        if self.main:
            write_json(mark, {"identity": self.identity})
        PartialState().wait_for_everyone()

    def unmark(self) -> None:
        """Take away what vouches for the files that are about to be replaced, and how they were made."""
        if self.main:
            for name in ("report.json", "recipe.yaml"):
                (self.directory / name).unlink(missing_ok=True)

    def finished(self) -> dict[str, Any] | None:
        """The report, if the directory holds this job's result, whole; pages that are damaged are written again."""
        report: dict[str, Any] | None = shared(self._finished() if self.main else None)
        if report is not None:
            self.close()
            say((f"{self.directory} already holds this run's result", "green"), "; nothing to do")
        return report

    def _finished(self) -> dict[str, Any] | None:
        path = self.directory / "report.json"
        if _identity_in(path) != self.identity:
            return None
        try:
            report = read_sealed(path, "made again")
        except CapreseError as error:  # or of caprese 0.1.0, whose reports vouched for nothing
            say((str(error), "yellow"))
            return None
        mark = self.state / "identity.json"
        if mark.exists() and _identity_in(mark) != self.identity:  # another job is half way through here
            return None
        vouched = {self.directory / name: digest for name, digest in report["files"].items()}
        wrong = [path for path, digest in vouched.items() if not path.is_file() or sha256(path) != digest]
        if not wrong:
            return report
        names = ", ".join(path.relative_to(self.directory).as_posix() for path in wrong)
        say((f"{self.directory}: {names} damaged or missing; made again", "yellow"))
        if all(any(path.match(page) for page in PAGES) for path in wrong):
            return write_report(report, self.directory)
        for path in wrong:
            if path.parent == self.directory / "samples":  # other files are replaced when new ones are whole
                path.unlink(missing_ok=True)
        return None

    def close(self) -> None:
        """Forget the state of a finished job."""
        shutil.rmtree(self.state, ignore_errors=True)

    def load(self, name: str) -> Kept | None:
        path = self._path(name)
        if not shared(path.exists()):
            return None
        tensors, facts = read_tensors(path, _AGAIN)
        if facts.pop("identity", None) != self.identity:
            raise CapreseError(f"{path} belongs to another recipe; choose another `output`, or delete that file")
        return tensors, facts

    def save(self, name: str, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
        if self.main:
            write_tensors(self._path(name), tensors, {"identity": self.identity, **facts})
        PartialState().wait_for_everyone()

    def once(self, name: str, make: Callable[[], Kept]) -> Kept:
        found = self.load(name)
        if found is None:
            self.save(name, *make())
            found = self.load(name)
            assert found is not None
        return found

    def _path(self, name: str) -> Path:
        return self.state / f"{name}.safetensors"

    def bar(self, name: str, total: int, unit: str, done: int = 0) -> AbstractContextManager[Callable[[int], None]]:
        return bar(f"{self.part}/4 {name.replace('_', ' ')}", total, unit, done)

    @contextmanager
    def stage(self, name: str) -> Iterator[dict[str, Any]]:
        """Note a stage in stages.json, with its time and the most memory it held: of all attempts; a stage done keeps
        both.

        Of an attempt that was killed, the time up to the last file it left counts, its memory does not.
        """
        self.part = _PARTS.get(name, 2)
        known = {each["name"]: each for each in self._noted()}
        others = [each for each in known.values() if each["name"] != name]
        stage: dict[str, Any] = {"name": name, "seconds": 0.0, "peak_bytes": None, "kept": True, "note": ""}
        before = known.get(name, {**stage, "done": False})
        spent, done = before["seconds"], before.get("done", True)
        if "begun" in before and self.main:
            spent += max(0.0, self._last_write() - before["begun"])
        held = before.get("peak_bytes")
        begin, peak = time.perf_counter(), Peak(PartialState().device)

        def note(**more: Any) -> None:
            stage["seconds"] = round(spent if done else spent + time.perf_counter() - begin, 2)
            stage["peak_bytes"] = held if done else max(filter(None, (held, peak.nbytes)), default=None)
            if self.main:
                write_sealed(self.state / "stages.json", {"stages": [*others, {**stage, **more}]})

        if not done:
            note(begun=time.time(), done=False)
        try:
            yield stage
        except BaseException:
            with suppress(CapreseError):
                note(done=done)
            raise
        note(done=True)
        say(f"{self.part}/4 {name}: {stage['note']}", ("" if stage["kept"] else " (not kept)", "yellow"))

    def stages(self) -> list[dict[str, Any]]:
        """What was done, in order: {"name", "seconds", "peak_bytes" (None where unknown), "kept", "note"}."""
        return [{key: value for key, value in each.items() if key != "done"} for each in self._noted()]

    def _noted(self) -> list[dict[str, Any]]:
        path = self.state / "stages.json"
        return read_sealed(path, "delete it and run again")["stages"] if path.exists() else []

    def _last_write(self) -> float:
        """When the newest of a run's unfinished files was written."""
        files = (path for place in (self.state, self.directory / "samples") for path in place.rglob("[!.]*.*"))
        return max((path.stat().st_mtime for path in files), default=0.0)


def _identity_in(path: Path) -> str | None:
    """Whose result it is; nobody's if the file is damaged."""
    try:
        found = read_json(path, "").get("identity")
        return None if found is None else str(found)
    except CapreseError:
        return None


def beside(adapter: Adapter) -> tuple[Samples, set[str]]:
    """What the job that made an adapter left with it: how it sampled, and the prompts it was trained on.

    No prompts for an adapter from the hub; defaults for one that stands alone.

    Raises:
        CapreseError: the recipe or a shard is damaged, or the report is of another adapter.
    """
    report = adapter.report() or {}  # where it is another's, so are recipe and samples
    recipe = adapter.recipe
    known = report.get("files", {}).get("recipe.yaml")
    if recipe is not None and known is not None and sha256(recipe) != known:
        raise CapreseError(
            f"recipe.yaml of {adapter} was altered after the run; run caprese recover again, which makes it anew"
        )
    samples = Samples(max_new_tokens=128) if recipe is None else resolve_recipe(str(recipe)).samples
    vouched = [Path(name).name for name in report.get("files") or () if name.startswith("samples/")]
    return samples, trained_prompts(adapter.directory / "samples", vouched)


def identity_of(recipe: Recipe, each: Sequence[Mapping[int, Sequence[Method]]], prints: Mapping[str, str]) -> str:
    """What a result depends on, as one digest, however it is spelled: the recipe without its places, what acts on each
    layer (of each alternative), the base's weights, how samples are made."""
    trains = any(method.trains for methods in recipe.compositions for method in methods)
    unused = set() if trains else {"alignment"}
    places = {"output", "model", "revision", "device", "residency", "methods", "alternatives", "samples"}
    facts = recipe.model_dump(mode="json", exclude=places | unused) | {"samples": recipe.samples.facts}
    acts = [
        {i: [{**facts_of(method), "layers": [i]} for method in own] for i, own in layers.items()} for layers in each
    ]
    known = [facts, acts if recipe.alternatives else acts[0], dict(prints), VERSION]
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:32]
