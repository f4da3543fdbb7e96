"""The text of a row: one of its fields, or a Jinja template over all of them."""

import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from thoughtbubbles.support.errors import DataError, one_line

if TYPE_CHECKING:
    from jinja2 import Environment, Template


class Null(str):
    """A value that a row lacks, in a template: an empty text, whatever is asked of it."""

    __slots__ = ()

    def __call__(self, *_: Any, **__: Any) -> "Null":
        """What a method of it gives."""
        return self

    def __eq__(self, other: object) -> bool:
        return other is None or str.__eq__(self, other) is True

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


NULL = Null()


def check_template(place: str, template: str) -> None:
    """Check that a template can be read.

    Raises:
        DataError: it is not one of Jinja; the message begins with `place`.
    """
    from jinja2 import TemplateSyntaxError

    try:
        _compiled(template)
    except TemplateSyntaxError as error:
        raise DataError(f"{place}: template, line {error.lineno}: {one_line(error)}") from None


def render(template: str, row: Mapping[str, Any], place: str) -> str:
    """A template filled with the fields of a row; lines that hold a statement alone leave no line behind.

    A null, or the number that is none, at whatever depth is an empty text, and so is all that is asked of it; where
    nothing but white space comes out, the text is empty.

    Args:
        template: of Jinja, as chat templates are, with the same settings and as safe.
        row: its variables.
        place: names the row in messages.

    Raises:
        DataError: a field that the row lacks, or one that the template cannot use.
    """
    try:
        text = _compiled(template).render(_mapped(_with_null, dict(row)))
    except Exception as error:  # whatever an expression of the template may raise
        has = ", ".join(map(repr, row)) or "no fields"
        raise DataError(f"{place}: template: {one_line(error)}; the row has {has}") from None
    return text if text.strip() else ""


def _with_null(value: Any) -> Any:
    """`NULL` for a value that is missing; tables write a number so as the one that does not equal itself."""
    return NULL if value is None or value != value else value


def _without_null(value: Any) -> Any:
    return None if isinstance(value, Null) else value


def _mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """A value with the change made to all that is in its lists and mappings."""
    match value:
        case dict():
            return {key: _mapped(change, each) for key, each in value.items()}
        case list():
            return [_mapped(change, each) for each in value]
        case _:
            return change(value)


@lru_cache
def _compiled(template: str) -> "Template":
    return _environment().from_string(template)


@lru_cache
def _environment() -> "Environment":
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class RowEnvironment(ImmutableSandboxedEnvironment):
        def getattr(self, obj: Any, attribute: str) -> Any:
            return obj if isinstance(obj, Null) else super().getattr(obj, attribute)

        def getitem(self, obj: Any, argument: Any) -> Any:
            return obj if isinstance(obj, Null) else super().getitem(obj, argument)

    environment = RowEnvironment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.finalize = lambda value: NULL if value is None else value
    environment.tests["none"] = lambda value: value is None or isinstance(value, Null)
    environment.policies["json.dumps_function"] = lambda value, **options: json.dumps(
        _mapped(_without_null, value), **options
    )
    return environment
