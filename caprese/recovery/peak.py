"""The most memory that a part of a job held."""

from __future__ import annotations

import ctypes
import gc
from contextlib import suppress
from pathlib import Path

import torch

_PROC = Path("/proc/self")


class Peak:
    """From its making on: of a CUDA device what torch allocated there, of a CPU what the process held (its resident
    set).

    Linux alone counts the latter anew, so elsewhere, and on other devices, it is None.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.counts = device.type in ("cuda", "cpu")
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        elif self.counts:
            gc.collect()
            with suppress(OSError, AttributeError):  # glibc keeps what the part before has freed
                ctypes.CDLL(None).malloc_trim(0)
            try:
                (_PROC / "clear_refs").write_text("5")  # the high-water mark falls to what is held now
            except OSError:
                self.counts = False

    @property
    def nbytes(self) -> int | None:
        if not self.counts:
            return None
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        lines = (_PROC / "status").read_text().splitlines()
        return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)
