"""Held-out documents: those of prepared validation blocks, to be left out of a stream that is trained on."""

import hashlib
from collections.abc import Iterable

import numpy as np

from thoughtbubbles.data.preparation.packing import TokenArray
from thoughtbubbles.data.preparation.prepared import PreparedData
from thoughtbubbles.support.errors import DataError
from thoughtbubbles.support.sampling import DIGEST_BYTES


class HeldOut:
    """The documents of validation blocks, known by their tokens.

    Args:
        corpora: prepared folders of one tokenizer.
        separator: the token that stands before each document, and inside none.

    Raises:
        DataError: validation that is a part of a document, of which a stream knows nothing.
    """

    def __init__(self, corpora: Iterable[PreparedData], separator: int) -> None:
        self._digests: set[bytes] = set()
        # The beginnings of documents of which the last block holds no more, and how long these can be.
        self._cut: list[tuple[TokenArray, int]] = []
        for corpus in corpora:
            if corpus.manifest.cut is not None:
                raise DataError(
                    f"{corpus.path}: its validation is a part of a document, which a stream cannot leave out, expected "
                    "validation of whole documents"
                )
            *whole, last = _documents(corpus, separator)
            dropped = corpus.manifest.validation.dropped_tokens
            if len(last):
                self._cut.append((last, len(last) + dropped))
            self._digests |= {_digest(document) for document in whole}

    def holds(self, tokens: TokenArray) -> bool:
        """Whether a document is one of them."""
        return _digest(tokens) in self._digests or any(
            len(start) <= len(tokens) <= longest and np.array_equal(tokens[: len(start)], start)
            for start, longest in self._cut
        )


def _documents(corpus: PreparedData, separator: int) -> list[TokenArray]:
    """The tokens of each document of the validation blocks, without the separator."""
    column = corpus.validation.data.column("input_ids")
    tokens = np.concatenate([chunk.flatten().to_numpy() for chunk in column.chunks])
    starts = np.flatnonzero(tokens == separator)
    return [document[1:] for document in np.split(tokens, starts[1:])]


def _digest(tokens: TokenArray) -> bytes:
    return hashlib.blake2b(tokens.astype("<u4").tobytes(), digest_size=DIGEST_BYTES).digest()
