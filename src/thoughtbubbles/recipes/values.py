"""Options read from YAML: unknown keys and values of a wrong type are one clear line."""

import dataclasses
import difflib
import textwrap
import typing
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import yaml
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from thoughtbubbles.support.errors import InputError, one_line, shown

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from pydantic_core import ErrorDetails

Section = TypeVar("Section", bound="DataclassInstance")
STRICT = ConfigDict(strict=True, allow_inf_nan=False)
"""No value is taken for another type than YAML gave it: `True` is no 1, and 1.5 no whole number."""
WORDS = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text"}
# What pydantic's errors say, in our words.
EXPECTED = {
    "int_type": WORDS[int],
    "float_type": WORDS[float],
    "finite_number": WORDS[float],
    "bool_type": WORDS[bool],
    "string_type": WORDS[str],
    "string_unicode": WORDS[str],
    "list_type": "a list",
    "dict_type": "a mapping",
    "literal_error": "one of {expected}",
    "greater_than": "a number above {gt:g}",
    "greater_than_equal": "at least {ge:,.0f}",
    "less_than": "a number below {lt:g}",
    "less_than_equal": "at most {le:,.0f}",
    "too_short": "a list of at least {min_length}",
}
# What no recipe needs, and what would take for ever to compare, to print or to write.
MOST_LEVELS = 16
MOST_VALUES = 100_000
# Beyond, a run has no end.
MOST = 2**31 - 1
# numpy takes no other seeds.
MOST_SEED = 2**32 - 1


def _read_number(value: Any) -> Any:
    # YAML 1.1 reads 3e-4, without a point, as text.
    if isinstance(value, str):
        with suppress(ValueError):
            return float(value)
    return value


def _check_seed(value: int) -> int:
    if not 0 <= value <= MOST_SEED:
        raise ValueError(f"expected a whole number from 0 to {MOST_SEED} (2^32 - 1)")
    return value


def _check_different(values: list[Any]) -> list[Any]:
    if not values or len(set(values)) < len(values):
        raise ValueError("expected one or more, all different")
    return values


def expand_home(path: str) -> str:
    """A path whose leading `~` or `~USER` is the home folder that it stands for.

    Raises:
        ValueError: there is no such user.
    """
    if not path.startswith("~"):
        return path
    try:
        return str(Path(path).expanduser())
    except RuntimeError:
        raise ValueError("expected the home folder of a user that there is") from None


Number = Annotated[float, BeforeValidator(_read_number)]
Positive = Annotated[Number, Field(gt=0)]
Share = Annotated[Number, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1, le=MOST)]
Seed = Annotated[int, AfterValidator(_check_seed)]
Different = AfterValidator(_check_different)
UserPath = Annotated[str, AfterValidator(expand_home)]


def parse_section(section: type[Section], prefix: str, values: Any, error: type[InputError]) -> Section:
    """A section, a pydantic dataclass of options, from its keys and values.

    Args:
        prefix: what stands before the keys in messages, without a point; "" is nothing.
        error: the error to raise.

    Raises:
        InputError: no mapping, an unknown or missing key, or a value of the wrong type or beyond its range.
    """
    check_mapping(prefix, values, error)
    dot = f"{prefix}." if prefix else ""
    for name in values:
        check_known(name, key_names(section), "key", error, dot)
    try:
        return section(**values)
    except ValidationError as reason:
        found = reason.errors(include_url=False)[0]
    if not found["loc"]:  # what the section says of its values together
        raise error(f"{prefix}: {found['ctx']['error']}")
    name = str(found["loc"][0])
    if found["type"] == "missing":
        help_text = next(spec.metadata["help"] for spec in dataclasses.fields(section) if spec.name == name)
        raise error(f"{dot}{name} is missing: expected the {help_text}")
    raise error(_explain(found, dot + name, found["loc"][1:], typing.get_type_hints(section)[name]))


def convert(key: str, value: Any, hint: Any, error: type[InputError]) -> Any:
    """`value` as the type `hint`, where it is of that.

    Raises:
        InputError: it is not; the message has the key, the value and what was expected.
    """
    try:
        return TypeAdapter(hint, config=STRICT).validate_python(value)
    except ValidationError as reason:
        found = reason.errors(include_url=False)[0]
    raise error(_explain(found, key, found["loc"], hint))


def _explain(found: "ErrorDetails", key: str, inside: tuple[int | str, ...], hint: Any) -> str:
    """What pydantic found, in one line: the key, the value and what was expected.

    Args:
        inside: the place in the key's value, of items of lists and mappings.
        hint: the key's type.
    """
    key += "".join(f"[{each}]" for each in inside if each != "[key]")
    value, context = shown(found["input"]), dict(found.get("ctx", {}))
    if found["type"] == "value_error":  # of our own
        text = str(context["error"])
        return f"{key}={value}: {text}" if text.startswith("expected") else f"{key}: {text}"
    if "expected" in context:
        context["expected"] = context["expected"].replace("'", "").replace(" or ", ", ")
    words = EXPECTED[found["type"]].format(**context)
    optional = not inside and type(None) in typing.get_args(hint)
    return f"{key}={value}: expected {words}{' or null' * optional}"


def key_names(section: "type[DataclassInstance]") -> list[str]:
    """The keys that a section may have."""
    return [spec.name for spec in dataclasses.fields(section)]


def describe_section(section: "type[DataclassInstance]", indent: str = "  ") -> list[str]:
    """The keys that a section may have: type, default and what they mean."""
    lines = []
    hints = typing.get_type_hints(section)
    for spec in dataclasses.fields(section):
        lines.append(f"{indent}{spec.name}: {_type_name(hints[spec.name])}{_default(spec)}")
        lines += wrapped(spec.metadata["help"], f"{indent}    ")
    return lines


def wrapped(text: str, indent: str) -> list[str]:
    """The lines of an indented paragraph."""
    return textwrap.wrap(text, width=100, initial_indent=indent, subsequent_indent=indent, break_long_words=False)


def _type_name(hint: Any) -> str:
    """A type in words."""
    kind, inside = typing.get_origin(hint), typing.get_args(hint)
    if type(None) in inside:
        return f"{_type_name(inside[0])} or null"
    if kind is typing.Literal:
        return ", ".join(inside)
    return {list: "a list", dict: "a mapping"}.get(kind) or WORDS.get(hint, "a mapping")


def _default(spec: "dataclasses.Field[Any]") -> str:
    if spec.default_factory is not dataclasses.MISSING:
        return f" [{spec.default_factory()}]"
    if spec.default is dataclasses.MISSING:
        return " (needed)"
    return f" [{'null' if spec.default is None else str(spec.default).lower()}]"


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
    try:
        _check_seed(seed)
    except ValueError as reason:
        raise error(f"{key}={shown(seed)}: {reason}") from None


def check_mapping(key: str, value: Any, error: type[InputError]) -> None:
    """Check that a section has keys and values.

    Raises:
        InputError: it is something else.
    """
    if not isinstance(value, Mapping):
        raise error(f"{key}: {shown(value)}: expected keys and values")


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
