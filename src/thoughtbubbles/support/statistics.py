"""Means and how certain they are: scores of documents, differences over seeds and blocks, curves with bands."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

# What each of the harness's aggregations makes of the weighted mean of the documents' values.
KINDS: dict[str, Callable[[Array], Array]] = {
    "mean": lambda mean: mean,
    "perplexity": lambda mean: np.exp(-mean),
    "weighted_perplexity": lambda mean: np.exp(-mean),
    "bits_per_byte": lambda mean: -mean / math.log(2),
}
CONFIDENCE = 0.95
RESAMPLES = 10_000
BAND_RESAMPLES = 1000
# Resamples are drawn so many numbers at a time, to bound the memory.
DRAWN_AT_ONCE = 10_000_000


@dataclass(frozen=True)
class Scores:
    """One metric of one task, document by document.

    Attributes:
        kind: the harness's aggregation, one of `KINDS`.
        values: [n] sums of each document: right or wrong, or nats.
        weights: [n] what they are divided by: 1, or words or bytes.
        clusters: [n] the group of each document, documents of a group being alike; its own number where each
            stands for itself.
    """

    kind: str
    values: Array
    weights: Array
    clusters: npt.NDArray[np.int64]

    @classmethod
    def of(cls, kind: str, pairs: Sequence[tuple[float, float]], clusters: Sequence[str] | None = None) -> "Scores":
        """Scores of (value, weight) pairs; clusters by name, or None where each document stands for itself."""
        table = np.array(pairs, dtype=np.float64).reshape(-1, 2)
        numbers = np.arange(len(table)) if clusters is None else np.unique(clusters, return_inverse=True)[1]
        return cls(kind, table[:, 0], table[:, 1], numbers.astype(np.int64))

    @property
    def estimate(self) -> float:
        """The metric, as the harness aggregates it."""
        return float(KINDS[self.kind](np.asarray(self.values.sum() / self.weights.sum())))

    @property
    def cluster_count(self) -> int:
        """How many clusters there are."""
        return len(np.unique(self.clusters))

    @property
    def standard_error(self) -> float:
        """Of the estimate, by the delta method over clusters; nan for a single one.

        Of a mean over documents that stand for themselves it is the harness's: standard deviation / sqrt(n).
        """
        count = self.cluster_count
        if count < 2:
            return math.nan
        mean = self.values.sum() / self.weights.sum()
        residuals, _ = self._by_cluster(self.values - mean * self.weights)
        error = math.sqrt(count / (count - 1) * float((residuals**2).sum())) / float(self.weights.sum())
        slope = {"mean": 1.0, "bits_per_byte": 1 / math.log(2)}.get(self.kind, self.estimate)
        return error * slope

    def _by_cluster(self, values: Array) -> tuple[Array, Array]:
        """Sums of values and of weights of each cluster."""
        sums = (np.bincount(self.clusters, each) for each in (values, self.weights))
        first, second = (each.astype(np.float64) for each in sums)
        return first, second

    def resampled(self, seed: int, resamples: int = RESAMPLES) -> Array:
        """[resamples] estimates from as many clusters drawn with replacement; the same draw for the same seed."""
        generator = np.random.default_rng(seed)
        values, weights = self._by_cluster(self.values)
        count = len(values)
        step = max(1, DRAWN_AT_ONCE // count)
        means = []
        for start in range(0, resamples, step):
            drawn = generator.integers(count, size=(min(step, resamples - start), count))
            means.append(values[drawn].sum(1) / weights[drawn].sum(1))
        return KINDS[self.kind](np.concatenate(means))


@dataclass(frozen=True)
class Difference:
    """A score less another's on the same documents.

    Attributes:
        estimate: the difference.
        low, high: its 95% interval, by a paired bootstrap.
        p_value: two-sided, of no difference.
    """

    estimate: float
    low: float
    high: float
    p_value: float


def compare_scores(ours: Scores, theirs: Scores, seed: int = 0, resamples: int = RESAMPLES) -> Difference:
    """Paired bootstrap of two scores on the same documents in the same order: both are drawn alike.

    Raises:
        ValueError: for scores of other documents or another kind.
    """
    if ours.kind != theirs.kind or not np.array_equal(ours.clusters, theirs.clusters):
        raise ValueError("scores of different documents: expected the same, in the same order")
    drawn = ours.resampled(seed, resamples) - theirs.resampled(seed, resamples)
    low, high = np.quantile(drawn, [0.025, 0.975])
    tail = min(float((drawn <= 0).mean()), float((drawn >= 0).mean()))
    return Difference(ours.estimate - theirs.estimate, float(low), float(high), min(1.0, 2 * tail))


@dataclass(frozen=True)
class Estimate:
    """A mean with its confidence interval.

    Attributes:
        mean: in nats per token.
        low: lower end of the 95% interval, -inf where nothing can be said of it.
        high: upper end.
        seeds: it rests on; with one, the interval knows nothing of how much seeds differ.
        blocks: it rests on.
    """

    mean: float
    low: float
    high: float
    seeds: int
    blocks: int

    @property
    def settled(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low > 0 or self.high < 0


def paired_difference(ours: npt.ArrayLike, theirs: npt.ArrayLike) -> Estimate:
    """Mean of ours minus theirs, with an interval that generalises to other seeds and other blocks at once.

    Seeds and blocks are crossed: every model is measured on the same blocks. The margin is the root of the sum of two
    squares: Student's margin for the mean of the seeds' means, and that for the mean of the blocks' means. With few
    seeds that covers the truth at least as often as it says, where Satterthwaite's degrees of freedom, estimated from
    as few, do not. Blocks of one document are taken to be independent.

    Args:
        ours: losses [seeds, blocks].
        theirs: the same of the other variant, with the same seeds and blocks.

    Raises:
        ValueError: for unequal shapes.
    """
    a, b = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 2 or a.size == 0:
        raise ValueError(f"losses of shapes {a.shape} and {b.shape}: expected equal ones of seeds and blocks")
    return estimate(a - b)


def estimate(values: npt.NDArray[np.float64]) -> Estimate:
    """Mean of `values` [seeds, blocks] and its interval, as in `paired_difference`."""
    from scipy.stats import t

    seeds, blocks = values.shape
    margins = [
        float(t.ppf((1 + CONFIDENCE) / 2, len(means) - 1) * np.std(means, ddof=1)) / math.sqrt(len(means))
        for means in (values.mean(1), values.mean(0))
        if len(means) > 1
    ]
    mean, margin = float(values.mean()), math.hypot(*margins) if margins else math.inf
    return Estimate(mean, mean - margin, mean + margin, seeds, blocks)


def interval(estimate: Estimate, scale: float = 1, digits: int = 4) -> str:
    """A difference and its interval, times `scale`."""
    mean, low, high = (f"{scale * each:+.{digits}f}" for each in (estimate.mean, estimate.low, estimate.high))
    return mean if math.isinf(estimate.low) else f"{mean} [{low}, {high}]"


def spread_of(values: npt.ArrayLike) -> float | None:
    """Standard deviation over seeds; None for one."""
    array = np.asarray(values, dtype=np.float64)
    return float(np.std(array, ddof=1)) if array.size > 1 else None


@dataclass(frozen=True)
class Curve:
    """Means of something at some places, with the bands that 95% of bootstrap samples of the blocks lie in.

    Attributes:
        x: K places: numbers, or names.
        mean: K means over all tokens there.
        low, high: K ends of the bands; None where no two blocks have a token there.
        count: K numbers of tokens.
    """

    x: list[float] | list[str]
    mean: list[float]
    low: list[float | None]
    high: list[float | None]
    count: list[int]


def banded_means(x: Sequence[Any], sums: npt.ArrayLike, counts: npt.ArrayLike) -> Curve:
    """The curve of sums and counts of each block, [blocks, K] both; places that no block has are left out.

    The bands are those of the ratio of the summed sums to the summed counts over blocks drawn with replacement, the
    same draws in every call.
    """
    sums, counts = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    some = counts.sum(0) > 0
    x, sums, counts = [place for place, has in zip(x, some, strict=True) if has], sums[:, some], counts[:, some]
    blocks = len(sums)
    draws = np.random.default_rng(0).multinomial(blocks, np.full(blocks, 1 / blocks), size=BAND_RESAMPLES)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = (draws @ sums) / (draws @ counts)
    tail = 100 * (1 - CONFIDENCE) / 2
    known = (counts > 0).sum(0) > 1
    ends = np.full((2, len(x)), np.nan)
    if known.any():
        ends[:, known] = np.nanpercentile(means[:, known], [tail, 100 - tail], axis=0)
    low, high = ([None if np.isnan(end) else float(end) for end in side] for side in ends)
    return Curve(x, (sums.sum(0) / counts.sum(0)).tolist(), low, high, counts.sum(0).astype(int).tolist())


def means_at(x: Array, y: Array, bins: int) -> Curve:
    """Means of y in bins of about equally many tokens by x, [blocks, T] both; the place of a bin is its mean x.

    Where x or y is NaN nothing is counted.
    """
    valid = ~(np.isnan(x) | np.isnan(y))
    if not valid.any():
        return Curve([], [], [], [], [])
    edges = np.unique(np.quantile(x[valid], np.linspace(0, 1, bins + 1)))
    place = np.clip(np.searchsorted(edges, x, side="right") - 1, 0, max(len(edges) - 2, 0))
    counts, of_y, of_x = (
        _sum_at(place, np.where(valid, values, 0), max(len(edges) - 1, 1)) for values in (valid.astype(float), y, x)
    )
    total = counts.sum(0)
    centres = np.divide(of_x.sum(0), total, out=np.zeros_like(total), where=total > 0)
    return banded_means(centres.tolist(), of_y, counts)


def means_by_name(names: npt.NDArray[np.str_], y: Array, order: Sequence[str]) -> Curve:
    """Means of y [blocks, T] under each name [blocks, T], in the given order."""
    each = [names == name for name in order]
    return banded_means(
        list(order),
        np.stack([np.where(mine, y, 0).sum(1) for mine in each], axis=1),
        np.stack([mine.sum(1) for mine in each], axis=1),
    )


def windows(values: Array, width: int) -> Array:
    """Means over windows of `width` tokens, which do not overlap: [blocks, T] to [blocks, T // width]."""
    blocks, length = values.shape
    means: Array = values[:, : length // width * width].reshape(blocks, -1, width).mean(2)
    return means


def _sum_at(place: npt.NDArray[np.int64], values: Array, bins: int) -> Array:
    """Sums [blocks, bins] of values [blocks, T] by their bin."""
    sums = np.zeros((len(values), bins))
    np.add.at(sums, (np.arange(len(values))[:, None], place), values)
    return sums
