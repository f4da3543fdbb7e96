from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thoughtbubbles.data.feed.mixture import ROUND, BlockMixture, BlockPlace, Rounds, permuted


class Blocks:
    """Stands for a dataset: row i holds i, and says which rows were read."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.reads: list[list[int]] = []

    def __len__(self) -> int:
        return self.size

    def __getitems__(self, rows: list[int]) -> list[dict[str, torch.Tensor]]:
        self.reads.append(rows)
        return [{"input_ids": torch.tensor([row])} for row in rows]


def places(sizes: list[int], weights: list[float], length: int, seed: int = 0) -> list[BlockPlace]:
    mixture = BlockMixture([Blocks(size) for size in sizes], weights, seed, length)
    return [mixture.place(i) for i in range(length)]


@given(st.integers(1, 700), st.integers(0, 2**64 - 1))
def test_permuted_is_a_permutation(size: int, key: int) -> None:
    assert sorted(permuted(i, size, key) for i in range(size)) == list(range(size))


def test_permutations_look_random() -> None:
    size, keys = 8, 4000
    for index in (0, 5):
        counts = Counter(permuted(index, size, key * 2**32 + 1) for key in range(keys))
        # Each of 8 places: 500 expected, standard deviation 21.
        assert all(abs(counts[place] - keys / size) < 100 for place in range(size))
    fixed_neighbours = sum(permuted(i + 1, 1000, 7) - permuted(i, 1000, 7) == 1 for i in range(999))
    assert fixed_neighbours < 10


@given(st.integers(1, 40), st.integers(0, 5))
def test_every_block_comes_once_an_epoch(size: int, seed: int) -> None:
    blocks = [place.block for place in places([size], [1.0], 3 * size, seed)]
    for epoch in range(3):
        assert sorted(blocks[epoch * size : (epoch + 1) * size]) == list(range(size))


def test_epochs_and_seeds_differ() -> None:
    blocks = [place.block for place in places([50], [1.0], 100)]
    assert blocks[:50] != blocks[50:]
    assert blocks[:50] != [place.block for place in places([50], [1.0], 50, seed=1)]
    assert blocks[:50] != list(range(50))


@pytest.mark.parametrize("weights", [[0.7, 0.3], [7, 3], [1, 1, 1], [5.0], [1e-9, 1.0], [1e-9] * 3 + [1.0]])
def test_rounds_hold_the_weights(weights: list[float]) -> None:
    found = places([100] * len(weights), weights, 2 * ROUND)
    for start in (0, ROUND):
        counts = Counter(place.corpus for place in found[start : start + ROUND])
        for corpus, weight in enumerate(weights):
            assert abs(counts[corpus] - ROUND * weight / sum(weights)) <= len(weights)
            assert counts[corpus] >= 1


def test_each_corpus_of_a_mixture_is_read_epoch_by_epoch() -> None:
    found = places([30, 500], [0.5, 0.5], 3 * ROUND)
    for corpus, size in enumerate((30, 500)):
        blocks = [place.block for place in found if place.corpus == corpus]
        assert sorted(blocks[:size]) == list(range(size)) == sorted(blocks[size : 2 * size])


def test_a_longer_run_begins_like_a_shorter_one() -> None:
    assert places([9, 20], [1, 2], 5000)[:100] == places([9, 20], [1, 2], 100)


def test_samples_are_the_blocks_of_their_places() -> None:
    corpora = [Blocks(20), Blocks(30)]
    mixture = BlockMixture(corpora, [1, 1], seed=3, length=100)
    indices = [5, 99, 0, 17, 18]
    samples = mixture.__getitems__(indices)
    assert [int(sample["input_ids"]) for sample in samples] == [mixture.place(i).block for i in indices]
    assert sum(len(corpus.reads) for corpus in corpora) == len({mixture.place(i).corpus for i in indices})
    assert int(mixture[17]["input_ids"]) == mixture.place(17).block


def test_outside_the_run_is_an_index_error() -> None:
    mixture = BlockMixture([Blocks(5)], [1], seed=0, length=10)
    for index in (-1, 10):
        with pytest.raises(IndexError, match=f"sample {index} of a run of 10"):
            mixture[index]


def test_a_late_sample_of_a_huge_corpus_costs_no_more_than_the_first() -> None:
    mixture = BlockMixture([Blocks(10**9), Blocks(10**8)], [1, 1], seed=0, length=10**10)
    # A pass over the order would take hours and run into the test's time limit.
    assert {mixture.place(index).corpus for index in range(10**10 - 50, 10**10)} == {0, 1}


def test_rounds_count_what_they_give() -> None:
    rounds = Rounds([2, 1], seed=4, purpose="lane 3 ")
    seen = [0, 0]
    for index in range(2 * ROUND + 50):
        if index % 97 == 0:
            assert [rounds.count(corpus, index) for corpus in (0, 1)] == seen
        corpus, turn = rounds.turn(index)
        assert turn == seen[corpus]
        seen[corpus] += 1
    assert [rounds.turn(index)[0] for index in range(99)] != [Rounds([2, 1], 4).turn(index)[0] for index in range(99)]
