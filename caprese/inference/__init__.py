"""Running a recovered model: the fused decode step, and the one decode loop."""

from caprese.inference.fused import Form, fuse, is_fused, load, unfuse
from caprese.inference.generate import Decoding, stream

__all__ = ["Decoding", "Form", "fuse", "is_fused", "load", "stream", "unfuse"]
