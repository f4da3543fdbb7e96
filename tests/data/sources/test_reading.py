import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.conftest import write_folder
from thoughtbubbles.data import DataError
from thoughtbubbles.data.sources.corpora import resolve_source
from thoughtbubbles.data.sources.formats import PARQUET_ROWS
from thoughtbubbles.data.sources.reading import open_documents, read_documents, read_rows

ROWS = ["first\n", "second", "thïrd"]


def read(name: str | Path, text_field: str = "text") -> list[str | None]:
    return list(read_documents(resolve_source(str(name)), text_field))


def write_parquet(path: Path, values: Sequence[object], kind: pa.DataType | None = None) -> Path:
    table = pa.table({"title": ["t"] * len(values), "text": pa.array(values, kind)})
    pq.write_table(table, path, row_group_size=2)
    return path


def write_jsonl(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("\n\n".join(json.dumps(row) for row in rows))
    return path


def test_text_file_is_one_document_byte_for_byte(tmp_path: Path) -> None:
    file = tmp_path / "one.TXT"
    file.write_bytes(b"\xef\xbb\xbfa\r\nb \n")
    assert read(file) == ["a\r\nb \n"]


def test_empty_and_undecodable_documents_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "0.txt").write_bytes(b"latin \xe9")
    (tmp_path / "1.txt").write_text("")
    (tmp_path / "2.txt").write_text("good")
    assert read(tmp_path) == [None, None, "good"]


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())], ids=str
)
def test_parquet_rows_are_documents(tmp_path: Path, kind: pa.DataType) -> None:
    values = [*ROWS, None, ""] * PARQUET_ROWS
    assert read(write_parquet(tmp_path / "x.parquet", values, kind)) == [*ROWS, None, None] * PARQUET_ROWS


def test_jsonl_rows_are_documents(tmp_path: Path) -> None:
    rows = [{"body": text, "id": 1} for text in [*ROWS, None, "\ud800 alone"]]
    assert read(write_jsonl(tmp_path / "x.jsonl", rows), "body") == [*ROWS, None, None]


def test_documents_are_read_lazily(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "good"}\nnot json\n')
    documents = read_documents(resolve_source(str(tmp_path)), "text")
    assert next(documents) == "good"
    with pytest.raises(DataError, match="line 2 is not JSON"):
        next(documents)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": 1}', r"x.jsonl, line 1: field 'text' holds a int, expected text"),
        ('["text"]', r"x.jsonl, line 1 holds a list, expected an object with the field 'text'"),
        ('{"a": 1, "b": 2}', r"x.jsonl, line 1 has no field 'text': it has 'a', 'b'"),
        ("{}", r"x.jsonl, line 1 has no field 'text': it has no fields"),
        ('{"text": ', r"x.jsonl, line 1 is not JSON"),
    ],
)
def test_bad_jsonl_is_refused(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "x.jsonl").write_text(line)
    with pytest.raises(DataError, match=message):
        read(tmp_path / "x.jsonl")


def test_bad_parquet_is_refused(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "x.parquet", ["x"])
    with pytest.raises(DataError, match=r"x.parquet has no field 'body': it has 'title', 'text'"):
        read(file, "body")
    with pytest.raises(DataError, match=r"x.parquet: field 'text' holds int64, expected text"):
        read(write_parquet(tmp_path / "x.parquet", [1, 2]))
    file.write_bytes(b"not parquet")
    with pytest.raises(DataError, match=r"x.parquet is not a readable parquet file"):
        read(file)


def test_file_that_vanishes_is_refused(tmp_path: Path) -> None:
    source = resolve_source(str(write_folder(tmp_path / "x", ["a"])))
    source.files[0].unlink()
    with pytest.raises(DataError, match=r"cannot read .*000.txt: No such file"):
        list(read_documents(source, "text"))


@pytest.mark.parametrize("kind", ["text", "parquet", "jsonl"])
def test_reading_goes_on_from_every_position(tmp_path: Path, kind: str) -> None:
    values = [f"row {number}" if number % 5 else None for number in range(2 * PARQUET_ROWS + 7)]
    if kind == "text":
        write_folder(tmp_path / "x", [value or "" for value in values[:20]])
    for name, part in (("a", values[:9]), ("b", values[9:])):
        if kind == "parquet":
            write_parquet(tmp_path / f"{name}.parquet", part, pa.string())
        elif kind == "jsonl":
            write_jsonl(tmp_path / f"{name}.jsonl", [{"text": text} for text in part])
    source = resolve_source(str(tmp_path))
    reader = open_documents(source, "text")
    found, positions = [], []
    for text in reader.documents():
        found.append(text)
        positions.append(json.loads(json.dumps(reader.position())))
    assert found == (values[:20] if kind == "text" else values)
    for number, position in enumerate(positions):
        assert list(open_documents(source, "text").documents(position)) == found[number + 1 :]


def test_rows_before_a_position_are_not_decoded(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('not json\n\n{"text": "good"}\n')
    reader = open_documents(resolve_source(str(tmp_path)), "text")
    assert list(reader.documents({"file": 0, "row": 1})) == ["good"]


def test_rows_have_all_their_fields(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{number}", "answer": {"a": [number]}} for number in range(PARQUET_ROWS + 1)]
    write_jsonl(tmp_path / "x.jsonl", rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet", row_group_size=5)
    for name in ("x.jsonl", "x.parquet"):
        assert list(read_rows(resolve_source(str(tmp_path / name)))) == rows


def test_text_has_no_rows(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("[1]\n")
    with pytest.raises(DataError, match=r"x.jsonl, line 1 holds a list, expected an object$"):
        list(read_rows(resolve_source(str(tmp_path))))
    (tmp_path / "y.txt").write_text("text")
    with pytest.raises(DataError, match=r"y.txt is text: expected rows, in .jsonl, .json, .csv, .parquet or"):
        next(read_rows(resolve_source(str(tmp_path))))
