"""Estimates and errors of scores: the harness's where it has them, and what the bootstrap must find."""

import math

import numpy as np
import pytest
from lm_eval.api import metrics as harness
from scipy.stats import ttest_rel

from thoughtbubbles.support.statistics import KINDS, Scores, compare_scores

RNG = np.random.default_rng(0)


def ones(values: list[float]) -> list[tuple[float, float]]:
    return [(value, 1.0) for value in values]


def coin(count: int, chance: float, seed: int = 0) -> list[float]:
    return [float(each) for each in np.random.default_rng(seed).random(count) < chance]


@pytest.mark.parametrize("kind", KINDS)
def test_estimates_are_the_harness_own(kind: str) -> None:
    pairs = [
        (-float(value), float(weight)) for value, weight in zip(RNG.random(20), RNG.integers(1, 9, 20), strict=True)
    ]
    weighted = kind in ("weighted_perplexity", "bits_per_byte")
    expected = getattr(harness, kind)(pairs if weighted else [value for value, _ in pairs])
    scores = Scores.of(kind, pairs if weighted else ones([value for value, _ in pairs]))
    assert scores.estimate == pytest.approx(expected, rel=1e-12)


def test_error_of_a_mean_is_the_harness_own() -> None:
    values = coin(50, 0.3)
    assert Scores.of("mean", ones(values)).standard_error == pytest.approx(harness.mean_stderr(values), rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_error_is_what_resampling_finds(kind: str) -> None:
    pairs = [
        (-float(w) * (2 + float(v)), float(w)) for v, w in zip(RNG.random(200), RNG.integers(1, 9, 200), strict=True)
    ]
    scores = Scores.of(kind, pairs)
    assert scores.standard_error == pytest.approx(scores.resampled(0).std(), rel=0.05)


def test_clusters_of_alike_documents_count_once() -> None:
    """Copies of a document in its cluster add nothing; taken for different ones they would."""
    values, copies = coin(40, 0.5), 25
    single = Scores.of("mean", ones(values))
    names = [f"paradigm {index}" for index in range(40) for _ in range(copies)]
    repeated = Scores.of("mean", ones(np.repeat(values, copies).tolist()), names)
    assert repeated.cluster_count == 40
    assert repeated.estimate == pytest.approx(single.estimate)
    assert repeated.standard_error == pytest.approx(single.standard_error)
    assert Scores.of("mean", ones(np.repeat(values, copies).tolist())).standard_error < single.standard_error / 4


def test_a_single_cluster_has_no_error() -> None:
    assert math.isnan(Scores.of("mean", ones([0.0, 1.0]), ["a", "a"]).standard_error)
    assert math.isnan(Scores.of("mean", ones([1.0])).standard_error)


def test_pairing_sees_what_separate_intervals_do_not() -> None:
    easy = coin(300, 0.5)
    better = [min(1.0, value + extra) for value, extra in zip(easy, coin(300, 0.06, seed=1), strict=True)]
    ours, theirs = Scores.of("mean", ones(better)), Scores.of("mean", ones(easy))
    found = compare_scores(ours, theirs)
    assert found.estimate == pytest.approx(np.mean(better) - np.mean(easy))
    assert 0 < found.low < found.estimate < found.high
    assert found.p_value < 0.01
    assert ours.standard_error > found.estimate / 2  # alone, the two intervals overlap
    reverse = compare_scores(theirs, ours)
    assert (reverse.low, reverse.high, reverse.p_value) == (-found.high, -found.low, found.p_value)


@pytest.mark.parametrize("sign", [1, -1])
def test_p_is_two_sided(sign: int) -> None:
    """Near that of a paired t-test, of which one side alone would be half."""
    theirs, noise = (np.random.default_rng(seed).normal(0, 1, 400) for seed in (1, 2))
    ours = theirs + sign * 0.075 + noise - noise.mean()
    found = compare_scores(Scores.of("mean", ones(ours.tolist())), Scores.of("mean", ones(theirs.tolist())))
    expected = ttest_rel(ours, theirs).pvalue
    assert 0.1 < expected < 0.2
    assert found.p_value == pytest.approx(expected, abs=0.02)
    margin = 1.96 * np.std(ours - theirs, ddof=1) / math.sqrt(400)
    assert [found.low, found.high] == pytest.approx(
        [found.estimate - margin, found.estimate + margin], abs=0.1 * margin
    )


def test_equal_scores_do_not_differ() -> None:
    scores = Scores.of("perplexity", ones([-1.0, -2.0, -0.5]))
    found = compare_scores(scores, scores)
    assert (found.estimate, found.low, found.high, found.p_value) == (0, 0, 0, 1)


def test_the_interval_covers_as_often_as_it_says() -> None:
    covered = 0
    for seed in range(200):
        one, other = coin(120, 0.6, seed), coin(120, 0.5, seed + 1000)
        found = compare_scores(Scores.of("mean", ones(one)), Scores.of("mean", ones(other)), resamples=500)
        covered += found.low <= 0.1 <= found.high
    assert 180 <= covered <= 198


def test_memory_of_resampling_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = Scores.of("mean", ones(coin(30, 0.5)))
    monkeypatch.setattr("thoughtbubbles.support.statistics.DRAWN_AT_ONCE", 100)
    found = scores.resampled(3, 50)
    assert found.shape == (50,)
    assert len(set(found.tolist())) > 5


def test_other_documents_are_not_compared() -> None:
    with pytest.raises(ValueError, match="scores of different documents"):
        compare_scores(Scores.of("mean", ones([1.0, 0.0])), Scores.of("mean", ones([1.0])))
    with pytest.raises(ValueError, match="scores of different documents"):
        compare_scores(Scores.of("mean", ones([1.0, 0.0])), Scores.of("perplexity", ones([1.0, 0.0])))
