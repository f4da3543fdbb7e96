import math

import numpy as np
import pytest

from thoughtbubbles.support.statistics import paired_difference, spread_of


def crossed(rng: np.random.Generator, mean: float, seeds: int, blocks: int) -> np.ndarray:
    """Differences with an effect of the seed, one of the block, and noise."""
    by_seed, by_block = rng.normal(0, 0.05, (seeds, 1)), rng.normal(0, 0.3, (1, blocks))
    return mean + by_seed + by_block + rng.normal(0, 0.1, (seeds, blocks))


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    inside, rounds = 0, 400
    for _ in range(rounds):
        found = paired_difference(crossed(rng, 0.1, 3, 50), np.zeros((3, 50)))
        inside += found.low <= 0.1 <= found.high
    assert 0.94 <= inside / rounds <= 1.0


def test_blocks_alone_would_be_too_sure() -> None:
    """Three seeds that differ: an interval from blocks alone misses the truth far too often."""
    rng = np.random.default_rng(1)
    missed = 0
    for _ in range(200):
        values = 0.1 + rng.normal(0, 0.05, (3, 1)) + rng.normal(0, 0.01, (3, 400))
        alone = paired_difference(values.mean(0, keepdims=True), np.zeros((1, 400)))
        both = paired_difference(values, np.zeros((3, 400)))
        assert both.high - both.low > alone.high - alone.low
        missed += not alone.low <= 0.1 <= alone.high
    assert missed > 100


def test_one_seed_and_one_block() -> None:
    one = paired_difference([[1.0, 2.0, 3.0]], [[0.5, 1.0, 1.5]])
    assert one.mean == pytest.approx(1.0)
    assert one.low < 1.0 < one.high
    assert (one.seeds, one.blocks) == (1, 3)
    single = paired_difference([[1.0]], [[0.5]])
    assert (single.mean, single.low, single.high, single.settled) == (0.5, -math.inf, math.inf, False)


def test_the_margin_by_hand() -> None:
    """Deviations of samples, and Student's t of one degree of freedom over seeds and of two over blocks."""
    found = paired_difference([[0.0, 1.0, 5.0], [2.0, 6.0, 4.0]], np.zeros((2, 3)))
    # Means of seeds 2 and 4: their deviation is the root of 2. Means of blocks 1, 3.5 and 4.5: the root of 3.25.
    by_seed, by_block = 12.7062047 * math.sqrt(2 / 2), 4.3026527 * math.sqrt(3.25 / 3)
    margin = math.hypot(by_seed, by_block)
    assert (found.mean, found.low, found.high) == pytest.approx((3, 3 - margin, 3 + margin), abs=1e-5)


def test_equal_losses_differ_by_exactly_nothing() -> None:
    same = paired_difference(np.ones((2, 4)), np.ones((2, 4)))
    assert (same.mean, same.low, same.high, same.settled) == (0, 0, 0, False)


def test_settled_means_that_zero_is_left_out() -> None:
    rng = np.random.default_rng(2)
    values = 0.5 + rng.normal(0, 0.01, (3, 20))
    assert paired_difference(values, np.zeros((3, 20))).settled
    assert paired_difference(np.zeros((3, 20)), values).settled
    assert not paired_difference(values - 0.5, np.zeros((3, 20))).settled


def test_unequal_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shapes \(1, 2\) and \(1, 3\)"):
        paired_difference([[1.0, 2.0]], [[1.0, 2.0, 3.0]])


def test_spread_is_the_sample_deviation() -> None:
    assert spread_of([1.0, 3.0]) == pytest.approx(math.sqrt(2))
    assert spread_of([1.0]) is None
