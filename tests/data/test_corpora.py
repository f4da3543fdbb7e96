import json
import os
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.conftest import write_folder
from thoughtbubbles.data import DataError
from thoughtbubbles.data.corpora import PARQUET_ROWS, read_documents, resolve_source

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


def test_python_stdlib_is_the_library_without_its_tests() -> None:
    source = resolve_source("python-stdlib")
    assert source.kind == "python-stdlib"
    assert len(source.files) > 100
    assert all(file.suffix == ".py" for file in source.files)
    skipped = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
    root = Path(os.__file__).resolve().parent
    parts = {part for file in source.files for part in file.relative_to(root).parts}
    assert not parts & skipped
    assert {"argparse.py", "asyncio", "json"} <= parts
    relative = [file.relative_to(root).as_posix() for file in source.files]
    assert relative == sorted(relative)


def test_text_file_is_one_document_byte_for_byte(tmp_path: Path) -> None:
    file = tmp_path / "one.TXT"
    file.write_bytes(b"\xef\xbb\xbfa\r\nb \n")
    assert read(file) == ["a\r\nb \n"]


def test_folder_is_read_in_the_order_of_its_paths(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.md", "a/b/c.py", ".hidden.txt", ".git/x.txt", "__pycache__/y.py", "image.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read(tmp_path) == ["a/b/c.py", "a/z.md", "b.txt"]


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


def test_glob_and_folder_of_tables_agree(tmp_path: Path) -> None:
    for name, values in (("b", ["3", "4"]), ("a", ["1", "2"])):
        write_parquet(tmp_path / f"{name}.parquet", list(values))
    assert read(tmp_path) == read(tmp_path / "*.parquet") == ["1", "2", "3", "4"]


def test_recursive_glob_counts_each_file_once(tmp_path: Path) -> None:
    write_folder(tmp_path / "deep" / "er", ["x", "y"])
    assert read(tmp_path / "**" / "*") == ["x", "y"]


def test_kind_names_every_kind_of_file(tmp_path: Path) -> None:
    write_folder(tmp_path / "mixed", ["x"])
    write_jsonl(tmp_path / "mixed" / "y.jsonl", [{"text": "y"}])
    assert resolve_source(str(tmp_path / "mixed")).kind == "jsonl+text"


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


def test_bad_source_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"source 'no/such' does not exist: expected a file, a folder, a glob or"):
        resolve_source("no/such")
    (tmp_path / "image.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"image.png has the unknown suffix '.png': expected .c, .*.txt"):
        resolve_source(str(tmp_path / "image.png"))
    for name in (tmp_path, tmp_path / "*.txt"):
        with pytest.raises(DataError, match=r"has no files to read: expected .*\.parquet"):
            resolve_source(str(name))


def test_file_that_vanishes_is_refused(tmp_path: Path) -> None:
    source = resolve_source(str(write_folder(tmp_path / "x", ["a"])))
    source.files[0].unlink()
    with pytest.raises(DataError, match=r"cannot read .*000.txt: No such file"):
        list(read_documents(source, "text"))
