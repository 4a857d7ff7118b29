"""Running a recovered model: the fused decode step, and the one decode loop."""

from caprese.inference.decoding import stream
from caprese.inference.fused import Form, fuse, is_fused, load, unfuse

__all__ = ["Form", "fuse", "is_fused", "load", "stream", "unfuse"]
