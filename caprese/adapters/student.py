"""A hybrid has the mixers of one adapter, and PEFT would load of another what is not mixers."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any, cast

from huggingface_hub import hf_hub_download
from peft import PeftModel

from caprese.adapters.sidecar import STAND_INS
from caprese.efficient_methods.hooks import mixed
from caprese.errors import CapreseError
from caprese.files import sha256
from caprese.models.answers import checked_answers

# of what PEFT passes on to the hub
_HUB = ("revision", "token", "cache_dir", "local_files_only", "subfolder")


class OneStudent(PeftModel):
    """Mixed into a PeftModel's class.

    Attributes:
        mixers: the digest of the file that its mixers are of; None where they were never in one.
    """

    mixers: str | None

    @staticmethod
    def put_on(model: PeftModel, mixers: str | None) -> None:
        changed: Any = model
        changed.__class__ = mixed(OneStudent, cast(Hashable, type(model)))
        changed.mixers = mixers

    def load_adapter(self, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """As PEFT's.

        Raises:
            CapreseError: an adapter that has other mixers.
        """
        found = _mixers_of(str(model_id), {name: kwargs[name] for name in _HUB if kwargs.get(name) is not None})
        if found is not None and sha256(found) != self.mixers:
            raise CapreseError(
                f"{model_id} has mixers of its own, and this model has others; caprese.load it on a base of its own"
            )
        return super().load_adapter(model_id, adapter_name, *args, **kwargs)


def _mixers_of(name: str, how: dict[str, Any]) -> Path | None:
    """The file with an adapter's mixers, where PEFT is going to read; what is wrong with the place, PEFT will say."""
    directory = Path(name) / how.get("subfolder", "")
    if directory.is_dir():
        return directory / STAND_INS if (directory / STAND_INS).is_file() else None
    try:
        with checked_answers():
            return Path(hf_hub_download(name, STAND_INS, **how))
    except (OSError, ValueError):
        return None
