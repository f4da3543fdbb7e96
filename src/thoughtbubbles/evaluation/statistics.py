"""Scores of documents: their mean, its standard error over documents or clusters, and paired comparison."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
RESAMPLES = 10_000
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


def compare(ours: Scores, theirs: Scores, seed: int = 0, resamples: int = RESAMPLES) -> Difference:
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
