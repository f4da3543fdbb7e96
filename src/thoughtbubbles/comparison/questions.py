"""What the variants of a comparison answer to its questions: exact match by budget and by difficulty."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
import numpy.typing as npt

from thoughtbubbles.comparison.measuring import Measurements
from thoughtbubbles.support.statistics import Estimate, paired_difference, spread_of


@dataclass(frozen=True)
class ExactMatchResult:
    """Shares of the questions that the models of a variant answer letter for letter, means over seeds.

    Attributes:
        questions: how many there are.
        at_budget: by test budget.
        spread: standard deviation over seeds at the own budget; None for one seed.
        by_difficulty: at the own budget, by difficulty in ascending order.
        to_baseline: paired difference to the baseline at each one's own budget; None for the baseline itself, or if no
            seed is common.
    """

    questions: int
    at_budget: dict[str, float]
    spread: float | None
    by_difficulty: dict[int, float]
    to_baseline: Estimate | None


def exact_match_of(
    found: Mapping[str, Mapping[int, Measurements]], name: str, baseline: str
) -> ExactMatchResult | None:
    """What the models of a variant answered; None where none was asked.

    Args:
        found: what was measured, by variant and seed.
        name: of the variant.
        baseline: of the variant that others are compared with.
    """
    ours = list(found[name].values())
    if not ours[0].right:
        return None
    own = _right(ours)
    difficulties = np.asarray(ours[0].difficulties)
    common = sorted(set(found[name]) & set(found.get(baseline, {})))
    against = None
    if name != baseline and common:
        a, b = (_right([found[each][seed] for seed in common]) for each in (name, baseline))
        against = paired_difference(a, b)
    return ExactMatchResult(
        questions=len(difficulties),
        at_budget={budget: fmean(fmean(each.right[budget]) for each in ours) for budget in ours[0].right},
        spread=spread_of(own.mean(1)),
        by_difficulty={int(each): float(own[:, difficulties == each].mean()) for each in np.unique(difficulties)},
        to_baseline=against,
    )


def _right(measured: Sequence[Measurements]) -> npt.NDArray[np.float64]:
    """[seeds, questions]: 1 where the own budget's answer is right."""
    return np.array([each.right[each.own] for each in measured], dtype=np.float64)
