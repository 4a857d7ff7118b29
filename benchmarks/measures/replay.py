"""A verifying pass over a recurrent state: replayed in one go, against stepping and keeping every state.

Settings of a cell: heads, size, width of a layer's state; batch; known, tokens accepted of the last block; new, tokens
to verify. Medians in microseconds of one layer, on a GPU if there is one.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from caprese.inference.generate import clock
from caprese.kernels.replay import Tokens, verify
from caprese.kernels.scan import decode

_TIMES = 60


class Measure:
    def environment(self) -> dict[str, Any]:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        return {"torch": torch.__version__, "device": device, "threads": torch.get_num_threads()}

    @torch.no_grad()
    def __call__(self, cell: dict[str, Any]) -> dict[str, Any]:
        place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        batch, heads, size, width = (cell[name] for name in ("batch", "heads", "size", "width"))

        def tokens(count: int) -> Tokens:
            normal = [torch.randn(batch, count, heads, n, device=place) for n in (size, width)]
            return Tokens(normal[0], torch.rand(batch, count, heads, device=place), normal[1])

        known, new = tokens(cell["known"]), tokens(cell["new"])
        rates = -torch.rand(heads, device=place)
        C = torch.randn(batch, cell["new"], heads, width, device=place)
        state = torch.randn(batch, heads, size, width, device=place)

        def stepping() -> None:
            kept = state
            for t in range(cell["new"]):  # what is accepted of them is then at hand
                kept = kept.clone()
                decode(new.x[:, t], new.dt[:, t], rates, new.B[:, t], C[:, t], kept)

        return {
            "replay": _median(lambda: verify(state, known, new, rates, C), place),
            "stepping": _median(stepping, place),
            "state_bytes": 4 * heads * size * width,
            "token_bytes": 4 * heads * (size + width + 1),
        }


def _median(run: Callable[[], Any], place: torch.device) -> float:
    times = []
    for _ in range(_TIMES):
        begin = clock(place)
        run()
        times.append(1e6 * (clock(place) - begin))
    return statistics.median(times[5:])
