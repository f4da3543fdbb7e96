"""The text of a row: one of its fields, or a Jinja template over all of them."""

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from thoughtbubbles.data.errors import DataError
from thoughtbubbles.errors import one_line

if TYPE_CHECKING:
    from jinja2 import Template


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

    Args:
        template: of Jinja, as chat templates are, with the same settings and as safe.
        row: its variables.
        place: names the row in messages.

    Raises:
        DataError: a field that the row lacks, or one that the template cannot use.
    """
    try:
        return _compiled(template).render(row)
    except Exception as error:  # whatever an expression of the template may raise
        has = ", ".join(map(repr, row)) or "no fields"
        raise DataError(f"{place}: template: {one_line(error)}; the row has {has}") from None


@lru_cache
def _compiled(template: str) -> "Template":
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template)
