"""Corpora: from the name of a source to its documents, read lazily and in a fixed order (Design 7)."""

import glob
import json
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thoughtbubbles.data.errors import DataError

PYTHON_STDLIB = "python-stdlib"

PROSE_SUFFIXES = (".txt", ".text", ".md", ".rst", ".tex", ".html")
CODE_SUFFIXES = (".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".java", ".js", ".ts", ".go", ".rs", ".rb", ".sh")
KINDS = dict.fromkeys(PROSE_SUFFIXES + CODE_SUFFIXES, "text") | {".parquet": "parquet", ".jsonl": "jsonl"}

# Rows decoded at a time from a parquet file: few, because a row can be a whole book.
PARQUET_ROWS = 32
PARQUET_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True)
class Source:
    """A named source and the files that it stands for, in reading order.

    Attributes:
        name: the source as the user wrote it.
        files: the files, sorted by path.
    """

    name: str
    files: tuple[Path, ...]

    @property
    def kind(self) -> str:
        """`python-stdlib`, or what the files are: `text`, `parquet`, `jsonl`, joined by `+` if several."""
        if self.name == PYTHON_STDLIB:
            return PYTHON_STDLIB
        return "+".join(sorted({KINDS[file.suffix.lower()] for file in self.files}))


def resolve_source(name: str) -> Source:
    """Find the files of a source.

    Args:
        name: `python-stdlib`, a file, a folder (every file of a known suffix below it, hidden ones apart) or a glob.

    Raises:
        DataError: nothing there, no file of a known suffix, or a file of an unknown one.
    """
    if name == PYTHON_STDLIB:
        return Source(name, tuple(_stdlib_files()))
    path = Path(name).expanduser()
    if path.exists():
        found = [path]
    elif glob.has_magic(name):
        found = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]  # noqa: PTH207
    else:
        raise DataError(f"source {name!r} does not exist: expected a file, a folder, a glob or {PYTHON_STDLIB!r}")
    files = [file.resolve() for match in found for file in _expand(match)]
    if not files:
        raise DataError(f"source {name!r} has no files to read: expected {_known_suffixes()}")
    # A recursive glob matches a folder and the files in it: each file counts once.
    return Source(name, tuple(dict.fromkeys(files)))


def read_documents(source: Source, text_field: str) -> Iterator[str | None]:
    """The documents of a source, one at a time; None stands for one that was skipped.

    A text file is one document, a row of a parquet or jsonl file is one. A document is skipped if it is empty or
    cannot be written as UTF-8. Reading twice gives the same documents in the same order.

    Raises:
        DataError: a file that cannot be read, or has no field `text_field` of text.
    """
    readers = {"text": _read_text, "parquet": _read_parquet, "jsonl": _read_jsonl}
    for file in source.files:
        try:
            for text in readers[KINDS[file.suffix.lower()]](file, text_field):
                yield text if text and _is_utf8(text) else None
        except OSError as error:
            raise DataError(f"cannot read {file}: {error.strerror or error}") from error


def _known_suffixes() -> str:
    return ", ".join(sorted(KINDS))


def _expand(path: Path) -> list[Path]:
    if path.is_dir():
        return _walk(path, skipped_folders={"__pycache__"})
    if path.suffix.lower() not in KINDS:
        raise DataError(f"{path} has the unknown suffix {path.suffix!r}: expected {_known_suffixes()}")
    return [path]


def _walk(root: Path, skipped_folders: set[str]) -> list[Path]:
    """Files of a known suffix below a folder, hidden files and folders apart, sorted by relative path."""
    files = []
    for folder, names, leaves in os.walk(root):
        names[:] = [name for name in names if name not in skipped_folders and not name.startswith(".")]
        known = [leaf for leaf in leaves if Path(leaf).suffix.lower() in KINDS and not leaf.startswith(".")]
        files += [Path(folder, leaf) for leaf in known]
    return sorted(files, key=lambda file: file.relative_to(root).as_posix())


def _stdlib_files() -> list[Path]:
    skipped = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
    root = Path(sysconfig.get_path("stdlib")).resolve()
    files = [file for file in _walk(root, skipped) if file.suffix == ".py"]
    if not files:
        raise DataError(f"source {PYTHON_STDLIB!r} is empty: no *.py files in {root}")
    return files


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate, as JSON can spell it
        return False
    return True


def _read_text(path: Path, _text_field: str) -> Iterator[str | None]:
    try:
        yield path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        yield None


def _read_parquet(path: Path, text_field: str) -> Iterator[str | None]:
    import pyarrow
    import pyarrow.parquet

    try:
        # Without the buffer the whole column of a row group is read at once.
        with pyarrow.parquet.ParquetFile(path, buffer_size=PARQUET_BUFFER_BYTES, pre_buffer=False) as file:
            _check_text_column(path, file.schema_arrow, text_field)
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=[text_field]):
                for value in batch.column(0):
                    yield value.as_py()
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path} is not a readable parquet file: {error}") from error


def _check_text_column(path: Path, schema: Any, text_field: str) -> None:
    from pyarrow import types

    if text_field not in schema.names:
        raise _missing_field(str(path), text_field, schema.names)
    kind = schema.field(text_field).type
    if types.is_dictionary(kind):
        kind = kind.value_type
    if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
        raise DataError(f"{path}: field {text_field!r} holds {kind}, expected text")


def _read_jsonl(path: Path, text_field: str) -> Iterator[str | None]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _text_of_line(line, f"{path}, line {number}", text_field)


def _text_of_line(line: bytes, place: str, text_field: str) -> str | None:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{place} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise DataError(f"{place} holds a {type(row).__name__}, expected an object with the field {text_field!r}")
    if text_field not in row:
        raise _missing_field(place, text_field, list(row))
    text = row[text_field]
    if text is not None and not isinstance(text, str):
        raise DataError(f"{place}: field {text_field!r} holds a {type(text).__name__}, expected text")
    return text


def _missing_field(place: str, text_field: str, fields: Sequence[str]) -> DataError:
    return DataError(f"{place} has no field {text_field!r}: it has {', '.join(map(repr, fields)) or 'no fields'}")
