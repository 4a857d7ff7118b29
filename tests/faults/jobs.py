"""Jobs of the command line whose results are known, and what of a result has to be the same."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from conftest import byte_tokenizer, tiny_llama
from hub import Hub
from test_tasks import write_tasks

from caprese.data_gen import read_shard
from caprese.data_gen.shards import shard_settings
from faults.processes import Ended, call

Result = dict[str, Any]
T = TypeVar("T")
REPO = "alice/pushed"

RECIPE = """\
model: {model}
method: {method}
rank: 4
samples: {{prompts: 'gym:simple_equations', train: 24, validation: 6, test: 6, max_new_tokens: 12, elsewhere: 0,
  batch_size: 8, shard_size: 8}}
layerwise: {{how: {layerwise}, batch_size: 4, checkpoint_every: 4}}
alignment: {{epochs: 1, hidden_epochs: 1, matrices: 0.1, batch_size: 4, micro_batch: 4, checkpoint_every: 2}}
end_to_end: {{epochs: {epochs}, rounds: {rounds}, batch_size: 4, micro_batch: 4, checkpoint_every: 2,
  learning_rate: 0.003}}
evaluation: {{latency_tokens: 0, batch_size: 4}}
"""
METHODS = {
    "griffin": ("griffin:0.5", "closed", 2, 1),
    "static": ("static:0.5", "adam", 1, 1),
    "compressed": ("int8", "closed", 1, 1),
    "hybrid": ("mamba:keep_attention=0.34:selected=sensitivity+griffin:0.5", "closed", 1, 2),
}
#: files that tell of a run, with its times
WRITTEN = ("report.", "README.md", "plots", "recipe.yaml")
#: of report.json, what may differ from one run to the next
PASSING = ("stages", "latency", "files", "environment", "seconds", "date", "created", "recipe", "sha256")


@dataclass(frozen=True)
class Job:
    """A command that can be broken off and called again.

    Attributes:
        arguments: of caprese; {out} is a directory of its own.
        result: of that directory (and of what it said), what has to be the same.
        before: puts into an empty place for that directory what is there before.
        kept: of that directory, broken off, what is finished: no run after it may make it anew.
        whole: of that directory, what is there as a whole at every moment: what was before, or the result.
    """

    name: str
    arguments: list[str]
    result: Callable[[Path, Ended], Result]
    before: Callable[[Path], object] = lambda out: None
    kept: Callable[[Path], Result] = lambda out: {}
    whole: Callable[[Path], Result] = lambda out: {}

    def written(self, out: Path) -> list[str]:
        return [argument.replace("{out}", str(out)) for argument in self.arguments]

    def run(self, out: Path, **how: Any) -> Ended:
        return call(self.written(out), **how)

    def allowed(self, out: Path, want: Result) -> list[Result]:
        """What may be there as a whole once it has run: what is there now, or the result."""
        return [self.whole(out), {name: each for name, each in want.items() if name != "left over"}]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def digests(directory: Path, *without: str) -> Result:
    found = (p for p in sorted(directory.rglob("*")) if p.is_file())
    names = {str(p.relative_to(directory)): p for p in found}
    return {name: digest(p) for name, p in names.items() if not name.startswith(without)}


def left_over(out: Path) -> list[str]:
    """What only a job that is under way has, in its directory and beside it."""
    beside = [p.name for p in out.parent.iterdir() if p != out]
    return beside + [str(p.relative_to(out)) for p in out.rglob(".*") if ".cache" not in p.parts]


def recovered(out: Path, _: Ended) -> Result:
    """All of a finished directory but times, places, and what shows them; that is there, as the report vouches."""
    report = json.loads((out / "report.json").read_text())
    told = {key: value for key, value in report.items() if key not in PASSING}
    told["stages"] = [{key: each[key] for key in ("name", "kept", "note")} for each in report["stages"]]
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    recipe.pop("output")
    shards = {p.name: (shard_settings(p), [vars(row) for row in read_shard(p)]) for p in out.glob("samples/*.parquet")}
    return {
        **digests(out, *WRITTEN, "samples"),
        "recipe": recipe,
        "report": told,
        "samples": shards,
        "there": sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()),
        "altered": [name for name, known in report["files"].items() if digest(out / name) != known],
        "left over": left_over(out),
    }


def finished(out: Path) -> Result:
    """Samples, and how long each stage took that is done: nothing of it changes in the attempts that follow."""
    found = {p.name: p.stat().st_mtime_ns for p in out.glob("samples/*") if p.suffix in (".parquet", ".json")}
    for path in (out / ".state" / "stages.json", out / "report.json"):
        if path.is_file():
            stages = json.loads(path.read_text())["stages"]
            return found | {each["name"]: each["seconds"] for each in stages if each.get("done", True)}
    return found


def checkpoint(out: Path) -> Result:
    return digests(out, "README.md")


def exported(out: Path, _: Ended) -> Result:
    return {**checkpoint(out), "left over": left_over(out)}


def scaled(out: Path, _: Ended) -> Result:
    told = json.loads((out / "scale.json").read_text())
    curves = {name: {k: v for k, v in each.items() if k != "seconds"} for name, each in told["contenders"].items()}
    return {"curves": curves, "samples": sorted(p.name for p in out.glob("samples/*")), "left over": left_over(out)}


def judged(out: Path, _: Ended) -> Result:
    return {"tasks": json.loads((out / "eval.json").read_text())["tasks"], "left over": left_over(out)}


class House:
    """What jobs start from: a base, adapters, tasks; all of it small, and the same in every house."""

    def __init__(self, room: Path, hub: Hub) -> None:
        self.room, self.hub = room, hub
        self._made = 0
        self._unbroken: dict[str, tuple[Result, float, Path]] = {}
        self.base = room / "base"
        tiny_llama().save_pretrained(self.base)
        byte_tokenizer().save_pretrained(self.base)
        write_tasks(room)

    def recover(self, name: str, seed: int = 0) -> Job:
        method, layerwise, epochs, rounds = METHODS[name]
        recipe = self.room / f"{name}.yaml"
        recipe.write_text(
            RECIPE.format(model=self.base, method=method, layerwise=layerwise, epochs=epochs, rounds=rounds)
        )
        flags = ["--recipe", str(recipe), "--seed", str(seed), "--json"]
        return Job(f"recover {name}", ["recover", *flags, "--output", "{out}"], recovered, kept=finished)

    def adapter(self, name: str, seed: int = 0) -> Path:
        """A finished one, made when it is first asked for."""
        out = self.room / f"adapter-{name}-{seed}"
        if not (out / "report.json").exists():
            made = self.recover(name, seed).run(out)
            assert made.code == 0, made.error
        return out

    def new_directory(self, name: str) -> Path:
        """Where a job's directory may be made, alone in another: what it leaves beside its own is seen."""
        self._made += 1
        made = self.room / f"{self._made}-{name.replace(' ', '-')}" / "out"
        made.parent.mkdir()
        return made

    def unbroken(self, job: Job) -> tuple[Result, float, Path]:
        """What a job comes to, in how many seconds, and where."""
        if job.name not in self._unbroken:
            out = self.new_directory(job.name)
            job.before(out)
            ended = job.run(out)
            assert ended.code == 0, (job.name, ended)
            self._unbroken[job.name] = job.result(out, ended), ended.seconds, out
        return self._unbroken[job.name]

    def jobs(self) -> list[Job]:
        static, griffin = self.adapter("static"), self.adapter("griffin")
        export = ["export", str(static), "--model", str(self.base), "--to", "{out}", "--samples", "2", "--json"]
        both = ["--model", str(self.base), "--adapter", str(griffin)]
        scale = ["scale", *both, "--prompts", "chains:test", "--problems", "3", "--samples", "4", "--json"]
        scale += ["--max-new-tokens", "16", "--output", "{out}"]
        tasks = ["eval", *both, "--tasks", str(self.room / "choose.yaml"), "--json", "--output", "{out}"]
        return [
            *(self.recover(name) for name in METHODS),
            Job("export", export, exported, whole=checkpoint),
            Job("export --overwrite", [*export, "--overwrite"], exported, before=_something, whole=checkpoint),
            Job("scale", scale, scaled, kept=finished),
            Job("eval --tasks", tasks, judged),
            Job(
                "push",
                ["push", "{out}", REPO, "--json"],
                self.pushed,
                before=self.unpushed,
                whole=self.pushed,
            ),
        ]

    def unpushed(self, out: Path) -> None:
        self.hub.repos.clear()
        shutil.copytree(self.adapter("griffin"), out)

    def pushed(self, out: Path, ended: Ended | None = None) -> Result:
        """What the hub has: all of it, in one commit, or nothing."""
        repo = self.hub.repos.get(REPO)
        files = repo.commits[-1].files if repo is not None else {}
        return {name: hashlib.sha256(data).hexdigest() for name, data in files.items() if name != ".gitattributes"}


def _something(out: Path) -> None:
    """A checkpoint that is there before; whole or not there is all that may become of it."""
    out.mkdir()
    tiny_llama(seed=3).save_pretrained(out)


def chosen(known: dict[str, T], names: tuple[str, ...]) -> list[T]:
    """Of what is known by name, what begins with one of `names`; all of it where there are none."""
    found = [each for name, each in known.items() if not names or name.startswith(names)]
    if not found:
        sys.exit(f"nothing begins with {', '.join(names)}; there are {', '.join(known)}")
    return found
