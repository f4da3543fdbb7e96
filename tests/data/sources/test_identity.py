"""What tells files from others: sizes and ends, not the clock."""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from thoughtbubbles.data.sources.identity import END_BYTES, content_facts
from thoughtbubbles.support.errors import DataError

MIB = 1 << 20


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_a_file_that_is_touched_or_copied_is_the_same(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    for folder in (tmp_path, tmp_path / "other"):
        (folder / "a.jsonl").write_bytes(bytes(3 * MIB))
    os.utime(tmp_path / "a.jsonl", (1, 1))
    assert content_facts([tmp_path / "a.jsonl"]) == content_facts([tmp_path / "other" / "a.jsonl"])


@pytest.mark.parametrize("place", [0, MIB - 1, 2 * MIB, 3 * MIB - 1])
def test_both_ends_of_a_file_count(tmp_path: Path, place: int) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(bytes(3 * MIB))
    before = content_facts([path])
    flip(path, place)
    assert content_facts([path]) != before


@pytest.mark.parametrize("size", [0, 1, 100, MIB, MIB + 1, 2 * MIB - 1])
def test_all_of_a_small_file_counts(tmp_path: Path, size: int) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(bytes(size))
    before = content_facts([path])
    for place in {0, size // 2, size - 1} if size else ():
        flip(path, place)
        assert content_facts([path]) != before
        flip(path, place)
    path.write_bytes(bytes(size + 1))
    assert content_facts([path]) != before


def test_the_whole_footer_of_a_parquet_file_counts(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"text": ["x" * 2000] * 2000})
    pq.write_table(table, path, row_group_size=1, compression="none", use_dictionary=False)
    content = path.read_bytes()
    footer = int.from_bytes(content[-8:-4], "little") + 8
    assert 2 * END_BYTES < footer < len(content) - END_BYTES
    before = content_facts([path])
    flip(path, len(content) - footer)  # the footer's first byte, far before the last MiB
    assert content_facts([path]) != before
    flip(path, len(content) - footer)
    flip(path, len(content) - footer - 10)  # of the middle, which nothing looks at
    assert content_facts([path]) == before


def test_a_parquet_file_with_a_wild_footer_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(bytes(3 * MIB) + b"\xff\xff\xff\xffPAR1")
    before = content_facts([path])
    flip(path, 3 * MIB // 2)
    assert content_facts([path]) != before


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*gone\.txt: No such file"):
        content_facts([tmp_path / "gone.txt"])
