"""What training needs beside model and data: a seed, a place for what is done, and a way to say how far it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch
from accelerate.utils import broadcast_object_list

from caprese.progress import bar

T = TypeVar("T")
#: tensors by name, and JSON-able facts about them
Kept = tuple[dict[str, torch.Tensor], dict[str, Any]]


def shared(value: T) -> T:
    """What the main process has, in every process: another's own may miss it by a rounding."""
    found: T = broadcast_object_list([value])[0]
    return found


class Checkpoints:
    """Of a distillation that keeps nothing and always begins anew; `recovery.Run` is one that goes on from a directory.

    Every method is called by all processes of a distributed run.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def load(self, name: str) -> Kept | None:
        """What was last saved under `name`; None if nothing was."""
        return None

    def save(self, name: str, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
        """Keep the main process's tensors and facts."""

    def once(self, name: str, make: Callable[[], Kept]) -> Kept:
        """What `make` gave the main process, now or in an attempt before this one; every process goes on from that."""
        return shared(make())

    @contextmanager
    def stage(self, name: str) -> Iterator[dict[str, Any]]:
        """A part of the work: yields what is said of it, {"kept": whether it helped, "note": what came of it}."""
        yield {"kept": True, "note": ""}

    def bar(self, name: str, total: int, unit: str, done: int = 0) -> AbstractContextManager[Callable[[int], None]]:
        """See `progress.bar`."""
        return bar(name.replace("_", " "), total, unit, done)
