"""Running a recovered model: the fused decode step, and decoding with its timing."""

from caprese.inference.checkpoint import export, plan_export
from caprese.inference.decoding import stream
from caprese.inference.fused import Form, fuse, is_fused, load, unfuse

__all__ = ["Form", "export", "fuse", "is_fused", "load", "plan_export", "stream", "unfuse"]
