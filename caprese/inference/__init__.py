"""Running a recovered model: decoding with its timing."""

from caprese.inference.decoding import stream

__all__ = ["stream"]
