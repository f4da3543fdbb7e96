"""Files of rows and text, packed or not, under whatever name; what is left out is counted and named."""

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from tests.data.conftest import write_folder
from tests.data.sources.test_reading import read
from thoughtbubbles.cli import app
from thoughtbubbles.data import DataError, Manifest, prepare
from thoughtbubbles.data.sources.corpora import check_different, resolve_source
from thoughtbubbles.data.sources.reading import open_documents, read_rows, read_texts

TEXTS = ["one\r\n", "zwei, ü", '"3"', None]
ROWS: list[dict[str, Any]] = [{"id": str(number), "text": text} for number, text in enumerate(TEXTS)]


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.compress(data, codec="zstd", asbytes=True),
    # As `cat a.gz b.gz` makes it.
    ".GZ": lambda data: gzip.compress(data[:20]) + gzip.compress(data[20:]),
}


def as_csv(delimiter: str) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, ["id", "text"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return file.getvalue().encode()


LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
FORMATS = {
    ".jsonl": LINES,
    ".ndjson": b"\xef\xbb\xbf" + LINES,
    ".json": json.dumps(ROWS, indent=2).encode(),
    ".JSON": LINES,
    ".csv": as_csv(","),
    ".tsv": as_csv("\t"),
}


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("suffix", FORMATS)
def test_rows_of_every_format_are_the_same(tmp_path: Path, suffix: str, packer: str) -> None:
    path = tmp_path / f"rows{suffix}{packer}"
    path.write_bytes(PACKERS[packer](FORMATS[suffix]))
    assert read(path) == TEXTS
    assert read(tmp_path) == TEXTS
    assert list(read_rows(resolve_source(str(path)))) == ROWS
    reader = open_documents(resolve_source(str(path)), "text")
    documents = reader.documents()
    assert [next(documents), next(documents)] == TEXTS[:2]
    assert list(open_documents(resolve_source(str(path)), "text").documents(reader.position())) == TEXTS[2:]


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("name", ["text.txt", "text.md", "text"])
def test_packed_text_is_one_document(tmp_path: Path, name: str, packer: str) -> None:
    path = tmp_path / f"{name}{packer}"
    path.write_bytes(PACKERS[packer](b"\xef\xbb\xbfone\r\ntwo\n"))
    assert list(read_texts(path)) == ["one\r\ntwo\n"]
    if path.suffix:
        assert read(path) == read(tmp_path) == ["one\r\ntwo\n"]


def test_a_json_object_is_one_row_and_settings_in_a_folder_are_none(tmp_path: Path) -> None:
    for name, content in {"a": {"text": "one"}, "b": {"version": 1}, "c": [1, 2], "d": [{"text": "two"}]}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    assert read(tmp_path / "a.json") == ["one"]
    assert read(tmp_path) == ["two"]
    assert resolve_source(str(tmp_path)).left_out == ((".json", 3),)
    with pytest.raises(DataError, match=r"c.json, row 1 holds a int, expected an object with the field 'text'"):
        read(tmp_path / "c.json")


DAMAGED = {
    "cut.jsonl.gz": gzip.compress(LINES * 50)[:-20],
    "cut.jsonl.xz": lzma.compress(LINES * 50)[:-20],
    "cut.jsonl.bz2": bz2.compress(LINES * 50)[:-20],
    "cut.jsonl.zst": PACKERS[".zst"](LINES * 50)[:-20],
    "no.jsonl.gz": b"plain",
    "no.jsonl.zst": b"plain",
    "no.json": b"[{",
    "deep.json": b"[" * 10**5,
    "empty.json": b"",
    "twice.jsonl": b'{"text": "a", "text": "b"}',
    "inside.jsonl": b'{"text": "a", "more": {"x": 1, "x": 2}}',
    "twice.csv": b"text,text\na,b\n",
    "short.csv": b"id,text\n1,a\n2\n",
    "quote.csv": b'id,text\n1,"a\n',
    "latin.csv": b"id,text\n1,caf\xe9\n",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_one_line_that_names_it(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(DAMAGED[name])
    for reading in (lambda: read(tmp_path / name), lambda: list(read_rows(resolve_source(str(tmp_path / name))))):
        with pytest.raises(DataError, match=name) as caught:
            reading()
        assert "\n" not in str(caught.value)


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    columns = [pa.array(["p"]), pa.array(["q"]), pa.array(["r"])]
    pq.write_table(pa.table(columns, names=["text", "text", "title"]), path)
    for reading in (lambda: read(path), lambda: list(read_rows(resolve_source(str(path))))):
        with pytest.raises(DataError, match=r"x.parquet has 2 fields 'text': expected one of each name"):
            reading()
    assert read(path, "title") == ["r"]
    struct = pa.StructArray.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"])
    pq.write_table(pa.table([struct], names=["text"]), path)
    with pytest.raises(DataError, match=r"x.parquet is not a readable parquet file"):
        list(read_rows(resolve_source(str(path))))


@pytest.mark.parametrize("kind", [pa.null(), pa.string(), pa.large_string(), pa.string_view()], ids=str)
def test_a_column_of_nulls_is_skipped(tmp_path: Path, kind: pa.DataType) -> None:
    pq.write_table(pa.table({"text": ["one", None]}), tmp_path / "0.parquet")
    pq.write_table(pa.table({"text": pa.array([None, None], kind)}), tmp_path / "1.parquet")
    assert read(tmp_path) == ["one", None, None, None]


def test_links_are_read_by_their_names(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    blobs.mkdir()
    (snapshot / "deep").mkdir(parents=True)
    pq.write_table(pa.table({"text": ["one", "two"]}), blobs / "9f86d0")
    (blobs / "1a2b").write_bytes(gzip.compress(b'{"text": "three"}\n'))
    (snapshot / "train.parquet").symlink_to("../../blobs/9f86d0")
    (snapshot / "deep" / "more.jsonl.gz").symlink_to("../../../blobs/1a2b")
    assert read(snapshot / "train.parquet") == read(snapshot / "*.parquet") == ["one", "two"]
    assert read(snapshot) == ["three", "one", "two"]
    assert list(read_texts(snapshot / "train.parquet")) == ["one", "two"]


def test_a_link_without_a_suffix_is_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "text.txt.gz").write_bytes(gzip.compress(b"text"))
    (tmp_path / "corpus").symlink_to("text.txt.gz")
    assert read(tmp_path / "corpus") == ["text"]


def test_linked_folders_are_read_once_and_never_in_a_circle(tmp_path: Path) -> None:
    write_folder(tmp_path / "elsewhere", ["far"])
    write_folder(tmp_path / "here", ["near"])
    (tmp_path / "here" / "more").symlink_to("../elsewhere")
    (tmp_path / "here" / "again").symlink_to(".")
    (tmp_path / "here" / "copy.txt").symlink_to("000.txt")
    assert read(tmp_path / "here") == ["near", "far"]
    with pytest.raises(DataError, match="is in both"):
        check_different([resolve_source(str(tmp_path / name)) for name in ("here", "elsewhere")])
    (tmp_path / "here" / "lost.txt").symlink_to("nowhere.txt")
    with pytest.raises(DataError, match=r"lost.txt is a link to nowhere.txt, which does not exist"):
        read(tmp_path / "here")


def left_out(tmp_path: Path, *options: str) -> tuple[str, Manifest]:
    tokenizer = ["--vocab-size", "300", "--block-size", "8"]
    command = ["prepare", str(tmp_path / "out"), str(tmp_path / "data"), *tokenizer, *options]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    return done.stdout, Manifest.read(tmp_path / "out")


def test_what_is_left_out_is_said_and_recorded(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data", ["a text that is good enough " * 3, "and another one of them " * 3, ""])
    for number in range(7):
        (folder / f"latin{number}.txt").write_bytes(f"caf\u00e9 {number}".encode("latin-1"))
    for name in ("a.zip", "b.zip", "c.tar.gz", "LICENSE", "d.parquet.gz"):
        (folder / name).write_bytes(b"?")
    said, manifest = left_out(tmp_path, "--quiet")
    (source,) = manifest.sources
    assert (source.documents, source.skipped, source.undecodable) == (2, 8, 7)
    assert source.unread_files == {".gz": 2, ".zip": 2, "no suffix": 1}
    named = ", ".join(str(folder / f"latin{number}.txt") for number in range(5))
    assert f"{folder}: 7 left out that are not UTF-8: {named}, ...\n" in said
    assert f"{folder}: 1 left out that are empty\n" in said
    assert f"{folder}: 5 files left out that are no text or rows: 2 of .gz, 2 of .zip, 1 of no suffix\n" in said
    again, same = left_out(tmp_path)
    assert same == manifest
    assert "7 left out that are not UTF-8" in again


def test_nothing_is_said_where_nothing_is_left_out(tmp_path: Path) -> None:
    write_folder(tmp_path / "data", ["a text that is good enough " * 3, "and another one of them " * 3])
    assert "left out" not in left_out(tmp_path)[0]


def test_a_text_that_is_not_utf_8_is_refused_where_it_is_all_there_is(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes("caf\u00e9".encode("utf-16"))
    with pytest.raises(DataError, match=r"x.txt is not UTF-8"):
        list(read_texts(tmp_path / "x.txt"))
    with pytest.raises(DataError, match=r"no documents: 1 were skipped because they are empty or not UTF-8"):
        prepare(tmp_path / "out", [str(tmp_path / "x.txt")], progress=False)
