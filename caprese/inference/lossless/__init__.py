"""Lossless generation: cheap layers draft, the dense model verifies, and the text is the dense model's own."""

from caprese.inference.lossless.entry import Lossless
from caprese.inference.lossless.pace import Pace, Tally
from caprese.inference.lossless.rules import Greedy, Rule, Sampling, rule_of

__all__ = ["Greedy", "Lossless", "Pace", "Rule", "Sampling", "Tally", "rule_of"]
