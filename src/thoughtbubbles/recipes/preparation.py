"""Preparation recipes: the options of `prepare` in a YAML file, every key checked."""

import typing
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from thoughtbubbles.recipes.options import Preparation
from thoughtbubbles.recipes.values import Number, check_known, convert, read_yaml
from thoughtbubbles.support.errors import DataError
from thoughtbubbles.support.files import user_path


def load_preparation(path: str | Path) -> Preparation:
    """Read a preparation recipe.

    Args:
        path: a YAML file whose keys are fields of `Preparation`.

    Raises:
        DataError: no such file, not YAML, an unknown key, or a value of the wrong type.
    """
    place = f"recipe {path}"
    kinds: dict[str, Any] = {each.name: each.type for each in fields(Preparation)}
    content = read_yaml(user_path(path), DataError)
    if not isinstance(content, dict):
        raise DataError(f"{place}: expected keys and values, of {', '.join(kinds)}")
    try:
        for key in content:
            check_known(key, list(kinds), "key", DataError)
    except DataError as error:
        raise DataError(f"{place}: {error}") from None
    return Preparation(**{key: _value(f"{place}: {key}", value, kinds[key]) for key, value in content.items()})


def _value(key: str, value: Any, hint: Any) -> Any:
    if typing.get_origin(hint) is not Sequence:
        return convert(key, value, Number if hint is float else hint, DataError)
    if not isinstance(value, list) or not all(isinstance(source, str | dict) for source in value):
        raise DataError(f"{key}={value!r}: expected a list of names, or of mappings with the key hub or path")
    return tuple(value)
