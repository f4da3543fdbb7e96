import gzip
import itertools
import json
from contextlib import closing
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.conftest import hub_folder
from thoughtbubbles.data import DataError, SourceError, UnfinishedError
from thoughtbubbles.data.sources.corpora import resolve_source
from thoughtbubbles.data.sources.hub import HubSource, parse_name
from thoughtbubbles.data.sources.reading import open_documents, read_documents, read_rows

STREAMING = pytest.mark.parametrize("streaming", ["true", "false"])


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """Two configurations; the first has a train split of two files and a test split, and its texts are in `body`."""
    parts = {
        ("first", "train", 0): [f"train {number}" for number in range(7)],
        ("first", "train", 1): ["train 7", "", None, "train 10"],
        ("first", "test", 0): ["test 0", "test 1"],
        ("second", "train", 0): ["second 0"],
    }
    return hub_folder(tmp_path / "hub", parts, "body")


def read(hub: Path, query: str, text_field: str = "body") -> list[str | None]:
    return list(read_documents(resolve_source(f"hf:{hub}?{query}"), text_field))


@STREAMING
def test_files_of_a_format_are_named(tmp_path: Path, streaming: str) -> None:
    for part in range(2):
        with gzip.open(tmp_path / f"train-{part}.json.gz", "wt") as file:
            file.writelines(json.dumps({"text": f"{part}.{row}", "id": row}) + "\n" for row in range(3))
    (tmp_path / "test.json").write_text('{"text": "other"}\n')
    source = resolve_source(f"hf:json?data_files={tmp_path}/train-*.json.gz&streaming={streaming}")
    assert list(read_documents(source, "text")) == ["0.0", "0.1", "0.2", "1.0", "1.1", "1.2"]
    assert resolve_source(source.name) == source
    assert [file.name for file in source.files()] == ["train-0.json.gz", "train-1.json.gz"]


def test_some_files_of_a_dataset_are_named(hub: Path) -> None:
    files = sorted(path.relative_to(hub).as_posix() for path in hub.rglob("*.parquet") if "train" in path.name)
    assert len(files) > 1
    texts = read(hub, f"data_files={files[0]}")
    assert texts
    assert len(texts) < len(read(hub, "data_files=**/*train*.parquet"))


def test_every_part_of_a_name_is_read() -> None:
    everything = "hf:a/b?config=c&split=s&field=f&streaming=false&revision=refs/convert/parquet"
    source = parse_name(everything)
    assert source == HubSource("a/b", "c", "s", "f", False, "refs/convert/parquet")
    assert source.name == everything
    assert resolve_source({"hub": "a/b", "config": "c", "streaming": False}).name == "hf:a/b?config=c&streaming=false"
    assert parse_name("hf:gpt-2.data") == HubSource("gpt-2.data")
    assert HubSource("x").name == "hf:x"
    assert HubSource("x").split == "train"
    assert HubSource("x").streaming


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "hf:a/b?cofnig=c",
            "unknown key 'cofnig', expected some of config, split, field, streaming, revision, ",
        ),
        ("hf:json", "expected data_files, since json is a format of files"),
        ("hf:a/b?streaming=1", "streaming='1': expected true or false"),
        ("hf:a/b?split", "expected key=value after the question mark"),
        ("hf:a/b?split=", "split is empty, expected a value"),
        ("hf:", "'' is not a folder, and no name of a dataset on the hub"),
        ("hf:./no/such", "'./no/such' is not a folder, and no name of a dataset on the hub"),
    ],
)
def test_bad_names_are_refused(name: str, message: str) -> None:
    with pytest.raises(DataError, match=message.replace("?", r"\?")) as caught:
        resolve_source(name)
    assert repr(name) in str(caught.value)


@STREAMING
def test_config_split_and_field_choose_the_documents(hub: Path, streaming: str) -> None:
    train = [*(f"train {number}" for number in range(8)), None, None, "train 10"]
    assert read(hub, f"config=first&streaming={streaming}") == train
    assert read(hub, f"config=first&split=test&streaming={streaming}&field=body", "other") == ["test 0", "test 1"]
    assert read(hub, f"config=second&streaming={streaming}") == ["second 0"]


@STREAMING
def test_rows_have_all_their_fields(hub: Path, streaming: str) -> None:
    rows = list(read_rows(resolve_source(f"hf:{hub}?config=first&split=test&streaming={streaming}")))
    assert rows == [{"body": "test 0", "number": 0}, {"body": "test 1", "number": 1}]


@STREAMING
def test_reading_goes_on_from_every_position(hub: Path, streaming: str) -> None:
    source = resolve_source(f"hf:{hub}?config=first&streaming={streaming}")
    reader = open_documents(source, "body")
    found, positions = [], []
    for text in reader.documents():
        found.append(text)
        positions.append(json.loads(json.dumps(reader.position())))
    for number, position in enumerate(positions):
        again = open_documents(source, "body")
        left = again.documents(position)
        assert list(itertools.islice(left, 2)) == found[number + 1 : number + 3]
        # The position after going on is as good as the first.
        place = json.loads(json.dumps(again.position()))
        assert list(open_documents(source, "body").documents(place)) == found[number + 3 :]


def test_a_stream_that_goes_on_reads_no_file_that_it_has_done(tmp_path: Path) -> None:
    texts = [f"train {number}" for number in range(20)]
    parts: dict[tuple[str, str, int], list[str | None]] = {("x", "train", n): [*texts[10 * n :][:10]] for n in (0, 1)}
    hub = hub_folder(tmp_path / "hub", parts, "body")
    source = resolve_source(f"hf:{hub}")
    reader = open_documents(source, "body")
    with closing(reader.documents()) as documents:
        assert list(itertools.islice(documents, 15)) == texts[:15]
        position = reader.position()
    # Of the first file the library looks at the schema alone.
    pq.write_table(pa.table({"body": ["read again"] * 10, "number": range(10)}), hub / "x-train-0.parquet")
    assert list(open_documents(source, "body").documents(position)) == texts[15:]
    assert list(open_documents(source, "body").documents()) == ["read again"] * 10 + texts[10:]


@STREAMING
@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("config=third", r"cannot be loaded: BuilderConfig 'third' not found. Available: \['first', 'second'\]"),
        ("split=train", r"cannot be loaded: Config name is missing. .*: \['first', 'second'\]$"),
        ("config=second&split=test", r"cannot be loaded: .*test.*train"),
        ("config=first&field=text", r"has no field 'text': it has 'body', 'number'"),
        ("config=first&field=number", r"field 'number' holds int64, expected text"),
    ],
)
def test_what_is_not_there_is_one_line(hub: Path, streaming: str, query: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read(hub, f"{query}&streaming={streaming}")
    assert "\n" not in str(caught.value)
    assert f"hf:{hub}" in str(caught.value)


@STREAMING
def test_a_hub_that_cannot_be_reached_is_one_line(streaming: str) -> None:
    with pytest.raises(UnfinishedError, match=r"source 'hf:no-such/dataset.*' cannot be loaded: \S+") as caught:
        list(read_documents(resolve_source(f"hf:no-such/dataset?streaming={streaming}"), "text"))
    assert "\n" not in str(caught.value)


def test_a_folder_without_data_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"cannot be loaded: .*empty.*any data files"):
        read(tmp_path / "empty", "split=train")


def test_rows_that_do_not_say_beforehand_what_they_have_are_checked(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "train.jsonl").write_text('{"a": "b", "n": 1}\n')
    for field, message in (("text", "has no field 'text': it has 'a', 'n'"), ("n", "field 'n' holds a?n? ?int")):
        with pytest.raises(DataError, match=message):
            read(tmp_path / "x", "split=train", field)
    assert read(tmp_path / "x", "split=train", "a") == ["b"]


def test_damaged_data_is_one_line(tmp_path: Path, hub: Path) -> None:
    reader = open_documents(resolve_source(f"hf:{hub}?config=first"), "body")
    (hub / "first-train-1.parquet").write_bytes(b"PAR1 broken")
    documents = reader.documents()
    assert len(list(itertools.islice(documents, 7))) == 7
    with pytest.raises(SourceError, match="cannot be read further: ") as caught:
        next(documents)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_every_kind_of_text_is_read(tmp_path: Path, kind: Any) -> None:
    (tmp_path / "x").mkdir()
    pq.write_table(pa.table({"text": pa.array(["a", None, "b"], kind)}), tmp_path / "x" / "train.parquet")
    for streaming in ("true", "false"):
        assert read(tmp_path / "x", f"streaming={streaming}", "text") == ["a", None, "b"]
