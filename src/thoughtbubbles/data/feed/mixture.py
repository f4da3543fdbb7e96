"""The order of training: which block of which corpus is sample i of a run, computed without a pass over the data."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from thoughtbubbles.data.splitting import Indices
from thoughtbubbles.support.errors import DataError
from thoughtbubbles.support.sampling import draw

# Samples after which the corpora's shares are exact, but for rounding.
ROUND = 4096
ROUNDS_OF_CIPHER = 6


@dataclass(frozen=True)
class BlockPlace:
    """Where a sample comes from: a corpus, by its place in the list, and a block of it."""

    corpus: int
    block: int


class Corpus(Protocol):
    """Blocks to draw from, as a `datasets.Dataset` holds them."""

    def __len__(self) -> int: ...

    def __getitems__(self, keys: list[int]) -> list[Any]: ...


class Rounds:
    """Which corpus each sample of a sequence is of: in exact proportion to the weights every `ROUND` samples.

    Args:
        weights: shares of the samples, in any unit.
        seed: of the order inside a round.
        purpose: tells sequences of one seed apart.

    Raises:
        DataError: more corpora than a round has samples.
    """

    def __init__(self, weights: Sequence[float], seed: int, purpose: str = "") -> None:
        if len(weights) > ROUND:
            raise DataError(f"a mixture of {len(weights):,} corpora: expected at most {ROUND:,}")
        self._seed = seed
        self._purpose = purpose
        self._quotas = _quotas(weights)
        self._round = lru_cache(maxsize=4)(self._draw_round)

    def turn(self, index: int) -> tuple[int, int]:
        """The corpus of sample `index`, and how many samples of that corpus come before it."""
        number, within = divmod(index, ROUND)
        corpora, before = self._round(number)
        corpus = int(corpora[within])
        return corpus, number * int(self._quotas[corpus]) + int(before[within])

    def count(self, corpus: int, samples: int) -> int:
        """How many of the first `samples` are of a corpus."""
        number, within = divmod(samples, ROUND)
        corpora, _ = self._round(number)
        return number * int(self._quotas[corpus]) + int((corpora[:within] == corpus).sum())

    def _draw_round(self, number: int) -> tuple[Indices, Indices]:
        """The corpus of each sample of a round, and how many samples of that corpus stand before it there."""
        corpora = np.repeat(np.arange(len(self._quotas)), self._quotas)
        if len(self._quotas) > 1:
            key = mixture_key(self._seed, f"{self._purpose}round {number}")
            corpora = corpora[[permuted(place, ROUND, key) for place in range(ROUND)]]
        before = np.empty(ROUND, dtype=np.int64)
        for corpus in range(len(self._quotas)):
            ours = corpora == corpus
            before[ours] = np.arange(ours.sum())
        return corpora, before


class BlockMixture:
    """The training samples of a run in their order, mixed from corpora by weight (a map-style dataset).

    Sample i is a pure function of the seed, the weights and the corpora's sizes: not of the number of processes, the
    batch size, or what was read before. Every `ROUND` samples hold each corpus in proportion to its weight, rounded
    to whole samples, in random order. Within a corpus the blocks come in random order, every block once before any
    comes again, and each time round in another order.

    Args:
        corpora: blocks of each corpus.
        weights: shares of the samples, in any unit.
        seed: of the order.
        length: samples of the whole run.
    """

    def __init__(self, corpora: Sequence[Corpus], weights: Sequence[float], seed: int, length: int) -> None:
        self._corpora = list(corpora)
        self._seed = seed
        self._length = length
        self._rounds = Rounds(weights, seed)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """Several samples at once, each corpus read once."""
        places = [self.place(index) for index in indices]
        found: list[Any] = [None] * len(places)
        for corpus, blocks in enumerate(self._corpora):
            ours = [number for number, place in enumerate(places) if place.corpus == corpus]
            if ours:
                rows = blocks.__getitems__([places[number].block for number in ours])
                for row, number in zip(rows, ours, strict=True):
                    found[number] = row
        return found

    def close(self) -> None:
        """Nothing reads ahead."""

    def place(self, index: int) -> BlockPlace:
        """Where sample `index` comes from.

        Raises:
            IndexError: outside the run.
        """
        if not 0 <= index < self._length:
            raise IndexError(f"sample {index} of a run of {self._length}")
        corpus, turn = self._rounds.turn(index)
        size = len(self._corpora[corpus])
        epoch, turn = divmod(turn, size)
        return BlockPlace(corpus, permuted(turn, size, mixture_key(self._seed, f"{corpus}/{epoch}")))


def permuted(index: int, size: int, key: int) -> int:
    """Where `index` goes in a pseudorandom permutation of 0..size-1 chosen by a 64-bit key; no table is made.

    A Feistel network on the next power of four, walked until it lands inside (Black and Rogaway, "Ciphers with
    arbitrary finite domains", 2002).
    """
    half = max((size - 1).bit_length() + 1, 2) // 2
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(ROUNDS_OF_CIPHER):
            left, right = right, left ^ (_mix(right ^ (key + turn * 0x9E3779B97F4A7C15)) & mask)
        index = left << half | right
        if index < size:
            return index


def _quotas(weights: Sequence[float]) -> Indices:
    """Samples of each corpus in a round: proportional, at least one, the largest remainders rounded up."""
    shares = np.asarray(weights, dtype=np.float64)
    exact = shares / shares.sum() * ROUND
    quotas: Indices = np.maximum(np.floor(exact), 1).astype(np.int64)
    while (missing := ROUND - int(quotas.sum())) != 0:
        # Too many only where tiny weights were raised to one sample each: the largest gives way.
        place = int(np.argmax(exact - quotas)) if missing > 0 else int(np.argmax(quotas))
        quotas[place] += 1 if missing > 0 else -1
    return quotas


def mixture_key(seed: int, purpose: str) -> int:
    """The key of a permutation that serves a purpose."""
    return int.from_bytes(draw(seed, "mixture", purpose.encode())[:8], "big")


def _mix(word: int) -> int:
    """Scramble a 64-bit word (the finaliser of splitmix64)."""
    word &= (1 << 64) - 1
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 & (1 << 64) - 1
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB & (1 << 64) - 1
    return word ^ (word >> 31)
