"""The order of a stream: every document once an epoch, the weights held, and going on from anywhere."""

import gzip
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.conftest import hub_folder, make_texts
from thoughtbubbles.data import DataError, SourceError, UnfinishedError, load_prepared, prepare
from thoughtbubbles.data.feed import stream as stream_module
from thoughtbubbles.data.feed.heldout import HeldOut
from thoughtbubbles.data.feed.mixture import ROUND
from thoughtbubbles.data.feed.stream import (
    LaneReader,
    Packing,
    Spot,
    StreamMixture,
    StreamRecord,
    check_readable,
    merge_records,
)
from thoughtbubbles.data.preparation.packing import TokenArray
from thoughtbubbles.data.sources import reading
from thoughtbubbles.data.sources.corpora import resolve_source
from thoughtbubbles.data.sources.hub import HubReader, HubSource
from thoughtbubbles.data.sources.reading import Documents, Position, Reader, Shards, open_shards
from thoughtbubbles.data.tokenizer import Encoder, load_data_tokenizer
from thoughtbubbles.support.errors import RunError

SEPARATOR = 0
BLOCK = 4


class Numbers:
    """Stands for a tokenizer: a text is its tokens, as in `17 17 18`."""

    def encode_one(self, text: str) -> TokenArray:
        return np.array(text.split(), dtype=np.uint32)


class Memory:
    """A source of texts in memory; a shard that is an error cannot be read."""

    commit = None

    def __init__(self, shards: Sequence[Sequence[str | None] | Exception]) -> None:
        self.name = "memory"
        self.shards = shards

    def __len__(self) -> int:
        return len(self.shards)

    def open(self, number: int) -> Reader:
        return _MemoryReader(self.shards[number])

    def at(self, commit: str) -> Shards:
        raise AssertionError(commit)


class _MemoryReader:
    def __init__(self, texts: Sequence[str | None] | Exception) -> None:
        self._texts = texts
        self._next = 0
        self.undecodable: list[str] = []

    def documents(self, start: Position | None = None) -> Documents:
        self._next = 0 if start is None else start["next"]
        if isinstance(self._texts, Exception):
            raise self._texts
        for text in self._texts[self._next :]:
            self._next += 1
            yield text

    def position(self) -> Position:
        return {"next": self._next}


def packing(lanes: int, window: int = 3, held_out: Sequence[Sequence[int]] = ()) -> Packing:
    held = SimpleNamespace(holds=lambda tokens: tokens.tolist() in [list(document) for document in held_out])
    return Packing(Numbers(), SEPARATOR, np.dtype(np.uint16), BLOCK, held, 5, lanes, window)


def numbered(lengths: Sequence[Sequence[int]]) -> tuple[Memory, list[str]]:
    """Shards of documents of such lengths, each of tokens of its own; None for a document of no tokens."""
    counter = iter(range(1, 1000))
    shards = [[" ".join([str(next(counter))] * length) or None for length in shard] for shard in lengths]
    return Memory(shards), [text for shard in shards for text in shard if text is not None]


# A source has a document at least: one without is a test of its own.
SHARDS = st.lists(st.lists(st.integers(0, 9), max_size=5), min_size=1, max_size=6).filter(lambda s: any(map(any, s)))


@given(SHARDS, st.integers(1, 5))
def test_every_document_comes_once_an_epoch_in_one_of_the_lanes(lengths: list[list[int]], lanes: int) -> None:
    source, texts = numbered(lengths)
    units = len(source) * -(-lanes // len(source))
    for epoch in range(3):
        found = []
        for lane in range(lanes):
            first = next(visit for visit in range(epoch * units, (epoch + 1) * units + lanes) if visit % lanes == lane)
            for spot, tokens in LaneReader(source, 0, lane, packing(lanes)).documents(Spot(first)):
                if spot.visit >= (epoch + 1) * units:
                    break
                found.append(" ".join(map(str, tokens)))
        assert sorted(found) == sorted(texts)


def test_epochs_and_sources_read_the_files_in_other_orders() -> None:
    source, texts = numbered([[1]] * 20)

    def order(number: int) -> list[int]:
        documents = LaneReader(source, number, 0, packing(1)).documents(Spot(0))
        return [int(tokens[0]) for _, tokens in islice(documents, 40)]

    first, second = order(0)[:20], order(0)[20:]
    assert sorted(first) == sorted(second) == list(range(1, len(texts) + 1))
    assert first != second
    assert first != order(1)[:20] != sorted(first)


@given(SHARDS, st.integers(1, 4))
def test_blocks_are_the_documents_of_a_lane_each_after_the_separator(lengths: list[list[int]], lanes: int) -> None:
    source, _ = numbered(lengths)
    for lane in range(lanes):
        reader = LaneReader(source, 0, lane, packing(lanes))
        expected: list[int] = []
        for _, tokens in islice(reader.documents(Spot(lane)), 20):
            expected += [SEPARATOR, *map(int, tokens)]
        count = len(expected) // BLOCK
        blocks = [block for block, _ in islice(reader.blocks(None), count)]
        assert [int(token) for block in blocks for token in block] == expected[: count * BLOCK]
        # And from any place at which a block ends.
        ends = [spot for _, spot in islice(reader.blocks(None), count)]
        for number, spot in enumerate(ends[:-1]):
            (following, _) = next(reader.blocks(spot))
            assert following.tolist() == blocks[number + 1].tolist()


def mixture(sources: Sequence[Memory], weights: Sequence[float], lanes: int, length: int, window: int) -> StreamMixture:
    return StreamMixture(sources, weights, packing(lanes, window), length)


def test_blocks_are_shuffled_in_windows_and_none_is_lost() -> None:
    source, _ = numbered([[7, 3, 9], [5, 8], [2, 6, 4, 1]])
    lanes, window, windows = 2, 5, 4
    length = lanes * window * windows
    with closing(mixture([source], [1], lanes, length, window)) as stream:
        moved = 0
        for lane in range(lanes):
            shuffled = [stream[index].tolist() for index in range(lane, length, lanes)]
            blocks = LaneReader(source, 0, lane, packing(lanes)).blocks(None)
            read = [block.tolist() for block, _ in islice(blocks, window * windows)]
            for start in range(0, window * windows, window):
                assert sorted(shuffled[start : start + window]) == sorted(read[start : start + window])
                moved += shuffled[start : start + window] != read[start : start + window]
        assert moved > lanes * windows / 2


@pytest.mark.parametrize("weights", [[0.7, 0.3], [1, 1, 1], [3]])
def test_every_lane_holds_the_weights(weights: list[float]) -> None:
    lanes = 4
    stream = mixture([numbered([[1]])[0]] * len(weights), weights, lanes, lanes * ROUND, 3)
    found = Counter((lane, source) for source, lane, _ in map(stream.place, range(lanes * ROUND)))
    for (_, source), count in found.items():
        assert abs(count - ROUND * weights[source] / sum(weights)) <= 1
    orders = [[stream.place(index)[0] for index in range(lane, 400, lanes)] for lane in range(2)]
    assert len(weights) == 1 or orders[0] != orders[1]


def read_shared(streams: Sequence[StreamMixture], start: int, stop: int, ahead: int) -> dict[int, list[int]]:
    """Samples, each read by one of several processes, which read a few more than they are to give."""
    found: dict[int, list[int]] = {}
    for index in range(start, min(stop + ahead, len(streams[0]))):
        block = streams[index * 7 // 3 % len(streams)][index].tolist()
        if index < stop:
            found[index] = block
    return found


def through_json(record: StreamRecord) -> StreamRecord:
    return dict(json.loads(json.dumps(record)))


@given(
    sources=st.lists(SHARDS, min_size=1, max_size=2),
    lanes=st.integers(1, 4),
    window=st.integers(1, 4),
    stops=st.lists(st.integers(0, 60), min_size=1, max_size=3),
    processes=st.lists(st.integers(1, 3), min_size=4, max_size=4),
    ahead=st.integers(0, 9),
)
@settings(max_examples=20)
def test_any_number_of_processes_goes_on_from_any_sample(
    sources: list[list[list[int]]], lanes: int, window: int, stops: list[int], processes: list[int], ahead: int
) -> None:
    length, weights = 64, [2.0, 1.0][: len(sources)]
    memories = [numbered(source)[0] for source in sources]

    def fresh() -> StreamMixture:
        return mixture(memories, weights, lanes, length, window)

    with closing(fresh()) as whole:
        expected = read_shared([whole], 0, length, 0)
        place, record = 0, None
        found: dict[int, list[int]] = {}
        for stop, count in zip([*sorted(stops), length], processes, strict=False):
            streams = [fresh() for _ in range(count)]
            for stream in streams:
                if record is not None:
                    stream.go_on(record)
            found |= read_shared(streams, place, stop, ahead)
            record = through_json(merge_records([stream.record(stop) for stream in streams]))
            for stream in streams:
                stream.close()
            place = stop
    assert found == expected


def test_the_record_does_not_depend_on_the_number_of_processes_and_stays_small() -> None:
    sources = [numbered([[7, 3], [5]])[0], numbered([[2, 8, 9]])[0]]
    records = []
    for count in (1, 2, 3):
        streams = [mixture(sources, [1, 1], 4, 4000, 8) for _ in range(count)]
        read_shared(streams, 0, 2000, 5)
        records.append(merge_records([stream.record(2000) for stream in streams]))
        for stream in streams:
            stream.close()
    assert records[0] == records[1] == records[2]
    assert len(records[0]["tracks"]) == 2 * 4


def test_going_back_gives_the_same_blocks() -> None:
    with closing(mixture([numbered([[7, 3], [5, 9]])[0]], [1], 2, 100, 3)) as stream:
        blocks = [stream[index].tolist() for index in range(100)]
        assert [stream[index].tolist() for index in (3, 0, 50, 99)] == [blocks[index] for index in (3, 0, 50, 99)]


def test_a_process_reads_only_the_lanes_that_it_needs() -> None:
    source, _ = numbered([[1]] * 8)
    opened: list[int] = []

    class Watched(Memory):
        def open(self, number: int) -> Reader:
            opened.append(number)
            return super().open(number)

    with closing(mixture([Watched(source.shards)], [1], 4, 4, 1)) as stream:
        stream[1]
    # Two documents fill its block, and perhaps some of the next: of every fourth file.
    lane = [shard for shard, _ in (LaneReader(source, 0, 1, packing(4))._unit(visit) for visit in range(1, 64, 4))]
    assert opened == lane[: len(opened)]


def test_what_is_held_out_is_not_read() -> None:
    source = Memory([["1 1", "2 2"], ["1 1"], ["3"]])
    found = LaneReader(source, 0, 0, packing(1, held_out=[[1, 1]])).documents(Spot(0))
    assert {tuple(tokens.tolist()) for _, tokens in islice(found, 20)} == {(2, 2), (3,)}


@pytest.mark.parametrize("shards", [[[None, None], []], [["1 1"]]])
def test_a_source_without_documents_is_one_line(shards: list[list[str | None]]) -> None:
    with pytest.raises(DataError, match="source 'memory' has no documents to train on: expected some that are neither"):
        next(LaneReader(Memory(shards), 0, 0, packing(2, held_out=[[1, 1]])).blocks(None))


@pytest.mark.parametrize("kind", [DataError, SourceError, UnfinishedError])
def test_a_shard_that_cannot_be_read_ends_the_run_in_one_line(kind: type[Exception]) -> None:
    message = "memory is broken; when it can be read again, the same command goes on from the last checkpoint"
    with (
        closing(mixture([Memory([["1 1 1"] * 40, kind("memory is broken")])], [1], 1, 1000, 2)) as stream,
        pytest.raises(RunError, match=message) as caught,
    ):
        [stream[index] for index in range(1000)]
    assert "\n" not in str(caught.value)


def test_a_stream_that_was_closed_begins_again() -> None:
    with closing(mixture([numbered([[7, 3], [5, 9]])[0]], [1], 2, 10, 3)) as stream:
        blocks = [stream[index].tolist() for index in range(10)]
        stream.close()
        assert [stream[index].tolist() for index in range(10)] == blocks
    with pytest.raises(IndexError, match="sample 10 of a run of 10"):
        stream[10]


# Files, the hub and a real tokenizer.


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, list[str]]:
    """A glob of parquet and jsonl files, and their texts."""
    texts = make_texts(24)
    for part in range(4):
        ours = texts[6 * part :][:6]
        if part % 2:
            (tmp_path / f"{part}.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in ours))
        else:
            pq.write_table(pa.table({"body": ours, "id": range(6)}), tmp_path / f"{part}.parquet", row_group_size=2)
    return str(tmp_path / "?.*"), texts


def documents_of(source: Shards, packing: Packing, lanes: Iterator[int] | range, count: int) -> list[list[int]]:
    readers = [LaneReader(source, 0, lane, packing).documents(Spot(lane)) for lane in lanes]
    return [tokens.tolist() for reader in readers for _, tokens in islice(reader, count)]


def test_files_are_tokenised_as_when_they_are_prepared(files: tuple[str, list[str]], tokenizer_folder: Path) -> None:
    encoder = Encoder(load_data_tokenizer(tokenizer_folder), 1)
    lanes = Packing(encoder, 0, np.dtype(np.uint16), 16, HeldOut([], 0), 0, 4, 2)
    found = documents_of(open_shards(resolve_source(files[0]), "body"), lanes, range(4), 6)
    whole: dict[int, list[int]] = {}
    for piece in encoder.encode(enumerate(files[1])):
        whole.setdefault(piece.document, []).extend(piece.tokens.tolist())
    assert sorted(found) == sorted(whole.values())


def test_validation_documents_are_left_out_of_the_stream(
    tmp_path: Path, files: tuple[str, list[str]], tokenizer_folder: Path
) -> None:
    options: dict[str, Any] = {"tokenizer": str(tokenizer_folder), "text_field": "body", "block_size": 64}
    prepare(tmp_path / "data", [files[0]], validation_fraction=0.3, progress=False, **options)
    prepared = load_prepared(tmp_path / "data")
    assert prepared.manifest.validation.dropped_tokens
    encoder = Encoder(prepared.tokenizer(), 1)
    packing = Packing(encoder, 0, np.dtype(np.uint16), 64, HeldOut([prepared], 0), 0, 1, 2)
    kept = prepared.manifest.train.documents
    assert kept < 20
    found = documents_of(open_shards(resolve_source(files[0]), "body"), packing, range(1), kept)
    seen = {tuple(document) for document in found}
    assert len(seen) == kept
    blocks = np.concatenate([np.asarray(row) for row in prepared.train.with_format("numpy")[:]["input_ids"]])
    trained = {tuple(document[1:].tolist()) for document in np.split(blocks, np.flatnonzero(blocks == 0))[1:-1]}
    assert trained <= seen


def test_a_document_that_only_begins_like_the_last_of_the_validation_stays() -> None:
    table = pa.table({"input_ids": pa.array([[0, 5, 6], [7, 0, 8]], pa.list_(pa.int32(), 3))})
    blocks: Any = SimpleNamespace(
        validation=SimpleNamespace(data=table),
        manifest=SimpleNamespace(validation=SimpleNamespace(dropped_tokens=2), cut=None),
    )
    held = HeldOut([blocks], 0)
    for document in ([5, 6, 7], [8], [8, 1, 1]):
        assert held.holds(np.array(document, dtype=np.uint32))
    for document in ([5, 6], [8, 1, 1, 1], [9]):
        assert not held.holds(np.array(document, dtype=np.uint32))


def test_a_dataset_of_the_hub_is_read_by_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts: dict[tuple[str, str, int], list[str | None]] = {
        ("x", "train", part): [f"{10 * part + row + 1} 7" for row in range(4)] for part in range(3)
    }
    hub = hub_folder(tmp_path / "hub", parts, "body")
    source = open_shards(resolve_source(f"hf:{hub}"), "body")
    assert len(source) == 3
    with closing(source.open(2).documents()) as documents:
        assert list(documents) == parts["x", "train", 2]
    check_readable([source])
    with closing(StreamMixture([source], [1], packing(2), 60)) as stream:
        expected = [stream[index].tolist() for index in range(60)]
    with closing(StreamMixture([source], [1], packing(2), 60)) as stream:
        for index in range(25):
            stream[index]
        record = through_json(stream.record(25))
    with closing(StreamMixture([open_shards(resolve_source(f"hf:{hub}"), "body")], [1], packing(2), 60)) as stream:
        stream.go_on(record)
        assert [stream[index].tolist() for index in range(25, 60)] == expected[25:]


def test_the_number_of_threads_changes_nothing(
    tmp_path: Path, files: tuple[str, list[str]], tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts: dict[tuple[str, str, int], list[str | None]] = {
        ("x", "train", part): [*make_texts(8, seed=part + 1)] for part in range(3)
    }
    names = [files[0], f"hf:{hub_folder(tmp_path / 'hub', parts, 'body')}"]
    encoder = Encoder(load_data_tokenizer(tokenizer_folder), 1)
    lanes = Packing(encoder, 0, np.dtype(np.uint16), 16, HeldOut([], 0), 0, 4, 8)
    found = []
    for threads in (1, 4):
        monkeypatch.setattr(stream_module, "_threads", lambda threads=threads: threads)
        sources = [open_shards(resolve_source(name), "body") for name in names]
        with closing(StreamMixture(sources, [1, 1], lanes, 600)) as stream:
            found.append([block.tolist() for block in stream.__getitems__(range(600))])
    assert found[0] == found[1]


def test_a_stream_goes_on_at_the_commit_that_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = hub_folder(tmp_path / "hub", {("x", "train", 0): ["1", "2"]}, "body")
    commits = iter(["old", "new"])
    asked: list[str | None] = []

    class Spy(HubReader):
        def __init__(self, source: HubSource, progress: bool = False) -> None:
            asked.append(source.revision)
            super().__init__(source, progress)

    monkeypatch.setattr(reading, "newest_commit", lambda source: next(commits))
    monkeypatch.setattr(reading, "HubReader", Spy)
    sources = [open_shards(resolve_source(f"hf:{hub}"), "body") for _ in range(2)]
    first, second = (StreamMixture([source], [1], packing(1), 9) for source in sources)
    with closing(first), closing(second):
        first[0]
        second.go_on(first.record(1))
        assert second.record(1)["commits"] == ["old"]
    assert asked == ["old", "new", "old"]


def test_compressed_files_of_a_format_are_read(tmp_path: Path) -> None:
    for part in range(2):
        with gzip.open(tmp_path / f"train-{part}.json.gz", "wt") as file:
            file.writelines(json.dumps({"text": f"{10 * part + row + 1}", "id": row}) + "\n" for row in range(3))
    source = open_shards(resolve_source(f"hf:json?data_files={tmp_path}/train-*.json.gz"), "text")
    assert len(source) == 2
    found = documents_of(source, packing(2), range(2), 3)
    assert sorted(token for (token,) in found) == [1, 2, 3, 11, 12, 13]


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("hf:no-such/dataset", UnfinishedError, "source 'hf:no-such/dataset' cannot be loaded"),
        ("hf:{hub}?field=text", DataError, "has no field 'text': it has 'body', 'number'"),
        ("hf:{hub}?streaming=false", DataError, "expected no streaming=false, since files of a stream are not kept"),
        ("{hub}/*.parquet", DataError, "has no field 'text': it has 'body', 'number'"),
    ],
)
def test_what_cannot_be_streamed_is_one_line(tmp_path: Path, name: str, kind: type[Exception], message: str) -> None:
    hub = hub_folder(tmp_path / "hub", {("x", "train", 0): ["1", "2"]}, "body")
    with pytest.raises(kind, match=message) as caught:
        check_readable([open_shards(resolve_source(name.format(hub=hub)), "text")])
    assert "\n" not in str(caught.value)
