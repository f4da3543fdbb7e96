"""Formats of files: what one holds by its name, and its text or its rows, unpacked where it is compressed."""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

from thoughtbubbles.data.sources.hub import missing_field
from thoughtbubbles.support.errors import DataError, SourceError, UnfinishedError, is_path_error, one_line, os_reason

PROSE_SUFFIXES = (".txt", ".text", ".md", ".rst", ".tex", ".html")
CODE_SUFFIXES = (".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".java", ".js", ".ts", ".go", ".rs", ".rb", ".sh")
TEXT, PARQUET, JSONL, JSON, CSV = "text", "parquet", "jsonl", "json", "csv"
ROW_KINDS = (PARQUET, JSONL, JSON, CSV)
KINDS = dict.fromkeys(PROSE_SUFFIXES + CODE_SUFFIXES, TEXT) | {
    ".parquet": PARQUET,
    ".jsonl": JSONL,
    ".ndjson": JSONL,
    ".json": JSON,
    ".csv": CSV,
    ".tsv": CSV,
}
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz", ".lz4")
# Rows decoded at a time from a parquet file: few, because a row can be a whole book.
PARQUET_ROWS = 32
PARQUET_BUFFER_BYTES = 1 << 20

Row = dict[str, Any]
# A row and the words for where it stands.
PlacedRows = Iterator[tuple[str, Row]]


def file_kind(file: Path) -> str | None:
    """What a file holds by its name, or else by that of the file that it links to: one of `KINDS`, or None."""
    suffix, compression = _suffixes(file)
    if not suffix and compression:
        return TEXT
    kind = KINDS.get(suffix)
    # Its footer is at the end: a packed one could not be read without unpacking it whole.
    return None if kind == PARQUET and compression else kind


def _suffixes(file: Path) -> tuple[str, str]:
    """The suffix that says what is in a file, and that of its compression; "" where there is none."""
    for named in (file, file.resolve()):
        inner = Path(named.stem) if named.suffix.lower() in COMPRESSIONS else named
        compression = named.suffix.lower() if inner is not named else ""
        if inner.suffix.lower() in KINDS or compression:
            break
    return inner.suffix.lower(), compression


def known_suffixes() -> str:
    """The suffixes of files that can be read, in words."""
    return f"{', '.join(sorted(KINDS))}, and those but .parquet packed as {', '.join(sorted(COMPRESSIONS))}"


def read_text_file(path: Path) -> str:
    """The whole text of a file, its line ends as they are, without the mark of UTF-8 in front.

    Raises:
        UnicodeDecodeError: not UTF-8.
        DataError: cannot be read or unpacked.
    """
    with _opened(path) as file:
        return file.read().decode("utf-8-sig")


def file_rows(path: Path, start: int, field: str | None) -> PlacedRows:
    """The rows of a file from number `start` on, each with its place; of one field where the format allows.

    Raises:
        DataError: cannot be read, is not what its suffix says, or has two fields of one name.
    """
    kind = file_kind(path)
    if kind == PARQUET:
        with _read_errors(path):
            yield from _parquet_rows(path, start, field)
        return
    with _opened(path) as file:
        yield from READERS[str(kind)](path, file, start, field)


def holds_rows(path: Path) -> bool:
    """Whether a .json file is a list of objects or a line for each, as data are, and not one object, as settings are.

    Raises:
        DataError: cannot be read.
    """
    with _opened(path) as file:
        first = _first_line(file)
        if first.startswith(b"["):
            return (first[1:].strip() or _first_line(file))[:1] == b"{"
        return _is_object(first) and _first_line(file).startswith(b"{")


def _first_line(file: IO[bytes]) -> bytes:
    """The next line that is not blank, without the white space around it; empty at the end of the file."""
    return next((line.strip() for line in file if line.strip()), b"").removeprefix(codecs.BOM_UTF8)


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """A file's content, unpacked."""
    with _read_errors(path), _unpack(path, _suffixes(path)[1]) as file:
        yield file


def _unpack(path: Path, compression: str) -> IO[bytes]:
    if compression in (".zst", ".lz4"):
        import pyarrow

        stream = pyarrow.input_stream(str(path), compression={".zst": "zstd", ".lz4": "lz4"}[compression])
        return io.BufferedReader(stream)
    openers: Mapping[str, Callable[..., Any]] = {"": open, ".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    file: IO[bytes] = openers[compression](path, "rb")
    return file


@contextmanager
def _read_errors(path: Path) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (EOFError, zlib.error, lzma.LZMAError, pyarrow.ArrowException) as error:
        raise _damaged(path, error) from error
    except OSError as error:
        # Without a number it is the library's word for a file that is damaged.
        kind = SourceError if error.errno is None or is_path_error(error) else UnfinishedError
        raise kind(f"cannot read {path}: {os_reason(error)}") from error


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(f"{path} is not a readable {path.suffix.removeprefix('.')} file: {one_line(error)}")


def _parquet_rows(path: Path, start: int, field: str | None) -> PlacedRows:
    import pyarrow.parquet

    # Without the buffer the whole column of a row group is read at once.
    with pyarrow.parquet.ParquetFile(path, buffer_size=PARQUET_BUFFER_BYTES, pre_buffer=False) as file:
        names = file.schema_arrow.names
        check_names(str(path), names if field is None else [name for name in names if name == field])
        if field is not None:
            _check_text_column(path, file.schema_arrow, field)
        groups, skipped = _groups_from(file.metadata, start)
        columns = None if field is None else [field]
        for batch in file.iter_batches(batch_size=PARQUET_ROWS, row_groups=groups, columns=columns):
            fresh = batch.slice(skipped)
            skipped -= batch.num_rows - fresh.num_rows
            try:
                rows = fresh.to_pylist()
            except ValueError as error:  # not UTF-8, or two fields of one name within a field
                raise _damaged(path, error) from error
            for row in rows:
                yield str(path), row


def _groups_from(metadata: Any, start: int) -> tuple[list[int], int]:
    """The row groups that hold rows from number `start` on, and how many rows of the first to leave out."""
    before = 0
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        if start < before + rows:
            return list(range(group, metadata.num_row_groups)), start - before
        before += rows
    return [], 0


def _check_text_column(path: Path, schema: Any, field: str) -> None:
    from pyarrow import types

    if field not in schema.names:
        raise missing_field(str(path), field, schema.names)
    kind = schema.field(field).type
    if types.is_dictionary(kind):
        kind = kind.value_type
    # A column without a single value has a type of its own.
    if not any(
        is_one(kind) for is_one in (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
    ):
        raise DataError(f"{path}: field {field!r} holds {kind}, expected text")


def check_names(place: str, names: Sequence[str]) -> None:
    """Check that no two fields have one name: which is meant nobody can say.

    Raises:
        DataError: two have; the message begins with `place`.
    """
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"{place} has {names.count(name)} fields {name!r}: expected one of each name")


def _jsonl_rows(path: Path, file: Iterable[bytes], start: int, field: str | None) -> PlacedRows:
    lines = ((number, line) for number, line in enumerate(file, start=1) if line.strip())
    for number, line in islice(lines, start, None):
        place = f"{path}, line {number}"
        yield place, _object(_parse(line, place), place, field)


def _json_rows(path: Path, file: IO[bytes], start: int, field: str | None) -> PlacedRows:
    """The objects of a list, or one object; or of lines, which many tools name .json too."""
    first = file.readline()
    if _is_object(first.strip()):
        yield from _jsonl_rows(path, chain([first], file), start, field)
        return
    content = _parse(first + file.read(), str(path))
    rows = content if isinstance(content, list) else [content]
    for number, row in islice(enumerate(rows, start=1), start, None):
        place = f"{path}, row {number}"
        yield place, _object(row, place, field)


def _parse(text: bytes, place: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> Row:
        found = dict(pairs)
        if len(found) < len(pairs):
            check_names(place, [name for name, _ in pairs])
        return found

    try:
        return json.loads(text, object_pairs_hook=unique)
    except DataError:
        raise
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place} is not JSON that can be read: {one_line(error)}") from error


def _object(value: Any, place: str, field: str | None) -> Row:
    if not isinstance(value, dict):
        wanted = "an object" if field is None else f"an object with the field {field!r}"
        raise DataError(f"{place} holds a {type(value).__name__}, expected {wanted}")
    return value


def _csv_rows(path: Path, file: IO[bytes], start: int, field: str | None) -> PlacedRows:
    csv.field_size_limit(sys.maxsize)
    delimiter = "\t" if _suffixes(path)[0] == ".tsv" else ","
    # Line ends inside quotes are text: they stay as they are.
    with io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as lines:
        rows = csv.reader(lines, delimiter=delimiter, strict=True)
        try:
            names = next(rows, [])
            check_names(str(path), names)
            for values in islice((values for values in rows if values), start, None):
                place = f"{path}, line {rows.line_num}"
                if len(values) != len(names):
                    raise DataError(f"{place} has {len(values)} fields, expected {len(names)} as in the first line")
                yield place, {name: value or None for name, value in zip(names, values, strict=True)}
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path}, line {rows.line_num + 1} is not CSV in UTF-8: {error}") from error


READERS: Mapping[str, Callable[[Path, IO[bytes], int, str | None], PlacedRows]] = {
    JSONL: _jsonl_rows,
    JSON: _json_rows,
    CSV: _csv_rows,
}
