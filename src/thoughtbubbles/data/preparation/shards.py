"""Shards: tokenised documents on disk, a bounded amount of text each, every one whole or absent.

A shard is a folder with the tokens of its documents, a record of each document, and `record.json`: what was read of
which source, and where to go on. Its borders depend on the documents alone.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from thoughtbubbles.data.preparation.packing import TokenArray, read_array
from thoughtbubbles.data.sources.reading import Position
from thoughtbubbles.data.splitting import DOCUMENT, DocumentArray
from thoughtbubbles.support.files import replacing, write_text

# A shard ends with the document that reaches this: a quarter of a minute of work on one core.
SHARD_BYTES = 64 << 20
# Places named of documents that are not UTF-8.
MOST_NAMED = 5


@dataclass(frozen=True)
class Reading:
    """What was read of a source.

    Attributes:
        documents: documents kept.
        bytes: of their text in UTF-8.
        tokens: of theirs, separators included.
        skipped: documents that are empty or not UTF-8.
        undecodable: how many of them are not UTF-8.
        named: where the first few of those stand.
        limited: whether it was left at the limit of tokens.
    """

    documents: int = 0
    bytes: int = 0
    tokens: int = 0
    skipped: int = 0
    undecodable: int = 0
    named: tuple[str, ...] = ()
    limited: bool = False

    def __add__(self, other: "Reading") -> "Reading":
        return Reading(
            self.documents + other.documents,
            self.bytes + other.bytes,
            self.tokens + other.tokens,
            self.skipped + other.skipped,
            self.undecodable + other.undecodable,
            (*self.named, *other.named)[:MOST_NAMED],
            self.limited or other.limited,
        )


@dataclass(frozen=True)
class SourcePlace:
    """Where to go on: a source, by its number, and a position in it; None is its start."""

    source: int = 0
    position: Position | None = None


@dataclass(frozen=True)
class ShardRecord:
    """What a shard holds.

    Attributes:
        readings: what it holds of each source, by the source's number.
        next: where the next shard begins.
    """

    readings: dict[int, Reading]
    next: SourcePlace

    def to_json(self) -> str:
        """JSON that `from_json` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "ShardRecord":
        """Read what `to_json` wrote."""
        values: dict[str, Any] = json.loads(text)
        readings = {
            int(source): Reading(**{**reading, "named": tuple(reading["named"])})
            for source, reading in values["readings"].items()
        }
        return cls(readings, SourcePlace(**values["next"]))


class ShardWriter:
    """Writes the tokens and documents of one shard; afterwards `finish` makes it whole."""

    def __init__(self, folder: Path, dtype: "np.dtype[Any]") -> None:
        folder.mkdir()
        self._folder = folder
        self._dtype = dtype
        self._tokens = (folder / "tokens").open("wb")
        self._documents: list[tuple[bytes, int, int]] = []
        self._readings: dict[int, Reading] = {}
        self._length = 0
        self.bytes = 0

    def append(self, tokens: TokenArray) -> None:
        """Append the next tokens of the document that is not ended yet."""
        self._tokens.write(tokens.astype(self._dtype).tobytes())
        self._length += len(tokens)

    def end_document(self, source: int, digest: bytes, size: int, before: Reading) -> Reading:
        """The tokens appended since the last call are a document of a source, before which others were skipped."""
        self._documents.append((digest, size, self._length))
        reading = before + Reading(documents=1, bytes=size, tokens=self._length + 1)
        self.add(source, reading)
        self.bytes += size
        self._length = 0
        return reading

    def add(self, source: int, reading: Reading) -> None:
        """Count what was read of a source."""
        self._readings[source] = self._readings.get(source, Reading()) + reading

    def close(self) -> None:
        """Close the file of tokens."""
        self._tokens.close()

    def finish(self, following: SourcePlace) -> None:
        """Write the record."""
        self.close()
        np.save(self._folder / "documents.npy", np.array(self._documents, dtype=DOCUMENT))
        write_text(self._folder / "record.json", ShardRecord(self._readings, following).to_json())


class ShardStore:
    """The shards in a folder, in order.

    Args:
        folder: the folder; it is made if it is not there.
        dtype: of the tokens.
    """

    def __init__(self, folder: Path, dtype: "np.dtype[Any]") -> None:
        folder.mkdir(exist_ok=True)
        self._folder = folder
        self.dtype = dtype
        self._records: list[ShardRecord] = []
        while (record := self._read_record(len(self._records))) is not None:
            self._records.append(record)

    @property
    def place(self) -> SourcePlace:
        """Where to go on."""
        return self._records[-1].next if self._records else SourcePlace()

    def readings(self, sources: int) -> list[Reading]:
        """What was read of each of so many sources."""
        total = [Reading() for _ in range(sources)]
        for record in self._records:
            for source, reading in record.readings.items():
                total[source] += reading
        return total

    @contextmanager
    def new_shard(self) -> Iterator[ShardWriter]:
        """The next shard, to be filled and finished; it is there if the block ends without an error."""
        number = len(self._records)
        with replacing(self._path(number)) as folder:
            writer = ShardWriter(folder, self.dtype)
            try:
                yield writer
            finally:
                writer.close()
        record = self._read_record(number)
        if record is None:
            raise RuntimeError(f"shard {self._path(number)} was not finished")
        self._records.append(record)

    def documents(self) -> DocumentArray:
        """The documents of all shards."""
        return np.concatenate([np.load(self._path(number) / "documents.npy") for number in range(len(self._records))])

    def tokens(self) -> Iterator[TokenArray]:
        """The tokens of one shard after another; they stay on disk."""
        for number in range(len(self._records)):
            yield read_array(self._path(number) / "tokens", self.dtype)

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:06}"

    def _read_record(self, number: int) -> ShardRecord | None:
        folder = self._path(number)
        try:
            record = ShardRecord.from_json((folder / "record.json").read_text(encoding="utf-8"))
            documents = len(np.load(folder / "documents.npy", mmap_mode="r"))
            size = (folder / "tokens").stat().st_size
        except (OSError, ValueError, TypeError, KeyError, AttributeError, EOFError):
            return None
        whole = sum(record.readings.values(), Reading())
        expected = (whole.documents, (whole.tokens - whole.documents) * self.dtype.itemsize)
        return record if (documents, size) == expected else None
