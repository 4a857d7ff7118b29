"""The most memory that each stage of a recovery holds, by the number of samples.

Each cell is a process of its own: what one has held, the next does not begin with.

Settings of a cell: recipe, one that is shipped; samples, to train on; max_new_tokens; epochs; cache_gigabytes, what is
remembered between epochs, which grows up to this; batch_size, of drawing.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from caprese import resolve_recipe


class Measure:
    """Runs `caprese recover`."""

    def environment(self) -> dict[str, Any]:
        return self.found

    def __call__(self, cell: dict[str, Any]) -> dict[str, Any]:
        shipped = resolve_recipe(recipe=cell["recipe"]).model_dump(mode="json", exclude_unset=True)
        shipped["samples"] |= {"train": cell["samples"], "max_new_tokens": cell["max_new_tokens"]}
        shipped["samples"]["batch_size"] = cell["batch_size"]
        shipped["end_to_end"] |= {"epochs": cell["epochs"], "cache_gigabytes": cell["cache_gigabytes"]}
        with tempfile.TemporaryDirectory(prefix="caprese-memory-") as place:
            recipe = Path(place) / "recipe.yaml"
            recipe.write_text(yaml.safe_dump({**shipped, "output": f"{place}/out"}))
            command = [sys.executable, "-m", "caprese", "recover", "--recipe", str(recipe), "--json"]
            report = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
        self.found = report["environment"]
        return {
            "megabytes": {stage["name"]: stage["peak_bytes"] / 1e6 for stage in report["stages"]},
            "stage_seconds": {stage["name"]: stage["seconds"] for stage in report["stages"]},
        }
