"""What gives it back: the low-rank branch in the slot, an adapter's files, and the fingerprint of its base."""

from caprese.adapters.adapter import Adapter
from caprese.adapters.branch import (
    attach_adapter,
    branch_parameters,
    empty_slots,
    get_branches,
    set_branch,
    set_branches,
    without_branches,
)
from caprese.adapters.fingerprint import Fingerprint, fingerprint
from caprese.adapters.loading import load
from caprese.adapters.saving import save
from caprese.adapters.sidecar import public_id

__all__ = [
    "Adapter",
    "Fingerprint",
    "attach_adapter",
    "branch_parameters",
    "empty_slots",
    "fingerprint",
    "get_branches",
    "load",
    "public_id",
    "save",
    "set_branch",
    "set_branches",
    "without_branches",
]
