"""Preparation recipes: the options of `prepare` in a YAML file, every key checked."""

import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from thoughtbubbles.support.errors import DataError
from thoughtbubbles.support.files import user_path
from thoughtbubbles.support.options import option

PYTHON_STDLIB = "python-stdlib"
SourceName = str | Mapping[str, Any]


@dataclass(frozen=True)
class Preparation:
    """What to prepare, and how: whatever changes the result of `prepare`, with the help of the command.

    A source is `python-stdlib` (the running Python's standard library, a file a document), a text file (one
    document), a folder (every text, parquet and jsonl file below it), a parquet or jsonl file (a row a document), a
    glob, or a dataset of the Hugging Face hub (a row a document) as
    `hf:NAME?config=C&split=S&field=F&streaming=true&revision=R&data_files=G`, of which all but NAME can be left out
    and NAME can be a folder; or a mapping with `hub` or `path` and those keys, or with `template`, of Jinja over the
    fields of a row, in place of `field`.

    A document of `sources` that holds the same text as one of `validation` is left out. Tokens are counted with
    separators, and the document that reaches `limit_tokens` is the last; a tokenizer is trained on documents beyond
    it too. It is trained on the training documents, or on a sample of them of `TOKENIZER_TRAINING_BYTES`.
    """

    sources: Sequence[SourceName] = option("Names of sources.", (PYTHON_STDLIB,))
    text_field: str = option("Field of rows that holds the text, where a source names none.", "text")
    tokenizer: str | None = option(
        "Tokenizer folder, or name on the hub, with an eos token; without, a byte-level BPE is trained on the corpus.",
        None,
    )
    vocab_size: int = option("Vocabulary of the trained tokenizer, at most; of no effect on a given one.", 4096)
    block_size: int = option("Tokens a block.", 512)
    validation_fraction: float = option("Share of the documents held out.", 0.05)
    validation: Sequence[SourceName] = option("Names of sources for validation, instead of held-out documents.", ())
    limit_tokens: int | None = option("Tokens to read of each source at most; validation sources are read whole.", None)
    seed: int = option("Seed of the split and of the documents' order.", 0)


def load_preparation(path: str | Path) -> Preparation:
    """Read a preparation recipe.

    Args:
        path: a YAML file whose keys are fields of `Preparation`.

    Raises:
        DataError: no such file, not YAML, an unknown key, or a value of the wrong type.
    """
    from thoughtbubbles.recipes.values import check_known, read_yaml

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
    from thoughtbubbles.recipes.values import convert

    if typing.get_origin(hint) is not Sequence:
        return convert(key, value, hint, DataError)
    if not isinstance(value, list) or not all(isinstance(source, str | dict) for source in value):
        raise DataError(f"{key}={value!r}: expected a list of names, or of mappings with the key hub or path")
    return tuple(value)
