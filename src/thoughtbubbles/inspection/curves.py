"""Means with confidence bands: tokens of one block are not independent, so that blocks are what is resampled."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

CONFIDENCE = 0.95
RESAMPLES = 1000

Floats = npt.NDArray[np.float64]


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
    draws = np.random.default_rng(0).multinomial(blocks, np.full(blocks, 1 / blocks), size=RESAMPLES)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = (draws @ sums) / (draws @ counts)
    tail = 100 * (1 - CONFIDENCE) / 2
    known = (counts > 0).sum(0) > 1
    ends = np.full((2, len(x)), np.nan)
    if known.any():
        ends[:, known] = np.nanpercentile(means[:, known], [tail, 100 - tail], axis=0)
    low, high = ([None if np.isnan(end) else float(end) for end in side] for side in ends)
    return Curve(x, (sums.sum(0) / counts.sum(0)).tolist(), low, high, counts.sum(0).astype(int).tolist())


def means_at(x: Floats, y: Floats, bins: int) -> Curve:
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


def means_by_name(names: npt.NDArray[np.str_], y: Floats, order: Sequence[str]) -> Curve:
    """Means of y [blocks, T] under each name [blocks, T], in the given order."""
    each = [names == name for name in order]
    return banded_means(
        list(order),
        np.stack([np.where(mine, y, 0).sum(1) for mine in each], axis=1),
        np.stack([mine.sum(1) for mine in each], axis=1),
    )


def windows(values: Floats, width: int) -> Floats:
    """Means over windows of `width` tokens, which do not overlap: [blocks, T] to [blocks, T // width]."""
    blocks, length = values.shape
    means: Floats = values[:, : length // width * width].reshape(blocks, -1, width).mean(2)
    return means


def _sum_at(place: npt.NDArray[np.int64], values: Floats, bins: int) -> Floats:
    """Sums [blocks, bins] of values [blocks, T] by their bin."""
    sums = np.zeros((len(values), bins))
    np.add.at(sums, (np.arange(len(values))[:, None], place), values)
    return sums
