import os
import re
from pathlib import Path

import pytest

from tests.data.conftest import write_folder
from tests.data.sources.test_reading import read, write_jsonl, write_parquet
from thoughtbubbles.data import DataError
from thoughtbubbles.data.sources.corpora import check_different, resolve_source
from thoughtbubbles.data.sources.reading import read_documents


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


def test_folder_is_read_in_the_order_of_its_paths(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.md", "a/b/c.py", ".hidden.txt", ".git/x.txt", "__pycache__/y.py", "image.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read(tmp_path) == ["a/b/c.py", "a/z.md", "b.txt"]


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


def test_bad_source_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"source 'no/such' does not exist: expected a file, a folder, a glob or"):
        resolve_source("no/such")
    (tmp_path / "image.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"image.png has the unknown suffix '.png': expected .c, .*.txt"):
        resolve_source(str(tmp_path / "image.png"))
    for name in (tmp_path, tmp_path / "*.txt"):
        with pytest.raises(DataError, match=r"has no files to read: expected .*\.parquet"):
            resolve_source(str(name))


def test_a_mapping_names_a_path_and_its_field(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", [{"body": "x", "text": "y"}])
    assert list(read_documents(resolve_source({"path": str(file), "field": "body"}), "text")) == ["x"]
    assert list(read_documents(resolve_source({"path": str(file)}), "text")) == ["y"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({}, "expected either the key hub or the key path"),
        ({"hub": "a", "path": "b"}, "expected either the key hub or the key path"),
        ({"path": 3}, "path=3: expected text"),
        ({"path": "python-stdlib", "split": "test"}, "unknown key 'split', expected beside path only field"),
        ({"path": "python-stdlib", "field": 1}, "field=1: expected text or null"),
        ({"hub": "a/b", "splt": "test"}, "'hf:a/b': unknown key 'splt', expected some of config, split, field"),
        ({"hub": "a/b", "streaming": "yes"}, "streaming='yes': expected true or false"),
    ],
    ids=str,
)
def test_bad_mappings_are_refused(source: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        resolve_source(source)


def test_text_that_two_sources_name_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "x", ["a", "b"])
    names: list[list[str]] = [
        [str(tmp_path / "x"), str(tmp_path / "x" / "001.txt")],
        ["hf:a/b?split=test", "hf:a/b?streaming=false&split=test"],
    ]
    for pair in names:
        with pytest.raises(DataError, match=r"sources .* and .*: .* is in both, expected each once"):
            check_different([resolve_source(name) for name in pair])
    check_different([resolve_source(name) for name in ("hf:a/b", "hf:a/b?split=test", str(tmp_path / "x"))])
