"""Splitting: which documents are held out, and in which order those to train on follow.

Documents are rows of numpy arrays: a corpus can have a hundred million, too many for an object each.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from thoughtbubbles.support.errors import DataError
from thoughtbubbles.support.sampling import DIGEST_BYTES, draw

# What is kept of a document: the digest of its text, its bytes in UTF-8, its tokens without the separator.
DOCUMENT = np.dtype([("digest", f"V{DIGEST_BYTES}"), ("bytes", "<i8"), ("tokens", "<i8")])

DocumentArray = npt.NDArray[np.void]
Digests = npt.NDArray[np.void]
# [documents, 2]: the first and the last 8 bytes of a 16-byte key, so that numbers compare as the bytes do.
Keys = npt.NDArray[np.uint64]
Indices = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

DRAWS_AT_A_TIME = 1 << 16


def hold_out(digests: Digests, fraction: float, seed: int, among: Digests | None = None) -> Mask:
    """Choose the validation documents.

    The choice is made by content: documents of equal text fall on the same side, so no validation text is trained
    on, and adding documents moves few of the others.

    Args:
        digests: a digest of each document's text.
        fraction: of the documents, at least one of which is chosen.
        seed: of the choice.
        among: the digests of all documents where `digests` has only part of them: a document is chosen just as it
            is among all.

    Returns:
        Which documents are for validation.
    """
    keys = _draws(seed, "validation", _values(digests), len(digests))
    everyone = keys if among is None else _draws(seed, "validation", _values(among), len(among))
    chosen = _at_most(keys, _smallest(everyone, max(1, round(fraction * len(everyone)))))
    return chosen if chosen.any() else _at_most(keys, _smallest(keys, 1))


def shuffled(indices: Indices, seed: int) -> Indices:
    """Document indices in an order that depends on the seed and the indices alone."""
    keys = _draws(seed, "order", (str(index).encode() for index in np.sort(indices)), len(indices))
    return np.sort(indices)[np.lexsort((keys[:, 1], keys[:, 0]))]


@dataclass(frozen=True)
class Split:
    """The documents of each split, in the order in which they are packed."""

    train: Indices
    validation: Indices


def split_documents(
    digests: Digests, count: int, fraction: float | None, seed: int, among: Digests | None = None
) -> Split:
    """Divide the documents.

    Args:
        digests: of the documents of the sources, then of those of the validation sources.
        count: how many are of the sources.
        fraction: to hold out; None if there are validation sources.
        seed: of the choice and of the order.
        among: as in `hold_out`.

    Raises:
        DataError: nothing is left to train on.
    """
    if fraction is None:
        validation = np.arange(count, len(digests), dtype=np.int64)
        train = np.flatnonzero(~_is_in(digests[:count], digests[count:]))
    else:
        held_out = hold_out(digests, fraction, seed, among)
        validation, train = np.flatnonzero(held_out), np.flatnonzero(~held_out)
    if not len(train):
        different, chosen = (len(np.unique(_halves(some), axis=0)) for some in (digests, digests[validation]))
        raise DataError(
            f"no documents are left to train on: the sources hold {different} different documents and "
            f"{chosen} are held out for validation, expected more or other sources in `validation`"
        )
    return Split(shuffled(train, seed), validation)


def _values(digests: Digests) -> Iterator[bytes]:
    for start in range(0, len(digests), DRAWS_AT_A_TIME):
        data = digests[start : start + DRAWS_AT_A_TIME].tobytes()
        for place in range(0, len(data), DIGEST_BYTES):
            yield data[place : place + DIGEST_BYTES]


def _draws(seed: int, purpose: str, values: Iterable[bytes], count: int) -> Keys:
    keys = np.empty((count, 2), dtype=np.uint64)
    left = iter(values)
    for start in range(0, count, DRAWS_AT_A_TIME):
        data = b"".join(draw(seed, purpose, value) for value in islice(left, DRAWS_AT_A_TIME))
        keys[start : start + DRAWS_AT_A_TIME] = _pairs(data)
    return keys


def _halves(digests: Digests) -> Keys:
    return _pairs(np.ascontiguousarray(digests))


def _pairs(data: Any) -> Keys:
    return np.frombuffer(data, dtype=">u8").astype(np.uint64).reshape(-1, 2)


def _smallest(keys: Keys, rank: int) -> tuple[np.uint64, np.uint64]:
    """The key of a rank from 1, in the order of the 16 bytes."""
    high = np.partition(keys[:, 0], rank - 1)[rank - 1]
    ties = keys[keys[:, 0] == high, 1]
    below = int((keys[:, 0] < high).sum())
    return high, np.sort(ties)[rank - 1 - below]


def _at_most(keys: Keys, key: tuple[np.uint64, np.uint64]) -> Mask:
    high, low = key
    chosen: Mask = (keys[:, 0] < high) | ((keys[:, 0] == high) & (keys[:, 1] <= low))
    return chosen


def _is_in(digests: Digests, others: Digests) -> Mask:
    found = np.isin(_halves(digests)[:, 0], _halves(others)[:, 0])
    # Half a digest that is equal is nearly always a whole one; the few that are found are compared in full.
    known = set(_values(others))
    candidates = np.flatnonzero(found)
    found[candidates] = [value in known for value in _values(digests[candidates])]
    return found
