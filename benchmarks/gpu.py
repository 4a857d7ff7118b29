"""All that wants a GPU, in one command and in parts, of which a later call does what is left.

    python benchmarks/gpu.py                   every part, in at most 25 minutes on one card
    python benchmarks/gpu.py sweep kernels     only these; names are those of PARTS
    python benchmarks/gpu.py --small           the same on small shapes, on whatever there is: to try it

Results are OUTPUT/PART.json, each with its command, and OUTPUT/parts.json says which are done and how long they took.
What `sweep` finds becomes the kernels' own settings, caprese/kernels/tuned.json. Parts are processes of their own: one
that fails or is cut off leaves what it has, and the next begins.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from caprese.files import write_json

ROOT = Path(__file__).parent.parent
TUNED = ROOT / "caprese" / "kernels" / "tuned.json"


@dataclass(frozen=True)
class Part:
    """A run of benchmarks/run.py, or of pytest."""

    seconds: int
    """After which it is cut off."""
    words: tuple[str, ...]
    """An experiment and its tables; empty: the tests of `TESTS`."""
    small: tuple[str, ...]


# in the order in which they are worth most where time is short
PARTS = {
    "tests": Part(240, (), ()),
    "sweep": Part(240, ("kernels", "sweep"), ("kernels", "small")),
    "kernels": Part(120, ("kernels", "llama-3.1-8b", "gemma-2-9b", "qwen2.5-14b"), ("kernels", "small")),
    "ttnt": Part(480, ("ttnt", "llama-3.1-8b"), ("ttnt", "small")),
    "ttnt-gemma-2-9b": Part(240, ("ttnt", "gemma-2-9b"), ("ttnt", "small")),
    "ttnt-qwen2.5-14b": Part(240, ("ttnt", "qwen2.5-14b"), ("ttnt", "small")),
    "layerwise": Part(90, ("throughput", "llama-gpu"), ("throughput", "small")),
    "end-to-end": Part(120, ("end-to-end", "llama"), ("end-to-end", "small")),
    "replay": Part(60, ("replay",), ("replay", "smollm2")),
    "lossless": Part(420, ("lossless", "llama-gpu"), ("lossless", "small")),
    "mamba": Part(120, ("context", "batches"), ("context", "small")),
}
TESTS = ("tests/test_kernels.py", "tests/test_gpu.py")


def count_tests(path: Path) -> dict[str, Any]:
    """What pytest's XML says: how many passed and were skipped, and the names of those that failed."""
    suite = next(ElementTree.parse(path).iter("testsuite"))
    bad = [
        case for case in suite.iter("testcase") if case.find("failure") is not None or case.find("error") is not None
    ]
    skipped = int(suite.get("skipped", 0))
    failed = [f"{case.get('classname')}.{case.get('name')}" for case in bad]
    return {"passed": int(suite.get("tests", 0)) - skipped - len(bad), "skipped": skipped, "failed": failed}


def tune(sweep: Path, tuned: Path) -> None:
    """Write the fastest settings of every kernel and batch into the table of the kernels' own."""
    found, known = json.loads(sweep.read_text()), json.loads(tuned.read_text())
    best: dict[str, dict[int, Any]] = {}
    for row in found["rows"]:
        if row["best"] is not None:
            best.setdefault(row["key"], {})[row["cell"]["batch"]] = row["best"]["config"]
    for key, by_batch in best.items():
        known["configs"][key] = {str(batch): by_batch[batch] for batch in sorted(by_batch)}
    known["measured"] = {"command": found["command"], **found["environment"], "operations": sorted(best)}
    write_json(tuned, known)


def run(name: str, part: Part, output: Path, small: bool, seconds: float) -> bool:
    """Whether a part came to its end; what it prints goes on."""
    result, xml = output / f"{name}.json", output / "tests.xml"
    words = part.small if small else part.words
    command = [sys.executable, "benchmarks/run.py", *words, "--output", os.path.relpath(result, ROOT)]
    if not part.words:
        workers = str(len(os.sched_getaffinity(0)))
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", workers, "--dist", "worksteal"]
        command += [*TESTS, f"--junitxml={xml}"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    if small and name in ("sweep", "kernels") and not torch.cuda.is_available():
        env["TRITON_INTERPRET"] = "1"
    process = subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True)
    try:
        done = process.wait(seconds) == 0
    except subprocess.TimeoutExpired:
        print(f"{name}: cut off after {seconds:.0f} s")
        done = False
        process.send_signal(signal.SIGINT)  # what it has, it keeps
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    if xml.exists():
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        write_json(result, {"command": " ".join(["pytest", *TESTS]), "device": device, **count_tests(xml)})
        xml.unlink()
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all that are not done if not said")
    parser.add_argument("--small", action="store_true", help="on small shapes")
    parser.add_argument("--minutes", type=float, default=25, help="no part goes on for longer than this in all")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/gpu"))
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        sys.exit(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    output = args.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    known = output / "parts.json"
    try:
        parts: dict[str, Any] = json.loads(known.read_text()) if known.exists() else {}
    except ValueError:
        sys.exit(f"{known} is damaged; delete it, and the parts whose results are whole are soon gone through again")
    end = time.monotonic() + 60 * args.minutes
    wanted = args.parts or [name for name in PARTS if not parts.get(name, {}).get("done")]
    for name in wanted:
        left = end - time.monotonic()
        if left < 10:
            print(f"{name}: no time left; call again for what is left")
            continue
        print(f"\n{name}", flush=True)
        begin = time.monotonic()
        done = run(name, PARTS[name], output, args.small, min(left, PARTS[name].seconds))
        if name == "sweep" and (output / "sweep.json").exists() and not args.small:
            tune(output / "sweep.json", TUNED)
        parts[name] = {"done": done, "seconds": round(time.monotonic() - begin, 1)}
        write_json(known, parts)
    for name in wanted:
        facts = parts.get(name, {"done": False})
        print(f"{name:20} {'done' if facts['done'] else 'not done'} {facts.get('seconds', '')}")
    sys.exit(0 if all(parts.get(name, {}).get("done") for name in wanted) else 1)


if __name__ == "__main__":
    main()
