"""What gives it back: the low-rank branch in the slot, its files, and the fingerprint of its base."""

from caprese.adapters.branch import (
    attach_adapter,
    branch_parameters,
    empty_slots,
    get_branches,
    set_branch,
    set_branches,
)
from caprese.adapters.fingerprint import fingerprint
from caprese.adapters.storage import (
    Sidecar,
    base_revision,
    check_base,
    check_files,
    has_branches,
    load,
    load_base_for,
    locate,
    public_id,
    ranks_of,
    read_sidecar,
    save,
)

__all__ = [
    "Sidecar",
    "attach_adapter",
    "base_revision",
    "branch_parameters",
    "check_base",
    "check_files",
    "empty_slots",
    "fingerprint",
    "get_branches",
    "load",
    "load_base_for",
    "locate",
    "public_id",
    "has_branches",
    "ranks_of",
    "read_sidecar",
    "save",
    "set_branch",
    "set_branches",
]
