"""Packing: documents become blocks of tokens, one after another or each by itself."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from thoughtbubbles.data.splitting import Indices
from thoughtbubbles.support.errors import DataError

TokenArray = npt.NDArray[np.integer[Any]]
Lengths = npt.NDArray[np.int64]
Mark = TypeVar("Mark")


def token_type(vocab_size: int) -> "np.dtype[Any]":
    """The smaller of uint16 and int32 that holds every token id.

    Raises:
        DataError: neither does.
    """
    if vocab_size > 1 << 31:
        raise DataError(f"the tokenizer has ids up to {vocab_size - 1}: expected at most {(1 << 31) - 1}")
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.int32)


@dataclass(frozen=True)
class Packed:
    """Blocks of tokens.

    Attributes:
        blocks: [blocks, block_size], on disk.
        tokens: how many there were, separators and dropped ones included.
        dropped: how many are in no block: left over at the end, or, padded, at the beginnings of long documents.
    """

    blocks: TokenArray
    tokens: int
    dropped: int


def pack(
    shards: Iterable[TokenArray],
    lengths: Lengths,
    order: Indices,
    separator: int,
    dtype: "np.dtype[Any]",
    block_size: int,
    path: Path,
    split: str,
) -> Packed:
    """Concatenate documents, each after the separator, and cut the result into blocks.

    Blocks take no notice of document borders: attention and routing credit cross them inside a block. The documents
    are read in the order in which they are stored and written each to its place, so that every shard is opened once.

    Args:
        shards: arrays that together hold the tokens of all documents, none of which lies in two.
        lengths: tokens of each document.
        order: the documents to pack, in this order.
        separator: the token that stands before each document, so that a first word has a token to be predicted from.
        dtype: of the tokens.
        block_size: tokens a block.
        path: the file to write.
        split: the split's name, for the error.

    Raises:
        DataError: not enough tokens for one block.
    """
    ends = np.cumsum(lengths[order] + 1)
    tokens = int(ends[-1]) if len(order) else 0
    count, dropped = divmod(tokens, block_size)
    if count == 0:
        raise DataError(
            f"{split} has {tokens} tokens in {len(order)} documents, too few for one block of {block_size}: "
            "expected more text or a smaller block_size"
        )
    places = np.full(len(lengths), -1, dtype=np.int64)
    places[order] = ends - lengths[order] - 1
    mark = np.array([separator], dtype=dtype)
    _write_documents(shards, lengths, places, mark, path)
    blocks = read_array(path, dtype)[: count * block_size].reshape(count, block_size)
    return Packed(blocks, tokens, dropped)


def pad(
    shards: Iterable[TokenArray],
    lengths: Lengths,
    order: Indices,
    separator: int,
    end: int,
    dtype: "np.dtype[Any]",
    block_size: int,
    path: Path,
    split: str,
) -> Packed:
    """Give each document a row: the separator, the document, the end, and the end again up to the block's length.

    Of a document that does not fit, the row has the last tokens and the end, and no separator. So a row ends with the
    first `end` behind its first token, which `row_lengths` finds.

    Args:
        end: the token behind each document, and inside none.
        others: as in `pack`.

    Raises:
        DataError: no documents.
    """
    if not len(order):
        raise DataError(f"{split} has no documents: expected more text")
    rows: np.memmap[Any, np.dtype[Any]] = np.memmap(path, dtype=dtype, mode="w+", shape=(len(order), block_size))
    rows[:] = end
    places = np.full(len(lengths), -1, dtype=np.int64)
    places[order] = np.arange(len(order))
    for document, tokens in _documents(shards, lengths):
        if (row := places[document]) >= 0:
            kept = np.concatenate([[separator], tokens])[-(block_size - 1) :]
            rows[row, : len(kept)] = kept
    rows.flush()
    wanted = lengths[order]
    dropped = np.maximum(wanted + 2 - block_size, 0).sum()
    return Packed(read_array(path, dtype).reshape(rows.shape), int((wanted + 1).sum()), int(dropped))


def row_lengths(rows: TokenArray, end: int) -> Indices:
    """[rows]: the tokens of each row of `pad`, its end included."""
    lengths: Indices = (rows[:, 1:] == end).argmax(1) + 2
    return lengths


def cut_blocks(
    documents: Iterable[tuple[Mark, TokenArray]],
    separator: int,
    dtype: "np.dtype[Any]",
    block_size: int,
    used: int = 0,
) -> Iterator[tuple[TokenArray, Mark, int]]:
    """Pack documents as `pack` does while they come; no token is dropped, but those of a last block that is not full.

    Args:
        documents: what stands for each, and its tokens.
        separator: the token that stands before each document.
        dtype: of the tokens.
        block_size: tokens a block.
        used: tokens of the first document, its separator included, to leave out.

    Returns:
        Blocks [block_size]; what stands for the document that each ends in, and how many tokens of that document, its
        separator included, it ends after.
    """
    block, filled = np.empty(block_size, dtype=dtype), 0
    for mark, tokens in documents:
        document = np.concatenate([[separator], tokens]).astype(dtype)
        while used < len(document):
            fresh = document[used : used + block_size - filled]
            block[filled : filled + len(fresh)] = fresh
            used, filled = used + len(fresh), filled + len(fresh)
            if filled == block_size:
                yield block, mark, used
                block, filled = np.empty(block_size, dtype=dtype), 0
        used = 0


def _write_documents(
    shards: Iterable[TokenArray], lengths: Lengths, places: Indices, mark: TokenArray, path: Path
) -> None:
    with path.open("wb") as file:
        for document, tokens in _documents(shards, lengths):
            if places[document] >= 0:
                file.seek(int(places[document]) * mark.itemsize)
                file.write(mark.tobytes() + tokens.tobytes())


def _documents(shards: Iterable[TokenArray], lengths: Lengths) -> Iterator[tuple[int, TokenArray]]:
    """The number and the tokens of each document, in the order in which they are stored."""
    document = 0
    for tokens in shards:
        start = 0
        while document < len(lengths) and (end := start + int(lengths[document])) <= len(tokens):
            yield document, tokens[start:end]
            document, start = document + 1, end


def read_array(path: Path, dtype: "np.dtype[Any]") -> TokenArray:
    """A file of numbers as a read-only array that stays on disk; [0] for an empty one, which cannot be mapped."""
    if path.stat().st_size == 0:
        return np.empty(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r")
