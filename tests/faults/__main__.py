"""Try them and write the table; the exit code says whether anything was silent, lost or unclear."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from conftest import HUB_SOCKET  # first: it says where the hub is and what this machine may do
from hub import WRITE, Hub
from huggingface_hub.utils import disable_progress_bars

from faults import damage, disk, fuzz, kills, ranks
from faults.jobs import House, chosen
from faults.table import Table

PARTS = ("kills", "damages", "disks", "moments", "ranks", "fuzz")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m faults", description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all of them without")
    parser.add_argument("--kills", type=int, default=120, help="how many")
    parser.add_argument("--damages", type=int, default=600)
    parser.add_argument("--disks", type=int, default=16, help="of each kind")
    parser.add_argument("--moments", type=int, default=16, help="of each kind")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--minutes", type=float, default=10, help="fuzz: for how long; 0 is one round")
    parser.add_argument("--examples", type=int, default=100, help="fuzz: of each reader in a round")
    parser.add_argument("--of", nargs="*", default=[], help="of one part, only jobs, places or readers that begin so")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON of the table")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    warnings.filterwarnings("ignore")
    os.environ["HF_TOKEN"] = WRITE
    disable_progress_bars()
    begin, table, names, found = time.monotonic(), Table(), tuple(args.of), {}
    try:
        with tempfile.TemporaryDirectory(prefix="caprese-faults-") as room:
            house = House(Path(room).resolve(), Hub(HUB_SOCKET))
            for part in args.parts or PARTS:
                if part == "kills":
                    kills.kills(house, table, args.kills, args.seed, names)
                elif part == "damages":
                    damage.damages(house, table, args.damages, args.seed, names)
                elif part == "disks":
                    disk.disks(house, table, args.disks, args.seed)
                elif part == "moments":
                    disk.moments(house, table, args.moments, args.seed)
                elif part == "fuzz":
                    files = fuzz.Files(house)
                    readers = chosen({reader.name: reader for reader in files.readers()}, names)
                    found = fuzz.fuzz(readers, 60 * args.minutes, args.examples, args.seed)
                    table.wrong += [f"{name}: {each}" for name, told in found.items() for each in told["failures"]]
                else:
                    ranks.ranks(house, table, args.ranks, args.seed)
    finally:  # what was tried until then is known
        _tell(args.output, table, found, begin)
    sys.exit(bool(table.wrong))


def _tell(output: Path | None, table: Table, found: dict[str, Any], begin: float) -> None:
    print(table.markdown())
    if output is not None:
        told = {
            "command": " ".join(["PYTHONPATH=tests python -m faults", *sys.argv[1:]]),
            "kills": table.kills,
            "damages": table.damages,
            "minutes": round((time.monotonic() - begin) / 60, 1),
            "fuzz": found,
            "rows": table.rows(),
            "all": table.total(),
            "lines": sorted(table.lines),
            "wrong": table.wrong,
        }
        output.write_text(json.dumps(told, indent=2) + "\n")


main()
