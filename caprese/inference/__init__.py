"""Running a recovered model: the fused decode step, and decoding with its timing."""

from caprese.inference.decoding import stream
from caprese.inference.fused import Form, fuse, is_fused, load, unfuse

__all__ = ["Form", "fuse", "is_fused", "load", "stream", "unfuse"]
