from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thoughtbubbles.data import DataError
from thoughtbubbles.data.preparation.packing import (
    Packed,
    TokenArray,
    cut_blocks,
    pack,
    pad,
    row_lengths,
    token_type,
)

Document = list[int]


def packed(
    shards: Sequence[Sequence[Document]],
    order: Sequence[int],
    separator: int,
    size: int,
    path: Path,
    split: str = "train",
) -> Packed:
    dtype = token_type(70_001)
    arrays: list[TokenArray] = [np.array([*chain(*shard)], dtype=dtype) for shard in shards]
    lengths = np.array([len(document) for shard in shards for document in shard], dtype=np.int64)
    return pack(arrays, lengths, np.array(order, dtype=np.int64), separator, dtype, size, path / "packed", split)


@pytest.mark.parametrize(("vocab_size", "name"), [(65536, "uint16"), (65537, "int32"), (1 << 31, "int32")])
def test_token_type_holds_every_id(vocab_size: int, name: str) -> None:
    assert token_type(vocab_size) == np.dtype(name)
    assert np.iinfo(token_type(vocab_size)).max >= vocab_size - 1


def test_ids_beyond_32_bits_are_refused() -> None:
    with pytest.raises(DataError, match=r"the tokenizer has ids up to 2147483648: expected at most 2147483647"):
        token_type((1 << 31) + 1)


def test_blocks_are_the_documents_each_after_the_separator(tmp_path: Path) -> None:
    found = packed([[[1, 2, 3], []], [], [[70_000, 5]]], [2, 0, 1], 9, 3, tmp_path)
    assert found.blocks.tolist() == [[9, 70_000, 5], [9, 1, 2]]
    assert (found.tokens, found.dropped) == (8, 2)
    assert found.blocks.dtype == np.int32


def test_too_few_tokens_are_refused(tmp_path: Path) -> None:
    documents = [[1, 2], [3]]
    assert len(packed([documents], [0, 1], 0, 5, tmp_path).blocks) == 1
    with pytest.raises(DataError, match="validation has 5 tokens in 2 documents, too few for one block of 6"):
        packed([documents], [0, 1], 0, 6, tmp_path, "validation")
    with pytest.raises(DataError, match="train has 0 tokens in 0 documents, too few for one block of 5"):
        packed([documents], [], 0, 5, tmp_path)


def test_documents_without_tokens_can_be_packed(tmp_path: Path) -> None:
    assert packed([[[], []]], [1, 0], 7, 2, tmp_path).blocks.tolist() == [[7, 7]]


def test_padded_documents_have_a_row_each(tmp_path: Path) -> None:
    shards = [np.array([1, 2, 3, 4], dtype=np.uint16), np.array([5, 6, 7, 8, 9], dtype=np.uint16)]
    lengths = np.array([1, 3, 0, 5])
    order = np.array([3, 0, 2, 1])
    found = pad(shards, lengths, order, 70, 80, np.dtype(np.uint16), 5, tmp_path / "rows", "train")
    expected = [[6, 7, 8, 9, 80], [70, 1, 80, 80, 80], [70, 80, 80, 80, 80], [70, 2, 3, 4, 80]]
    assert found.blocks.tolist() == expected
    assert row_lengths(found.blocks, 80).tolist() == [5, 3, 2, 5]
    assert (found.tokens, found.dropped) == (6 + 2 + 1 + 4, 2)
    with pytest.raises(DataError, match="validation has no documents: expected more text"):
        pad(shards, lengths, order[:0], 70, 80, np.dtype(np.uint16), 5, tmp_path / "none", "validation")


@given(shards=st.lists(st.lists(st.lists(st.integers(1, 9), max_size=4), max_size=4), max_size=4), data=st.data())
def test_blocks_do_not_depend_on_shards(
    tmp_path_factory: pytest.TempPathFactory, shards: list[list[Document]], data: st.DataObject
) -> None:
    documents = [document for shard in shards for document in shard]
    order = data.draw(st.permutations(range(len(documents))).map(lambda found: found[: len(found) * 3 // 4]))
    stream = [token for index in order for token in (0, *documents[index])]
    if len(stream) < 2:
        return
    found = packed(shards, order, 0, 2, tmp_path_factory.mktemp("packed"))
    assert found.blocks.reshape(-1).tolist() == stream[: len(stream) // 2 * 2]


@given(documents=st.lists(st.lists(st.integers(1, 9), max_size=12), min_size=1, max_size=8), size=st.integers(2, 6))
def test_documents_that_come_one_by_one_are_packed_alike(
    tmp_path_factory: pytest.TempPathFactory, documents: list[Document], size: int
) -> None:
    arrays = [(number, np.array(document, dtype=np.uint32)) for number, document in enumerate(documents)]
    blocks = list(cut_blocks(arrays, 0, np.dtype(np.uint16), size))
    if sum(len(document) + 1 for document in documents) >= size:
        folder = tmp_path_factory.mktemp("packed")
        whole = packed([documents], range(len(documents)), 0, size, folder)
        assert [block.tolist() for block, _, _ in blocks] == whole.blocks.tolist()
    for number, (_, mark, used) in enumerate(blocks):
        following = cut_blocks(arrays[mark:], 0, np.dtype(np.uint16), size, used)
        assert [block.tolist() for block, _, _ in following] == [block.tolist() for block, _, _ in blocks[number + 1 :]]
