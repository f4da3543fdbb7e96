"""Options read from YAML: unknown keys and values of a wrong type are one clear line."""

import difflib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from thoughtbubbles.errors import InputError, one_line

WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def read_yaml(path: Path, error: type[InputError]) -> Any:
    """What a YAML file holds.

    Raises:
        InputError: no such file, one that cannot be read, or not YAML.
    """
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"recipe {path}: no such file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as reason:
        raise error(f"recipe {path}: {one_line(reason)}") from None


def check_known(name: object, known: Sequence[str], what: str, error: type[InputError], prefix: str = "") -> None:
    """Check that a name is one of those known.

    Args:
        name: the name that was given.
        known: the names that there are.
        what: what it names, for the message: `key`, `section`.
        error: the error to raise.
        prefix: what stands before the name in the message.

    Raises:
        InputError: it is none of them; the message has the nearest one, or all.
    """
    if name in known:
        return
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f"did you mean {prefix}{near[0]}?" if near else f"expected one of {', '.join(known)}"
    raise error(f"unknown {what} {prefix}{name}: {hint}")


def convert(key: str, value: Any, hint: Any, error: type[InputError]) -> Any:
    """`value` as the type `hint`, which is bool, int, float, str, or one of them or None.

    Raises:
        InputError: it is of another type; the message has the key, the value and what was expected.
    """
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in allowed:
        return None
    kind = allowed[0]
    # YAML 1.1 reads 3e-4, without a point, as text.
    if kind is float and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    elif type(value) is kind:
        return value
    raise error(f"{key}={value!r}: expected {WORDS[kind]}{' or null' if type(None) in allowed else ''}")
