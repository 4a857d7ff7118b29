"""Lossless generation: cheap layers draft, the dense model verifies, and the text is the dense model's own."""

from caprese.inference.lossless.entry import Lossless
from caprese.inference.lossless.pace import Pace, Tally
from caprese.inference.lossless.rules import Greedy, Sampling

__all__ = ["Greedy", "Lossless", "Pace", "Sampling", "Tally"]
