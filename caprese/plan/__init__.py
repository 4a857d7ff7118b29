"""--dry-run: what a run will do, take and hold, without loading a weight."""

from caprese.plan.job import config_of, plan

__all__ = ["config_of", "plan"]
