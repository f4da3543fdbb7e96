"""Preparation recipes: the options of `prepare` in a YAML file, every key checked."""

from pathlib import Path
from typing import Any

from thoughtbubbles.recipes.values import check_known, convert, read_yaml
from thoughtbubbles.support.errors import DataError
from thoughtbubbles.support.files import user_path

# The keys and their types: whatever changes the result. Where to write and how fast are matters of the command line.
KEYS: dict[str, Any] = {
    "sources": list,
    "text_field": str,
    "tokenizer": str | None,
    "vocab_size": int,
    "block_size": int,
    "validation_fraction": float,
    "validation": list,
    "limit_tokens": int | None,
    "seed": int,
}


def load_preparation(path: str | Path) -> dict[str, Any]:
    """Read a preparation recipe.

    Args:
        path: a YAML file whose keys are arguments of `prepare`. A source is a name, or a mapping with `hub` or `path`.

    Returns:
        The arguments that it names.

    Raises:
        DataError: no such file, not YAML, an unknown key, or a value of the wrong type.
    """
    place = f"recipe {path}"
    content = read_yaml(user_path(path), DataError)
    if not isinstance(content, dict):
        raise DataError(f"{place}: expected keys and values, of {', '.join(KEYS)}")
    try:
        for key in content:
            check_known(key, list(KEYS), "key", DataError)
    except DataError as error:
        raise DataError(f"{place}: {error}") from None
    return {key: _value(f"{place}: {key}", value, KEYS[key]) for key, value in content.items()}


def _value(key: str, value: Any, hint: Any) -> Any:
    if hint is not list:
        return convert(key, value, hint, DataError)
    if not isinstance(value, list) or not all(isinstance(source, str | dict) for source in value):
        raise DataError(f"{key}={value!r}: expected a list of names, or of mappings with the key hub or path")
    return value
