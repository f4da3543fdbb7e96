"""Options read from YAML: unknown keys and values of a wrong type are one clear line."""

import difflib
import math
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from thoughtbubbles.support.errors import InputError, one_line, shown

WORDS = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text"}
# What no recipe needs, and what would take for ever to compare, to print or to write.
MOST_LEVELS = 16
MOST_VALUES = 100_000
# numpy takes no other seeds.
MOST_SEED = 2**32 - 1


def read_yaml(path: Path, error: type[InputError]) -> Any:
    """What a YAML file holds.

    Raises:
        InputError: no such file, one that cannot be read, not YAML, or nested deeply.
    """
    try:
        return parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"recipe {path}: no such file") from None
    except (OSError, ValueError) as reason:
        raise error(f"recipe {path}: {one_line(reason)}") from None


def parse_yaml(text: str) -> Any:
    """What a YAML text holds.

    Raises:
        ValueError: if it is not YAML, or nested deeply.
    """
    try:
        content = yaml.safe_load(text)
    except RecursionError:
        raise ValueError(f"expected at most {MOST_LEVELS} levels of keys and values") from None
    except Exception as reason:  # of a bad date or number it raises what Python does
        raise ValueError(one_line(reason)) from None
    _check_size(content)
    return content


def _check_size(content: Any) -> None:
    """Refuse what is nested deeply, or is large because an alias stands for it again and again."""
    level, depth, count = [content], 0, 0
    while level:
        count += len(level)
        if depth > MOST_LEVELS or count > MOST_VALUES:
            raise ValueError(f"expected at most {MOST_LEVELS} levels of keys and values, {MOST_VALUES:,} in all")
        depth, level = depth + 1, [inner for each in level for inner in _inside(each)]


def _inside(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    return list(value) if isinstance(value, list | tuple | set) else []


def check_seed(key: str, seed: int, error: type[InputError]) -> None:
    """Check that every generator of random numbers takes a seed.

    Raises:
        InputError: naming the key and the value.
    """
    if not 0 <= seed <= MOST_SEED:
        raise error(f"{key}={shown(seed)}: expected a whole number from 0 to {MOST_SEED} (2^32 - 1)")


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
    if name not in known:
        raise error(f"unknown {what} {prefix}{name}: {nearest(name, known, prefix)}")


def nearest(name: object, known: Sequence[str], prefix: str = "") -> str:
    """The name that was meant, or all names where none is like it, in words."""
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    return f"did you mean {prefix}{near[0]}?" if near else f"expected one of {', '.join(known)}"


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
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
    elif type(value) is kind:
        return value
    raise error(f"{key}={shown(value)}: expected {WORDS[kind]}{' or null' if type(None) in allowed else ''}")


def expand_user(key: str, path: str, error: type[InputError]) -> str:
    """A path whose leading `~` or `~USER` is the home folder that it stands for.

    Raises:
        InputError: there is no such user; the message has the key and the path.
    """
    if not path.startswith("~"):
        return path
    try:
        return str(Path(path).expanduser())
    except RuntimeError:
        raise error(f"{key}={path!r}: expected the home folder of a user that there is") from None
