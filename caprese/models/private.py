"""What transformers keeps to itself and caprese needs all the same: asked for by name, so that a version without it is
one clear line."""

from __future__ import annotations

from typing import Any

import transformers

from caprese.errors import CapreseError


def needed(owner: Any, name: str) -> Any:
    """`owner.name`.

    Raises:
        CapreseError: this version of transformers has none.
    """
    try:
        return getattr(owner, name)
    except AttributeError:
        raise CapreseError(
            f"transformers {transformers.__version__} has no {type(owner).__name__}.{name}, which caprese needs; "
            "install versions that go together: pip install -U caprese transformers"
        ) from None
