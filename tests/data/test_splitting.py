from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thoughtbubbles.data import DataError
from thoughtbubbles.data.splitting import Digests, hold_out, shuffled, split_documents
from thoughtbubbles.support.sampling import draw


def digests(values: Sequence[int]) -> Digests:
    return np.frombuffer(b"".join(value.to_bytes(16) for value in values), dtype="V16")


def held_out(values: Sequence[int], fraction: float, seed: int) -> list[int]:
    return [int(index) for index in np.flatnonzero(hold_out(digests(values), fraction, seed))]


@given(count=st.integers(2, 200), fraction=st.floats(0.01, 0.5), seed=st.integers(0, 99))
def test_the_documents_of_the_smallest_keys_are_held_out(count: int, fraction: float, seed: int) -> None:
    keys = [draw(seed, "validation", index.to_bytes(16)) for index in range(count)]
    smallest = sorted(range(count), key=keys.__getitem__)[: max(1, round(fraction * count))]
    assert held_out(range(count), fraction, seed) == sorted(smallest)


@given(count=st.integers(0, 100), seed=st.integers(0, 99))
def test_the_order_is_that_of_the_keys(count: int, seed: int) -> None:
    order = sorted(range(count), key=lambda index: draw(seed, "order", str(index).encode()))
    assert shuffled(np.arange(count), seed).tolist() == order
    assert shuffled(np.arange(count)[::-1], seed).tolist() == order


def test_the_seed_chooses_the_documents_and_their_order() -> None:
    assert held_out(range(1000), 0.1, 1) != held_out(range(1000), 0.1, 2)
    everything = np.arange(1000)
    assert shuffled(everything, 1).tolist() != shuffled(everything, 2).tolist()
    assert np.corrcoef(shuffled(everything, 1), everything)[0, 1] < 0.15
    assert 300 < np.mean(held_out(range(1000), 0.2, 3)) < 700


def test_draws_never_change() -> None:
    """A prepared folder must be reproducible by another version, so these values are part of the format."""
    assert draw(0, "order", b"1").hex() == "fb24fe573609759297658cb385a96ccd"
    assert shuffled(np.arange(8), 0).tolist() == [6, 0, 7, 3, 5, 2, 4, 1]
    assert held_out(range(50), 0.1, 0) == [1, 10, 20, 26, 33]


def test_equal_documents_fall_on_the_same_side() -> None:
    chosen = set(held_out([*range(40)] * 2, 0.25, 0))
    assert {(index + 40) % 80 for index in chosen} == chosen
    assert len(chosen) == 20


def test_part_of_the_documents_is_divided_as_the_whole_is() -> None:
    whole = digests(range(100))
    chosen = hold_out(whole, 0.1, 0)
    assert (hold_out(whole[:60], 0.1, 0, among=whole) == chosen[:60]).all()
    # One document at least, even if none of the part would be chosen among all.
    (first,) = np.flatnonzero(chosen)[:1]
    assert hold_out(whole[:first], 0.1, 0, among=whole).sum() == 1


@given(
    ours=st.lists(st.integers(0, 12).map(lambda low: (1 << 100) + low), min_size=1, max_size=20),
    others=st.lists(st.integers(0, 12).map(lambda low: (1 << 100) + low), min_size=1, max_size=5),
)
def test_no_validation_text_is_left_in_train(ours: list[int], others: list[int]) -> None:
    # The digests share their first halves, so that comparing those alone would not do.
    both = digests([*ours, *others])
    expected = {index for index, value in enumerate(ours) if value not in others}
    if not expected:
        with pytest.raises(DataError, match="no documents are left to train on"):
            split_documents(both, len(ours), None, 0)
        return
    split = split_documents(both, len(ours), None, 0)
    assert set(split.train.tolist()) == expected
    assert split.validation.tolist() == [*range(len(ours), len(both))]


def test_nothing_to_train_on_is_refused() -> None:
    with pytest.raises(DataError, match="the sources hold 1 different documents and 1 are held out for validation"):
        split_documents(digests([7, 7]), 2, 0.5, 0)
