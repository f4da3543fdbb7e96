"""Packed fine-tuning: several examples one after another in a row of training."""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

from thoughtbubbles.data.feed.sft import Example, Examples


class JoinedExamples:
    """Examples of a source in rows of at most so many tokens, each example whole in one (a map-style dataset).

    The longest examples are placed first, each where the least room is left behind it (best fit decreasing); those of
    a row stand in the order of the source. What is to be learnt is the same as of each alone; attention and credit
    cross the borders.

    Args:
        examples: to join.
        length: tokens of the longest row, at least those of the longest example.
    """

    def __init__(self, examples: Examples, length: int) -> None:
        self._examples = examples
        self._rows = best_fit([examples.length(index) for index in range(len(examples))], length)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        examples = [self._examples[each] for each in self._rows[index]]
        tokens, targets = ([getattr(each, name) for each in examples] for name in ("tokens", "targets"))
        return Example(np.concatenate(tokens), np.concatenate(targets))

    def __getitems__(self, indices: Sequence[int]) -> list[Example]:
        """Several of them."""
        return [self[index] for index in indices]

    def length(self, index: int) -> int:
        """Tokens of a row."""
        return sum(map(self._examples.length, self._rows[index]))

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(map(self.length, range(len(self))))

    def describe(self, index: int) -> str:
        """The source and the rows in it, counted from 1."""
        return " + ".join(map(self._examples.describe, self._rows[index]))


def best_fit(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Which of some lengths, by their places, to put together so that no sum is above `most`; in ascending order."""
    bins: list[list[int]] = []
    # (room left, number of the bin), in ascending order.
    open_: list[tuple[int, int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        place = bisect_left(open_, (lengths[index], -1))
        room, number = open_.pop(place) if place < len(open_) else (most, len(bins))
        if number == len(bins):
            bins.append([])
        bins[number].append(index)
        if left := room - lengths[index]:
            insort(open_, (left, number))
    return sorted(map(sorted, bins))
