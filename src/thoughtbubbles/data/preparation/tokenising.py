"""Tokenising: every document is read once, digested, encoded, and stored in shards from which a later start goes on."""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

from thoughtbubbles.data.preparation import shards
from thoughtbubbles.data.preparation.shards import Reading, ShardStore, ShardWriter, SourcePlace
from thoughtbubbles.data.preparation.survey import Survey, changed, check_not_empty
from thoughtbubbles.data.sources.corpora import Source
from thoughtbubbles.data.sources.reading import Position, Reader
from thoughtbubbles.data.tokenizer import EncodedPiece, Encoder
from thoughtbubbles.support.progress import Stage
from thoughtbubbles.support.sampling import digest


@dataclass(frozen=True)
class _Read:
    """A document that was read and waits for its tokens; with no digest, the end of its source."""

    source: int
    skipped: Reading
    digest: bytes | None = None
    bytes: int = 0
    position: Position | None = None


class Tokeniser:
    """Tokenises the sources that a store does not hold yet.

    Args:
        store: takes the shards.
        sources: all sources, in order.
        readers: of the sources from the store's place on, by number.
        encoder: makes the tokens.
        limits: tokens to read of each source, separators included; None is no limit.
        survey: what an earlier reading found; None if there was none.
    """

    def __init__(
        self,
        store: ShardStore,
        sources: Sequence[Source],
        readers: Mapping[int, Reader],
        encoder: Encoder,
        limits: Sequence[int | None],
        survey: Survey | None,
    ) -> None:
        self._store = store
        self._sources = sources
        self._readers = readers
        self._encoder = encoder
        self._limits = limits
        self._survey = survey
        self._totals = store.readings(len(sources))
        self._tokens = sum(total.tokens for total in self._totals)
        # Documents are read ahead of the encoder: here they wait, in order.
        self._waiting: deque[_Read] = deque()
        self._left: set[int] = set()

    def run(self, bar: Stage) -> None:
        """Read, encode and store until the last source ends.

        Raises:
            DataError: a source without documents, one that changed since the survey, or one that cannot be read.
        """
        end = len(self._sources)
        if self._store.place.source == end:
            return
        with closing(self._encoder.encode(self._read())) as pieces:
            while self._store.place.source < end:
                with self._store.new_shard() as shard:
                    shard.finish(self._fill(shard, pieces, bar))

    def _read(self) -> Iterator[tuple[int, str]]:
        place = self._store.place
        for number in range(place.source, len(self._sources)):
            reader, skipped = self._readers[number], Reading()
            with closing(reader.documents(place.position if number == place.source else None)) as documents:
                for text in documents:
                    if number in self._left:
                        break
                    if text is None:
                        skipped += Reading(
                            skipped=1, undecodable=len(reader.undecodable), named=tuple(reader.undecodable)
                        )
                        reader.undecodable.clear()
                        continue
                    data = text.encode()
                    self._waiting.append(_Read(number, skipped, digest(data), len(data), reader.position()))
                    skipped = Reading()
                    yield number, text
            self._waiting.append(_Read(number, skipped))

    def _fill(self, shard: ShardWriter, pieces: Iterator[EncodedPiece], bar: Stage) -> SourcePlace:
        for piece in pieces:
            self._end_sources(shard)
            read = self._waiting[0]
            # What was read ahead beyond a limit is not kept, or the result would depend on how far that was.
            if read.source not in self._left:
                shard.append(piece.tokens)
                self._tokens += len(piece.tokens)
                bar.advance(piece.bytes, f"{self._tokens:,} tokens")
            if not piece.ends:
                continue
            self._waiting.popleft()
            if read.source in self._left:
                continue
            following = self._end_document(shard, read)
            if shard.bytes >= shards.SHARD_BYTES:
                return following
        self._end_sources(shard)
        return SourcePlace(len(self._sources))

    def _end_document(self, shard: ShardWriter, read: _Read) -> SourcePlace:
        assert read.digest is not None
        total = self._totals[read.source]
        if self._survey and not self._survey.holds(read.source, total.documents, read.digest):
            raise changed()
        reading = shard.end_document(read.source, read.digest, read.bytes, read.skipped)
        self._totals[read.source] = total = total + reading
        limit = self._limits[read.source]
        if limit is None or total.tokens < limit:
            return SourcePlace(read.source, read.position)
        self._count(shard, read.source, Reading(limited=True))
        self._left.add(read.source)
        return SourcePlace(read.source + 1)

    def _end_sources(self, shard: ShardWriter) -> None:
        """Come to the end of the sources whose last document is stored."""
        while self._waiting and self._waiting[0].digest is None:
            ended = self._waiting.popleft()
            if ended.source in self._left:
                continue
            self._count(shard, ended.source, ended.skipped)
            total = self._totals[ended.source]
            if self._survey and total.documents != self._survey.counts[ended.source]:
                raise changed()
            check_not_empty(self._sources[ended.source], total.documents, total.skipped)

    def _count(self, shard: ShardWriter, source: int, reading: Reading) -> None:
        shard.add(source, reading)
        self._totals[source] += reading
