"""Packing: which document is held out, in which order documents follow, and the blocks that they fill."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from thoughtbubbles.data.errors import DataError

TokenArray = npt.NDArray[np.integer[Any]]


def draw(seed: int, purpose: str, value: bytes) -> bytes:
    """A uniform random key that depends on its arguments alone: no process, platform or library version."""
    return hashlib.blake2b(f"{seed}/{purpose}/".encode() + value, digest_size=16).digest()


def hold_out(digests: Sequence[bytes], fraction: float, seed: int) -> list[int]:
    """Choose the validation documents.

    The choice is made by content: documents of equal text fall on the same side, so no validation text is trained
    on, and adding documents moves few of the others.

    Args:
        digests: a digest of each document's text.
        fraction: of the documents, at least one of which is chosen.

    Returns:
        Ascending indices of the validation documents.
    """
    keys = [draw(seed, "validation", digest) for digest in digests]
    greatest = sorted(keys)[max(1, round(fraction * len(keys))) - 1]
    return [index for index, key in enumerate(keys) if key <= greatest]


def shuffled(indices: Iterable[int], seed: int) -> list[int]:
    """Document indices in an order that depends on the seed and the indices alone."""
    return sorted(indices, key=lambda index: draw(seed, "order", str(index).encode()))


def token_type(vocab_size: int) -> "np.dtype[Any]":
    """The smaller of uint16 and int32 that holds every token id."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.int32)


class TokenStore:
    """The tokens of documents in a file: written in document order inside `with`, then read in any order.

    Args:
        path: the file to write.
        documents: how many documents there are.
        dtype: of the tokens on disk.
    """

    def __init__(self, path: Path, documents: int, dtype: "np.dtype[Any]") -> None:
        self._path = path
        self._dtype = dtype
        self._lengths = np.zeros(documents, dtype=np.int64)

    def __enter__(self) -> "TokenStore":
        self._file = self._path.open("wb")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._tokens = read_array(self._path, self._dtype)
        self._ends = np.cumsum(self._lengths)

    def append(self, document: int, tokens: TokenArray) -> None:
        """Append the next tokens of a document, never of one before the last one appended to."""
        self._file.write(tokens.astype(self._dtype).tobytes())
        self._lengths[document] += len(tokens)

    def document(self, index: int) -> TokenArray:
        """The tokens of a document, once the writing has ended."""
        return self._tokens[self._ends[index] - self._lengths[index] : self._ends[index]]


@dataclass(frozen=True)
class Packed:
    """Blocks of tokens.

    Attributes:
        blocks: [blocks, block_size], on disk.
        tokens: how many there were, separators and dropped ones included.
        dropped: how many were left over at the end, too few for a block.
    """

    blocks: TokenArray
    tokens: int
    dropped: int


def pack(store: TokenStore, order: Sequence[int], separator: int, block_size: int, path: Path, split: str) -> Packed:
    """Concatenate documents, each after the separator, and cut the result into blocks.

    Blocks take no notice of document borders: attention and routing credit cross them inside a block.

    Args:
        store: holds the documents.
        order: the documents to pack, in this order.
        separator: the end-of-text token, which stands before each document, so that a first word has a token to be
            predicted from.
        block_size: tokens a block.
        path: the file to write.
        split: the split's name, for the error.

    Raises:
        DataError: not enough tokens for one block.
    """
    dtype = store.document(order[0]).dtype
    mark = np.array([separator], dtype=dtype).tobytes()
    with path.open("wb") as file:
        for index in order:
            file.write(mark)
            file.write(store.document(index).tobytes())
        tokens = file.tell() // dtype.itemsize
    count, dropped = divmod(tokens, block_size)
    if count == 0:
        raise DataError(
            f"{split} has {tokens} tokens in {len(order)} documents, too few for one block of {block_size}: "
            "expected more text or a smaller block_size"
        )
    blocks = read_array(path, dtype)[: count * block_size].reshape(count, block_size)
    return Packed(blocks, tokens, dropped)


def read_array(path: Path, dtype: "np.dtype[Any]") -> TokenArray:
    """A file of numbers as a read-only array that stays on disk; [0] for an empty one, which cannot be mapped."""
    if path.stat().st_size == 0:
        return np.empty(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r")
