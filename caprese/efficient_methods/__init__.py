"""What is taken away: the wrapper around an FFN, phases, and one file per method.

To add a method: a file like `griffin.py`, and one line in `METHODS`.
"""

from caprese.efficient_methods.apply import applied_ffns, apply, remove
from caprese.efficient_methods.base import Layers, Method
from caprese.efficient_methods.cats import Cats
from caprese.efficient_methods.griffin import Griffin
from caprese.efficient_methods.phases import Observer, dense, phases
from caprese.efficient_methods.wrapper import EfficientFFN, RecoverySlot

METHODS: dict[str, type[Method]] = {m.name: m for m in (Griffin, Cats)}

__all__ = [
    "METHODS",
    "Cats",
    "EfficientFFN",
    "Griffin",
    "Layers",
    "Method",
    "Observer",
    "RecoverySlot",
    "applied_ffns",
    "apply",
    "dense",
    "phases",
    "remove",
]
