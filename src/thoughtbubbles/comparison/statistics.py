"""How certain a difference between two variants is."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

CONFIDENCE = 0.95


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


def interval(estimate: Estimate) -> str:
    """A difference and its interval."""
    if math.isinf(estimate.low):
        return f"{estimate.mean:+.4f}"
    return f"{estimate.mean:+.4f} [{estimate.low:+.4f}, {estimate.high:+.4f}]"


def spread_of(values: npt.ArrayLike) -> float | None:
    """Standard deviation over seeds; None for one."""
    array = np.asarray(values, dtype=np.float64)
    return float(np.std(array, ddof=1)) if array.size > 1 else None
