"""Streams: blocks of sources too large for the disk, read, tokenised and packed while a run trains on them.

A stream has a fixed number of lanes, and sample i of a run is of lane i mod lanes. Of every source a lane reads files
that no other lane reads at that time, one after another, and packs their documents into blocks. Which these are is a
function of the seed and the sources: not of the number of processes, each of which reads only the lanes that it needs.
Blocks are shuffled in windows of a fixed size, so that all that has to be kept to go on at any sample is where the
window of each lane and source begins: not what is in it.
"""

import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from thoughtbubbles.data.feed.heldout import HeldOut
from thoughtbubbles.data.feed.mixture import Rounds, mixture_key, permuted
from thoughtbubbles.data.preparation.packing import TokenArray, cut_blocks
from thoughtbubbles.data.sources.reading import Position, Shards
from thoughtbubbles.data.tokenizer import Encoder
from thoughtbubbles.support.errors import DataError, RunError, UnfinishedError

MOST_THREADS = 4
# Epochs of a source in which a lane finds no document, after which it has none: by chance that happens to nobody.
EMPTY_EPOCHS = 32

# What is kept of a stream in a checkpoint, as JSON can hold it.
StreamRecord = dict[str, Any]


@dataclass(frozen=True)
class Spot:
    """A place in what a lane reads of a source.

    Attributes:
        visit: to a file, or a part of one; a lane's visits are numbered as those of all lanes are.
        row: of the file, counted from 0: that of a document.
        position: what its reader says of the place before that row; None is the beginning of the file.
        used: tokens of the document, its separator included, that come before the place.
    """

    visit: int
    row: int = 0
    position: Position | None = None
    used: int = 0


@dataclass(frozen=True)
class Packing:
    """How documents become the blocks of a stream.

    Attributes:
        encoder: of their texts.
        separator: the token before each.
        dtype: of the tokens.
        block_size: tokens a block.
        held_out: documents to leave out.
        seed: of the order of files and blocks.
        lanes: of the stream.
        window: blocks of one lane and source that are shuffled together.
    """

    encoder: Encoder
    separator: int
    dtype: "np.dtype[Any]"
    block_size: int
    held_out: HeldOut
    seed: int
    lanes: int
    window: int


class LaneReader:
    """Reads what one lane reads of one source.

    The lanes take turns at visiting the files of the source, all of them once an epoch and in another order each
    time. Where there are fewer files than lanes, a file is visited several times an epoch, each time for other rows.

    Args:
        shards: the source.
        source: its number.
        lane: the lane's.
    """

    def __init__(self, shards: Shards, source: int, lane: int, packing: Packing) -> None:
        self._shards = shards
        self._source = source
        self._lane = lane
        self._packing = packing
        self._parts = -(-packing.lanes // len(shards))

    def blocks(self, start: Spot | None) -> Iterator[tuple[TokenArray, Spot]]:
        """The blocks from a place on, epoch after epoch, each with the place where it ends.

        Raises:
            DataError: a file that cannot be read, or a source without documents.
        """
        start = start or Spot(self._lane)
        packing = self._packing
        documents = self.documents(start)
        for block, spot, used in cut_blocks(
            documents, packing.separator, packing.dtype, packing.block_size, start.used
        ):
            yield block, replace(spot, used=used)

    def documents(self, start: Spot) -> Iterator[tuple[Spot, TokenArray]]:
        """The documents from a place on, those held out left out, each with the place where it begins.

        Raises:
            DataError: as `blocks` does.
        """
        visit, row, position, empty = start.visit, start.row, start.position, 0
        while empty < EMPTY_EPOCHS * self._parts * len(self._shards):
            shard, part = self._unit(visit)
            reader, empty = self._shards.open(shard), empty + 1
            with closing(reader.documents(position)) as documents:
                for text in documents:
                    tokens = self._tokens(text) if text is not None and row % self._parts == part else None
                    if tokens is not None:
                        yield Spot(visit, row, position), tokens
                        empty = 0
                    row, position = row + 1, reader.position()
            visit, row, position = visit + self._packing.lanes, 0, None
        raise DataError(
            f"source {self._shards.name!r} has no documents to train on: expected some that are neither empty nor in "
            "the validation"
        )

    def _tokens(self, text: str) -> TokenArray | None:
        """The tokens of a document; None of one that is held out."""
        tokens = self._packing.encoder.encode_one(text)
        return None if self._packing.held_out.holds(tokens) else tokens

    def _unit(self, visit: int) -> tuple[int, int]:
        """The file of a visit, and which part of its rows is read."""
        units = self._parts * len(self._shards)
        epoch, turn = divmod(visit, units)
        key = mixture_key(self._packing.seed, f"files {self._source}/{epoch}")
        return divmod(permuted(turn, units, key), self._parts)


class Track:
    """The blocks of one lane and source, shuffled; two windows are held: one in use, one being read.

    Args:
        reader: reads them.
        purpose: tells the order of its blocks from that of others.
        pool: threads that read.
        stop: tells them to stop.
        first: the window to begin with.
        spot: where that one begins; None is the beginning of the source.
    """

    def __init__(
        self,
        reader: LaneReader,
        packing: Packing,
        purpose: str,
        pool: ThreadPoolExecutor,
        stop: threading.Event,
        first: int,
        spot: Spot | None,
    ) -> None:
        self._reader = reader
        self._packing = packing
        self._purpose = purpose
        self._pool = pool
        self._stop = stop
        self._starts = {first: spot}
        self._window: TokenArray
        self._ahead: Future[TokenArray]
        self._open(first)

    def block(self, index: int) -> TokenArray:
        """Block `index` in the order of training; quick as long as the next come after those before."""
        window, place = divmod(index, self._packing.window)
        if window < self._number:
            self._ahead.result()
            self._open(max(number for number in list(self._starts) if number <= window))
        while self._number < window:
            self._window = self._ahead.result()
            self._number += 1
            self._ahead = self._read_ahead()
        key = mixture_key(self._packing.seed, f"blocks {self._purpose}/{window}")
        block: TokenArray = self._window[permuted(place, self._packing.window, key)]
        return block

    def start(self, window: int) -> Spot | None:
        """Where a window begins. What is known of those before is forgotten.

        Raises:
            KeyError: not known here, since it was never read.
        """
        for number in [number for number in list(self._starts) if number < window]:
            del self._starts[number]
        return self._starts[window]

    def _open(self, window: int) -> None:
        self._blocks = self._reader.blocks(self._starts[window])
        self._number = window - 1
        self._ahead = self._read_ahead()

    def _read_ahead(self) -> "Future[TokenArray]":
        return self._pool.submit(self._read, self._number + 1)

    def _read(self, number: int) -> TokenArray:
        """The blocks of a window; notes where the next begins."""
        window = np.empty((self._packing.window, self._packing.block_size), dtype=self._packing.dtype)
        for place in range(len(window)):
            if self._stop.is_set():
                raise CancelledError
            window[place], end = next(self._blocks)
        self._starts[number + 1] = end
        return window


class StreamMixture:
    """The training samples of a run in their order, mixed from streamed sources by weight (a map-style dataset).

    Every `ROUND` samples of a lane hold each source in proportion to its weight, as in `BlockMixture`. Every document
    of a source is read once before any is read again, as far as the lanes keep pace with each other.

    Args:
        sources: to read.
        weights: their shares of the samples, in any unit.
        packing: how their documents become blocks.
        length: samples of the whole run.
    """

    def __init__(self, sources: Sequence[Shards], weights: Sequence[float], packing: Packing, length: int) -> None:
        self._sources = list(sources)
        self._packing = packing
        self._length = length
        self._rounds = [Rounds(weights, packing.seed, f"lane {lane} ") for lane in range(packing.lanes)]
        self._starts: dict[tuple[int, int], tuple[int, Spot | None]] = {}
        self._tracks: dict[tuple[int, int], Track] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._stop = threading.Event()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> TokenArray:
        """The block of a sample.

        Raises:
            IndexError: outside the run.
            RunError: a source that cannot be read further.
        """
        source, lane, block = self.place(index)
        try:
            return self._track(source, lane).block(block)
        except (DataError, UnfinishedError) as error:
            again = "when it can be read again, the same command goes on from the last checkpoint"
            raise RunError(f"{error}; {again}") from error

    def __getitems__(self, indices: Sequence[int]) -> list[TokenArray]:
        """The blocks of several samples, whose lanes are read side by side."""
        for source, lane, _ in map(self.place, indices):
            self._track(source, lane)
        return [self[index] for index in indices]

    def place(self, index: int) -> tuple[int, int, int]:
        """The source and the lane of a sample, and how many of theirs come before it."""
        if not 0 <= index < self._length:
            raise IndexError(f"sample {index} of a run of {self._length}")
        turn, lane = divmod(index, self._packing.lanes)
        source, block = self._rounds[lane].turn(turn)
        return source, lane, block

    def describe(self, index: int) -> str:
        """Where a sample comes from, in words."""
        source, lane, block = self.place(index)
        return f"{self._sources[source].name}, lane {lane}, block {block}"

    def record(self, samples: int) -> StreamRecord:
        """Where to go on after so many samples, as far as this process knows: of the lanes that it has read."""
        tracks = []
        for (source, lane), track in self._tracks.items():
            before = len(range(lane, samples, self._packing.lanes))
            window = self._rounds[lane].count(source, before) // self._packing.window
            try:
                spot = track.start(window)
            except KeyError:  # another process has read further in this lane
                continue
            if spot is not None:
                tracks.append({"source": source, "lane": lane, "window": window, "spot": asdict(spot)})
        return {"commits": [source.commit for source in self._sources], "tracks": tracks}

    def go_on(self, record: StreamRecord) -> None:
        """Go on where a record says, the one of all processes.

        Raises:
            DataError: a source that cannot be opened at the commit that they read.
        """
        self.close()
        self._starts = {
            (track["source"], track["lane"]): (track["window"], Spot(**track["spot"])) for track in record["tracks"]
        }
        for number, commit in enumerate(record["commits"]):
            if commit is not None and commit != self._sources[number].commit:
                self._sources[number] = self._sources[number].at(commit)

    def close(self) -> None:
        """Stop reading."""
        self._stop.set()
        self._tracks.clear()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
        self._stop = threading.Event()

    def _track(self, source: int, lane: int) -> Track:
        if (source, lane) not in self._tracks:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(_threads(), thread_name_prefix="stream")
            reader = LaneReader(self._sources[source], source, lane, self._packing)
            first = self._starts.get((source, lane), (0, None))
            self._tracks[source, lane] = Track(
                reader, self._packing, f"{source}/{lane}", self._pool, self._stop, *first
            )
        return self._tracks[source, lane]


def merge_records(records: Sequence[StreamRecord]) -> StreamRecord:
    """The record of all processes from those that each made after the same samples."""
    tracks = {(track["source"], track["lane"]): track for record in records for track in record["tracks"]}
    return {"commits": records[0]["commits"], "tracks": [tracks[key] for key in sorted(tracks)]}


def check_readable(sources: Sequence[Shards]) -> None:
    """Read a document of each source, so that bad input shows before anything else is done.

    Raises:
        DataError: a source that cannot be read, or has no text where it should.
    """
    for shards in sources:
        with closing(shards.open(0).documents()) as documents:
            next(documents, None)


def _threads() -> int:
    """Threads that read: this process's share of the cores, and few, since Python lets one work at a time."""
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(MOST_THREADS, cores - 1))
