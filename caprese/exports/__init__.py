"""A recovered model as an ordinary checkpoint that needs no caprese."""

from caprese.exports.checkpoint import check_target, export, plan_export
from caprese.exports.compressed import dense_checkpoints
from caprese.exports.gguf import dense_ggufs

__all__ = ["check_target", "dense_checkpoints", "dense_ggufs", "export", "plan_export"]
