"""Reading: the rows and the documents of a source, one at a time, from any place at which an earlier reading stopped.

A text file is one document; a row of another file or of a hub dataset is one. Reading twice gives the same
in the same order.
"""

import copy
from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from thoughtbubbles.data.sources.corpora import FileSource, Source, file_source
from thoughtbubbles.data.sources.formats import ROW_KINDS, Row, file_kind, file_rows, read_text_file
from thoughtbubbles.data.sources.hub import HubReader, HubSource, missing_field, newest_commit
from thoughtbubbles.data.sources.rowtext import render
from thoughtbubbles.support.errors import DataError

# The field of rows that holds the text, where nobody says otherwise.
TEXT_FIELD = "text"

# None stands for a document that is empty or cannot be written as UTF-8.
Documents = Generator[str | None, None, None]
# Where a reading stands, as JSON can hold it.
Position = dict[str, Any]


class Reader(Protocol):
    """The documents of a source in order.

    Attributes:
        undecodable: where documents stand that this reading has skipped so far because they are not UTF-8; who reads
            may empty it.
    """

    undecodable: list[str]

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


def read_texts(path: Path, text_field: str = TEXT_FIELD) -> Iterator[str]:
    """The documents of one file, as `prepare` reads them.

    Args:
        path: of any kind of file that `prepare` reads; one of an unknown suffix is text.
        text_field: the field that holds the text, where the file has rows.

    Raises:
        DataError: no such file, one that cannot be read, or a text that is not UTF-8.
    """
    reader = open_documents(file_source(path), text_field)
    for text in reader.documents():
        if reader.undecodable:
            raise DataError(f"{reader.undecodable[0]} is not UTF-8")
        if text is not None:
            yield text


def read_rows(source: Source) -> Iterator[Row]:
    """All rows of a source, with all their fields.

    Args:
        source: files of rows, or a hub dataset.

    Raises:
        DataError: a text file, which has no rows, a file that cannot be read, or a hub dataset that is not there.
    """
    if isinstance(source, HubSource):
        yield from HubReader(source).rows()
        return
    for file in source.files:
        if file_kind(file) not in ROW_KINDS:
            raise DataError(f"{file} is text: expected rows, in .jsonl, .json, .csv, .parquet or a dataset of the hub")
    for file in source.files:
        for _, row in file_rows(file, 0, None):
            yield row


def _field(source: Source, text_field: str) -> str | None:
    """The field of its rows that holds the text; None where a template makes it."""
    return None if source.template is not None else source.field or text_field


class _HubDocuments:
    def __init__(self, source: HubSource, field: str | None, progress: bool) -> None:
        self._place = f"source {source.name!r}"
        self._field, self._template = field, source.template
        self._reader = HubReader(source, progress)
        self.undecodable: list[str] = []
        if field is not None:
            self._reader.keep_only(field)

    def documents(self, start: Position | None = None) -> Documents:
        self.undecodable.clear()
        for row in self._reader.rows(start):
            yield _usable(_text(row, self._place, self._field, self._template), self._place, self.undecodable)

    def position(self) -> Position:
        return self._reader.position()

    def shards(self) -> int:
        return self._reader.shards()

    def shard(self, number: int) -> "_HubDocuments":
        one = copy.copy(self)
        one._reader, one.undecodable = self._reader.shard(number), []
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
        self.undecodable: list[str] = []

    def documents(self, start: Position | None = None) -> Documents:
        self._file, self._row = (start["file"], start["row"]) if start else (0, 0)
        self.undecodable.clear()
        for file in self._files[self._file :]:
            for text in self._documents(file, self._row):
                self._row += 1
                yield text
            self._file, self._row = self._file + 1, 0

    def position(self) -> Position:
        return {"file": self._file, "row": self._row}

    def _documents(self, file: Path, start: int) -> Iterator[str | None]:
        if file_kind(file) in ROW_KINDS:
            for place, row in file_rows(file, start, self._field):
                yield _usable(_text(row, place, self._field, self._template), place, self.undecodable)
        elif start == 0:
            yield self._whole(file)

    def _whole(self, file: Path) -> str | None:
        try:
            return read_text_file(file) or None
        except UnicodeDecodeError:
            self.undecodable.append(str(file))
            return None


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


def _usable(text: str | None, place: str, undecodable: list[str]) -> str | None:
    try:
        return text if text and text.encode() else None
    except UnicodeEncodeError:  # a lone surrogate, as JSON can spell it
        undecodable.append(place)
        return None
