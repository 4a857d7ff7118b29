"""A recovered model as an ordinary checkpoint that needs no caprese."""

from caprese.exports.checkpoint import export, plan_export

__all__ = ["export", "plan_export"]
