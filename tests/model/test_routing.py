"""Routers against the loops of the reference, and their promises (method: Routing)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from thoughtbubbles.model import reference, routing
from thoughtbubbles.model.budget import parse_budget
from thoughtbubbles.model.controls import route_uniform
from thoughtbubbles.model.routing import (
    CAUSAL,
    TOPK,
    _count_at_least,
    _count_smaller_before,
    route_causal,
    route_topk,
)
from thoughtbubbles.model.rules import RULES
from thoughtbubbles.model.threshold import route_threshold

SCORES = [0.0, -0.0, -0.5, -1.0, -1.5, -2.25, -20.0]
BUDGETS = [1, "6/5", 1.2, 1.5, 2, 3.25, 1.0001, 4 / 3, 0.1 + 0.2 + 1, 5]
LARGE = Fraction(6)  # a token of 3 streams has 5 optional candidates


@dataclass(frozen=True)
class Row:
    """The alive candidates of one row: of each stream (fork, keep)."""

    scores: list[float]
    tokens: list[int]
    optional: list[bool]

    def prefix(self, tokens: int) -> "Row":
        """The candidates of the first so many tokens."""
        end = sum(token < tokens for token in self.tokens)
        return Row(self.scores[:end], self.tokens[:end], self.optional[:end])


def row_of(bubble_sizes: list[int], scores: list[float]) -> Row:
    tokens = [token for token, size in enumerate(bubble_sizes) for _ in range(2 * size)]
    optional = [c < 2 * size - 1 for size in bubble_sizes for c in range(2 * size)]
    return Row(scores, tokens, optional)


@st.composite
def rows(draw: st.DrawFn, min_tokens: int = 0) -> Row:
    sizes = draw(st.lists(st.integers(1, 3), min_size=min_tokens, max_size=9))
    # Half of the rows tie often, half hardly ever.
    one_score = draw(st.sampled_from([st.sampled_from(SCORES), st.sampled_from(SCORES[:3]), st.floats(-20, 0)]))
    return row_of(sizes, draw(st.lists(one_score, min_size=2 * sum(sizes), max_size=2 * sum(sizes))))


Router = Callable[[Tensor, Tensor, Tensor, Tensor, Fraction], Tensor]
budgets = st.one_of(st.sampled_from(BUDGETS), st.fractions(1, 6, max_denominator=30)).map(parse_budget)
THRESHOLDS = {"any score": -math.inf, "some scores": -1.0, "no score": 0.5}
ROUTERS: dict[str, Router] = {"causal": route_causal, "topk": route_topk, "uniform": route_uniform}
THRESHOLD_ROUTERS: dict[str, Router] = {
    f"threshold-{name}": partial(route_threshold, threshold=threshold) for name, threshold in THRESHOLDS.items()
}
# Without a threshold that keeps candidates out.
EAGER_ROUTERS = {**ROUTERS, "threshold-any score": THRESHOLD_ROUTERS["threshold-any score"]}
EVERY_ROUTER = {**ROUTERS, **THRESHOLD_ROUTERS}
every_router = pytest.mark.parametrize("router", EVERY_ROUTER.values(), ids=EVERY_ROUTER.keys())
eager_router = pytest.mark.parametrize("router", EAGER_ROUTERS.values(), ids=EAGER_ROUTERS.keys())


def as_tensors(batch: list[Row], spare: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows side by side in float64; dead candidates at the right hold NaN and nonsense."""
    width = max(len(row.scores) for row in batch) + spare
    scores = torch.full((len(batch), width), torch.nan, dtype=torch.float64)
    token = torch.full((len(batch), width), 3)
    optional, alive = torch.zeros(2, len(batch), width, dtype=torch.bool)
    for index, row in enumerate(batch):
        end = len(row.scores)
        scores[index, :end] = torch.tensor(row.scores, dtype=torch.float64)
        token[index, :end] = torch.tensor(row.tokens, dtype=torch.int64)
        optional[index, :end] = torch.tensor(row.optional, dtype=torch.bool)
        alive[index, :end] = True
    return scores, token, optional, alive


def survivors(router: Router, row: Row, budget: Fraction) -> list[bool]:
    """Route one row alone."""
    survive: list[bool] = router(*as_tensors([row], spare=not row.scores), budget)[0].tolist()
    return survive[: len(row.scores)]


# --- Against the reference ---


@given(rows(), budgets)
def test_causal_closed_form_equals_the_loops(row: Row, budget: Fraction) -> None:
    expected = reference.route_causal(row.scores, row.tokens, row.optional, budget)
    assert survivors(route_causal, row, budget) == expected


@given(rows(), budgets)
def test_topk_equals_the_loops(row: Row, budget: Fraction) -> None:
    assert survivors(route_topk, row, budget) == reference.route_topk(row.scores, row.tokens, row.optional, budget)


@given(rows(), budgets)
def test_uniform_equals_the_loops(row: Row, budget: Fraction) -> None:
    expected = reference.route_uniform(row.scores, row.tokens, row.optional, budget)
    assert survivors(route_uniform, row, budget) == expected


@given(rows(), budgets, st.one_of(st.sampled_from([-math.inf, *SCORES]), st.floats(-20, 0)))
def test_threshold_equals_the_loops(row: Row, budget: Fraction, threshold: float) -> None:
    expected = reference.route_threshold(row.scores, row.tokens, row.optional, budget, threshold)
    assert survivors(partial(route_threshold, threshold=threshold), row, budget) == expected


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_causal_equals_the_loops_on_a_long_row(budget: float | str) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 4, (150,), generator=generator).tolist()
    row = row_of(sizes, (-3 * torch.rand(2 * sum(sizes), generator=generator, dtype=torch.float64)).tolist())
    kappa = parse_budget(budget)
    expected = reference.route_causal(row.scores, row.tokens, row.optional, kappa)
    assert survivors(route_causal, row, kappa) == expected


@given(rows(), budgets)
def test_topk_is_a_stable_descending_sort_with_roots_first(row: Row, budget: Fraction) -> None:
    def place(c: int) -> tuple[bool, float]:
        return row.optional[c], -reference.on_grid(row.scores[c])

    tokens = row.optional.count(False)
    best = sorted(range(len(row.scores)), key=place)[: math.ceil(budget * tokens)]
    assert survivors(route_topk, row, budget) == [c in best for c in range(len(row.scores))]


# --- Promises of every router ---


@every_router
@given(row=rows(), budget=budgets)
def test_keeps_of_roots_survive(router: Router, row: Row, budget: Fraction) -> None:
    survive = survivors(router, row, budget)
    assert all(s for s, optional in zip(survive, row.optional, strict=True) if not optional)


@every_router
@given(row=rows())
def test_budget_of_one_admits_nothing(router: Router, row: Row) -> None:
    assert survivors(router, row, Fraction(1)) == [not optional for optional in row.optional]


@eager_router
@given(row=rows())
def test_large_budget_admits_all(router: Router, row: Row) -> None:
    assert all(survivors(router, row, LARGE))


@every_router
@given(batch=st.lists(rows(), min_size=2, max_size=4), spare=st.integers(1, 5), budget=budgets)
def test_rows_and_dead_candidates_at_the_right_do_not_matter(
    router: Router, batch: list[Row], spare: int, budget: Fraction
) -> None:
    together = router(*as_tensors(batch, spare), budget)
    for row, survive in zip(batch, together.tolist(), strict=True):
        padding = [False] * (together.shape[1] - len(row.scores))
        assert survive == survivors(router, row, budget) + padding


@every_router
@given(row=rows(), budget=budgets)
def test_number_of_survivors_fits_the_static_width(router: Router, row: Row, budget: Fraction) -> None:
    tokens, rule = row.optional.count(False), TOPK if router is route_topk else CAUSAL
    assert sum(survivors(router, row, budget)) <= rule.width_after(len(row.scores) // 2, tokens, budget)


@eager_router
def test_ties_go_to_the_leftmost(router: Router) -> None:
    # Two optional candidates may survive: the fork of token 0, and of the three of token 1 the leftmost.
    row = row_of([1, 2], [-1.0] * 6)
    assert survivors(router, row, Fraction(2)) == [True, True, True, False, False, True]


@every_router
@given(row=rows(), budget=budgets, data=st.data())
def test_what_differs_by_rounding_alone_ties(router: Router, row: Row, budget: Fraction, data: st.DataObject) -> None:
    """Scores on the grid, and the same off by up to a third of a step."""
    scores = [reference.on_grid(score) for score in row.scores]
    noise = st.floats(-routing.GRID / 3, routing.GRID / 3)
    rounded = [score + data.draw(noise) for score in scores]
    assert [reference.on_grid(score) for score in rounded] == scores
    exact, found = (survivors(router, Row(each, row.tokens, row.optional), budget) for each in (scores, rounded))
    assert found == exact


@eager_router
def test_a_step_of_the_grid_is_told_apart(router: Router) -> None:
    scores = [-1.0, -1.0, -1.0 - routing.GRID, -1.0, -1.0 - 2 * routing.GRID, -1.0]
    better = row_of([1, 2], scores)
    assert survivors(router, better, Fraction(2)) == [True, True, False, True, False, True]


@given(st.floats(-400, 0))
def test_the_grid_is_that_of_the_reference(score: float) -> None:
    found = routing.on_grid(torch.tensor([score], dtype=torch.float64)).item()
    assert found == reference.on_grid(score)
    assert abs(found - score) <= 2**-17


@every_router
def test_routing_passes_no_gradient(router: Router) -> None:
    scores, token, optional, alive = as_tensors([row_of([1, 2], [-1.0] * 6)])
    assert not router(scores.requires_grad_(), token, optional, alive, Fraction(2)).requires_grad


# --- Promises of the routers that see no later token ---

CAUSAL_ROUTERS: dict[str, Router] = {"causal": route_causal, "uniform": route_uniform, **THRESHOLD_ROUTERS}
causal_router = pytest.mark.parametrize("router", CAUSAL_ROUTERS.values(), ids=CAUSAL_ROUTERS.keys())


@causal_router
@given(row=rows(), budget=budgets)
def test_survivors_of_every_prefix_keep_to_the_budget(router: Router, row: Row, budget: Fraction) -> None:
    survive = survivors(router, row, budget)
    for tokens in range(1, row.optional.count(False) + 1):
        assert sum(survive[: len(row.prefix(tokens).scores)]) <= math.floor(budget * tokens)


@causal_router
@given(row=rows(min_tokens=2), data=st.data(), budget=budgets)
def test_changed_suffix_changes_nothing_before_it(
    router: Router, row: Row, data: st.DataObject, budget: Fraction
) -> None:
    tokens = data.draw(st.integers(1, row.optional.count(False) - 1))
    end = len(row.prefix(tokens).scores)
    later = data.draw(st.lists(st.sampled_from(SCORES), min_size=len(row.scores) - end, max_size=len(row.scores) - end))
    changed = Row(row.scores[:end] + later, row.tokens, row.optional)
    assert survivors(router, changed, budget)[:end] == survivors(router, row, budget)[:end]


@causal_router
@given(row=rows(min_tokens=1), data=st.data(), budget=budgets)
def test_prefix_alone_chooses_the_same(router: Router, row: Row, data: st.DataObject, budget: Fraction) -> None:
    prefix = row.prefix(data.draw(st.integers(1, row.optional.count(False))))
    alone = survivors(router, prefix, budget)
    assert survivors(router, row, budget)[: len(prefix.scores)] == alone


@given(rows(min_tokens=2), st.data(), budgets)
def test_uniform_routes_each_token_by_itself(row: Row, data: st.DataObject, budget: Fraction) -> None:
    token = data.draw(st.integers(0, max(row.tokens)))
    own = [c for c, other in enumerate(row.tokens) if other == token]
    alone = Row([row.scores[c] for c in own], [token] * len(own), [row.optional[c] for c in own])
    survive = survivors(route_uniform, row, budget)
    assert survivors(route_uniform, alone, budget) == [survive[c] for c in own]


@given(rows(min_tokens=2), st.data(), budgets, st.integers(0, 3))
def test_causal_goes_on_from_past_scores_and_credit(
    row: Row, data: st.DataObject, budget: Fraction, padding: int
) -> None:
    whole = survivors(route_causal, row, budget)
    end = len(row.prefix(data.draw(st.integers(1, row.optional.count(False) - 1))).scores)
    rest = Row(row.scores[end:], row.tokens[end:], row.optional[end:])
    past = [score for score, optional in zip(row.scores[:end], row.optional[:end], strict=True) if optional]
    off = data.draw(st.lists(st.floats(-1e-9, 1e-9), min_size=len(past), max_size=len(past)))
    past_scores = [reference.on_grid(score) + noise for score, noise in zip(past, off, strict=True)]
    rest = Row([reference.on_grid(score) for score in rest.scores], rest.tokens, rest.optional)
    admitted = sum(s and o for s, o in zip(whole[:end], row.optional[:end], strict=True))
    router = partial(
        route_causal,
        past_scores=torch.tensor([past_scores + padding * [-math.inf]], dtype=torch.float64),
        past_admitted=torch.tensor([admitted]),
    )
    assert survivors(router, rest, budget) == whole[end:]


def test_a_past_score_comes_before_an_equal_one() -> None:
    past = torch.tensor([[-1.0, -2.0, -1.0, -torch.inf]])
    assert _count_at_least(past, torch.tensor([[-1.0, -2.0, -0.5, -3.0]])).tolist() == [[2, 3, 0, 3]]
    assert _count_at_least(past, torch.tensor([[-1.0 + 1e-6, -2.0 + 1e-6, -0.5, -3.0]])).tolist() == [[2, 3, 0, 3]]


@given(rows(min_tokens=2), st.data(), budgets, st.sampled_from(list(THRESHOLDS.values())))
def test_threshold_goes_on_from_the_credit_alone(
    row: Row, data: st.DataObject, budget: Fraction, threshold: float
) -> None:
    router = partial(route_threshold, threshold=threshold)
    whole = survivors(router, row, budget)
    end = len(row.prefix(data.draw(st.integers(1, row.optional.count(False) - 1))).scores)
    rest = Row(row.scores[end:], row.tokens[end:], row.optional[end:])
    admitted = sum(s and o for s, o in zip(whole[:end], row.optional[:end], strict=True))
    router = partial(router, past_admitted=torch.tensor([admitted]))
    assert survivors(router, rest, budget) == whole[end:]


def test_threshold_lets_a_hard_token_spend_what_easy_ones_left() -> None:
    # Two forks may be admitted by token 1, and one of token 0 would have taken half of the credit.
    row = row_of([1, 2], [-3.0, 0.0, -1.0, -1.5, -0.5, 0.0])
    router = partial(route_threshold, threshold=-2.0)
    assert survivors(router, row, Fraction(2)) == [False, True, True, False, True, True]


def test_topk_leaks_the_future() -> None:
    # One optional candidate may survive; a better fork of the second token takes the place of the first's.
    first, changed = row_of([1, 1], [-1.0, 0.0, -2.0, 0.0]), row_of([1, 1], [-1.0, 0.0, -0.5, 0.0])
    assert survivors(route_topk, first, Fraction(3, 2))[:2] == [True, True]
    assert survivors(route_topk, changed, Fraction(3, 2))[:2] == [False, True]


# --- Parts ---


@given(st.integers(1, 40).flatmap(lambda n: st.lists(st.permutations(range(n)), min_size=1, max_size=3)))
def test_counting_smaller_values_to_the_left(batch: list[list[int]]) -> None:
    expected = [[sum(left < value for left in row[:i]) for i, value in enumerate(row)] for row in batch]
    assert _count_smaller_before(torch.tensor(batch)).tolist() == expected


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 1000])
def test_counting_smaller_values_in_long_rows(length: int) -> None:
    rank = torch.randperm(length, generator=torch.Generator().manual_seed(length))[None]
    naive = (rank[:, None, :] < rank[:, :, None]).tril().sum(2)
    assert torch.equal(_count_smaller_before(rank), naive)


@pytest.mark.parametrize(
    ("rule", "width", "tokens", "budget", "expected"),
    [
        ("causal", 5, 5, 4, 10),
        ("causal", 10, 5, 1.5, 7),
        ("topk", 10, 5, 1.5, 8),
        ("causal", 10, 5, 1.2, 6),
        ("topk", 10, 5, 1.2, 6),
        ("causal", 1, 1, 1.9, 1),
        ("topk", 1, 1, 1.9, 2),
    ],
)
def test_static_width(rule: str, width: int, tokens: int, budget: float, expected: int) -> None:
    assert RULES[rule].width_after(width, tokens, parse_budget(budget)) == expected


def test_scratch_memory_is_poisoned() -> None:
    # Routing writes into torch.empty_like; this is what makes an unwritten place show.
    assert torch.empty(3).isnan().all()
    assert (torch.empty_like(torch.zeros(3, dtype=torch.int64)) == torch.iinfo(torch.int64).max).all()
    assert torch.zeros(1).new_empty(2).isnan().all()
