"""What everything else uses, and what knows of no model."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

VERSION = "0.1.0"
"""Of the package."""


def imported(name: str, homes: Mapping[str, str], package: str) -> Any:
    """What a package's `__getattr__` gives for a name: it is imported from its home when it is asked for.

    Args:
        homes: the module of each name, below thoughtbubbles.

    Raises:
        AttributeError: for another name.
    """
    if name not in homes:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    return getattr(import_module(f"thoughtbubbles.{homes[name]}"), name)
