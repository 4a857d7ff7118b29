"""The rows of `bench`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from caprese.efficient_methods import Method, idle_branches

#: dense in other types than the model's own, so that ratios are to the best there is
OTHERS = {"dense_float32": torch.float32, "dense_bfloat16": torch.bfloat16}
ROWS = (
    "dense",
    "dense_compiled",
    *(f"{name}{how}" for name in OTHERS for how in ("", "_compiled")),
    *("efficient", "efficient_lora", "recovered", "fused", "fused_compiled"),
)


def rows_of(
    methods: Sequence[Method], compiled: bool = True, *, dtype: torch.dtype | None = None, device: str = "cpu"
) -> list[str]:
    """The rows there are for these methods: packed weights have no rows for LoRA to gather, and where no FFN is touched
    none are; dense in a type other than `dtype` where either may be the faster, on a CPU."""
    lora = not any("weights" in method.acts_on for method in methods) and not idle_branches(methods)
    missing = [] if lora else ["efficient_lora"]
    missing += [] if all(method.static_cache for method in methods) else ["fused_compiled"]
    own = dtype not in OTHERS.values() or device != "cpu"
    missing += [r for r in ROWS for name, other in OTHERS.items() if r.startswith(name) and (own or other == dtype)]
    return [r for r in ROWS if (compiled or "compiled" not in r) and r not in missing]


def other_type(name: str) -> torch.dtype | None:
    """Of a row of dense in another type than the model's."""
    return next((dtype for start, dtype in OTHERS.items() if name.startswith(start)), None)
