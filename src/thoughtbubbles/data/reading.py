"""Reading: the rows and the documents of a source, one at a time, from any place at which an earlier reading stopped.

A text file is one document; a row of a parquet or jsonl file or of a hub dataset is one. Reading twice gives the same
in the same order.
"""

import copy
import json
from collections.abc import Generator, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from thoughtbubbles.data.corpora import FileSource, Source, file_kind
from thoughtbubbles.data.errors import DataError, SourceError, UnfinishedError
from thoughtbubbles.data.hub import HubReader, HubSource, missing_field, newest_commit
from thoughtbubbles.data.rowtext import render
from thoughtbubbles.errors import is_path_error, one_line, os_reason

# Rows decoded at a time from a parquet file: few, because a row can be a whole book.
PARQUET_ROWS = 32
PARQUET_BUFFER_BYTES = 1 << 20

Row = dict[str, Any]
# None stands for a document that is empty or cannot be written as UTF-8.
Documents = Generator[str | None, None, None]
# Where a reading stands, as JSON can hold it.
Position = dict[str, Any]


class Reader(Protocol):
    """The documents of a source in order."""

    def documents(self, start: Position | None = None) -> Documents:
        """The documents from a place on.

        Args:
            start: what `position` of a reader of the same source gave; None is the first document.
        """
        ...

    def position(self) -> Position:
        """Where the last document given ends, and the next begins."""
        ...


class Shards(Protocol):
    """A source in parts, its files, each of which can be read by itself.

    Attributes:
        name: of the source.
        commit: of the hub's dataset that is read; None for other sources, or if the hub does not say.
    """

    name: str
    commit: str | None

    def __len__(self) -> int: ...

    def open(self, number: int) -> Reader:
        """A reader of a shard's documents."""
        ...

    def at(self, commit: str) -> "Shards":
        """The same source as another commit has it."""
        ...


def open_documents(source: Source, text_field: str, progress: bool = False) -> Reader:
    """Open a source for reading.

    Args:
        source: the source.
        text_field: the field of its rows that holds the text, if the source names none and has no template.
        progress: show the bars of a hub dataset's download.

    Raises:
        DataError: a hub dataset that is not there, or has no such field of text. Other errors come with the reading:
            a file that cannot be read, or has no field `text_field` of text, or a row that does not fit the template.
    """
    field = _field(source, text_field)
    if isinstance(source, HubSource):
        return _HubDocuments(source, field, progress)
    return _FileDocuments(source, field)


def open_shards(source: Source, text_field: str) -> Shards:
    """Open a source whose files are to be read side by side.

    Args:
        source: the source; if it is a dataset of the hub, a streamed one, which is pinned to its newest commit.
        text_field: as in `open_documents`.

    Raises:
        DataError: as `open_documents` does, or for a dataset that is to be downloaded.
    """
    if isinstance(source, FileSource):
        return _FileShards(source, text_field)
    if not source.streaming:
        raise DataError(f"source {source.name!r}: expected no streaming=false, since files of a stream are not kept")
    return _HubShards(source, text_field, newest_commit(source))


def read_documents(source: Source, text_field: str) -> Documents:
    """All documents of a source.

    Raises:
        DataError: as `open_documents` and its reader do.
    """
    return open_documents(source, text_field).documents()


def read_rows(source: Source) -> Iterator[Row]:
    """All rows of a source, with all their fields.

    Args:
        source: parquet or jsonl files, or a hub dataset.

    Raises:
        DataError: a text file, which has no rows, a file that cannot be read, or a hub dataset that is not there.
    """
    if isinstance(source, HubSource):
        yield from HubReader(source).rows()
        return
    for file in source.files:
        if file_kind(file) == "text":
            raise DataError(f"{file} is text: expected rows, in .jsonl, .parquet or a dataset of the hub")
    for file in source.files:
        for _, row in _file_rows(file, 0, None):
            yield row


def _field(source: Source, text_field: str) -> str | None:
    """The field of its rows that holds the text; None where a template makes it."""
    return None if source.template is not None else source.field or text_field


class _HubDocuments:
    def __init__(self, source: HubSource, field: str | None, progress: bool) -> None:
        self._place = f"source {source.name!r}"
        self._field, self._template = field, source.template
        self._reader = HubReader(source, progress)
        if field is not None:
            self._reader.keep_only(field)

    def documents(self, start: Position | None = None) -> Documents:
        for row in self._reader.rows(start):
            yield _usable(_text(row, self._place, self._field, self._template))

    def position(self) -> Position:
        return self._reader.position()

    def shards(self) -> int:
        return self._reader.shards()

    def shard(self, number: int) -> "_HubDocuments":
        one = copy.copy(self)
        one._reader = self._reader.shard(number)
        return one


class _FileShards:
    def __init__(self, source: FileSource, text_field: str) -> None:
        self.name = source.name
        self.commit: str | None = None
        self._source, self._text_field = source, text_field

    def __len__(self) -> int:
        return len(self._source.files)

    def open(self, number: int) -> Reader:
        return open_documents(replace(self._source, files=(self._source.files[number],)), self._text_field)

    def at(self, commit: str) -> Shards:
        raise TypeError(f"{self.name} has no commits")


class _HubShards:
    def __init__(self, source: HubSource, text_field: str, commit: str | None) -> None:
        self.name = source.name
        self.commit = commit
        self._source, self._text_field = source, text_field
        pinned = source if commit is None else replace(source, revision=commit)
        self._documents = _HubDocuments(pinned, _field(source, text_field), progress=False)

    def __len__(self) -> int:
        return self._documents.shards()

    def open(self, number: int) -> Reader:
        return self._documents.shard(number)

    def at(self, commit: str) -> Shards:
        return _HubShards(self._source, self._text_field, commit)


class _FileDocuments:
    def __init__(self, source: FileSource, field: str | None) -> None:
        self._files = source.files
        self._field, self._template = field, source.template
        self._file, self._row = 0, 0

    def documents(self, start: Position | None = None) -> Documents:
        self._file, self._row = (start["file"], start["row"]) if start else (0, 0)
        for file in self._files[self._file :]:
            for text in self._documents(file, self._row):
                self._row += 1
                yield _usable(text)
            self._file, self._row = self._file + 1, 0

    def position(self) -> Position:
        return {"file": self._file, "row": self._row}

    def _documents(self, file: Path, start: int) -> Iterator[str | None]:
        if file_kind(file) == "text":
            yield from islice(_text_file(file), start, None)
        else:
            for place, row in _file_rows(file, start, self._field):
                yield _text(row, place, self._field, self._template)


def _text_file(path: Path) -> Iterator[str | None]:
    try:
        yield path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        yield None
    except OSError as error:
        raise _unreadable(path, error) from error


def _file_rows(path: Path, start: int, field: str | None) -> Iterator[tuple[str, Row]]:
    """The rows of a file from number `start` on, each with its place; of one field where the format allows."""
    try:
        yield from (_parquet_rows if file_kind(path) == "parquet" else _jsonl_rows)(path, start, field)
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> UnfinishedError:
    # Without a number it is the library's word for a file that is damaged.
    kind = SourceError if error.errno is None or is_path_error(error) else UnfinishedError
    return kind(f"cannot read {path}: {os_reason(error)}")


def _parquet_rows(path: Path, start: int, field: str | None) -> Iterator[tuple[str, Row]]:
    import pyarrow
    import pyarrow.parquet

    try:
        # Without the buffer the whole column of a row group is read at once.
        with pyarrow.parquet.ParquetFile(path, buffer_size=PARQUET_BUFFER_BYTES, pre_buffer=False) as file:
            if field is not None:
                _check_text_column(path, file.schema_arrow, field)
            groups, skipped = _groups_from(file.metadata, start)
            columns = None if field is None else [field]
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, row_groups=groups, columns=columns):
                fresh = batch.slice(skipped)
                skipped -= batch.num_rows - fresh.num_rows
                for row in fresh.to_pylist():
                    yield str(path), row
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a readable parquet file: {one_line(error)}") from error


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
    if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
        raise DataError(f"{path}: field {field!r} holds {kind}, expected text")


def _jsonl_rows(path: Path, start: int, field: str | None) -> Iterator[tuple[str, Row]]:
    with path.open("rb") as lines:
        numbered = ((number, line) for number, line in enumerate(lines, start=1) if line.strip())
        for number, line in islice(numbered, start, None):
            place = f"{path}, line {number}"
            yield place, _json_object(line, place, field)


def _json_object(line: bytes, place: str, field: str | None) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place} is not JSON that can be read: {one_line(error)}") from error
    if not isinstance(row, dict):
        wanted = "an object" if field is None else f"an object with the field {field!r}"
        raise DataError(f"{place} holds a {type(row).__name__}, expected {wanted}")
    return row


def _text(row: Row, place: str, field: str | None, template: str | None) -> str | None:
    if template is not None:
        return render(template, row, place)
    assert field is not None
    if field not in row:
        raise missing_field(place, field, list(row))
    text = row[field]
    if text is not None and not isinstance(text, str):
        raise DataError(f"{place}: field {field!r} holds a {type(text).__name__}, expected text")
    return text


def _usable(text: str | None) -> str | None:
    try:
        return text if text and text.encode() else None
    except UnicodeEncodeError:  # a lone surrogate, as JSON can spell it
        return None
