"""Options as fields of a dataclass."""

import copy
from dataclasses import MISSING, field
from typing import Any


def option(help_text: str, default: Any = MISSING) -> Any:
    """A field of a dataclass whose help is its documentation."""
    metadata = {"help": help_text}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return field(default=default, metadata=metadata)
