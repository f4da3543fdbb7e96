"""Exact integer arithmetic with budgets (method: State)."""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thoughtbubbles.model.budget import MAX_BUDGET, MAX_TOKENS, ceil_times, floor_times, parse_budget

LONG_DECIMALS = [4 / 3, 0.1 + 0.2 + 1, 10 / 7, 1.0000001, 1023.9999999999, *map(float, np.linspace(1, 4, 7))]
budgets = st.one_of(
    st.sampled_from(LONG_DECIMALS),
    st.floats(1, MAX_BUDGET),
    st.fractions(1, MAX_BUDGET),
    st.decimals(1, MAX_BUDGET, places=12).map(str),
).map(parse_budget)
counts = st.one_of(st.integers(0, 5000), st.integers(0, MAX_TOKENS), st.just(MAX_TOKENS))


@pytest.mark.parametrize(
    ("text", "exact"),
    [
        (1.2, Fraction(6, 5)),
        ("1.2", Fraction(6, 5)),
        ("4/3", Fraction(4, 3)),
        (3, Fraction(3)),
        (np.float32(1.2), Fraction(6, 5)),
        (Fraction(7, 2), Fraction(7, 2)),
        (1024, Fraction(1024)),
        (4 / 3, Fraction("1.3333333333333333")),
    ],
)
def test_budget_is_the_rational_of_its_decimal_text(text: Any, exact: Fraction) -> None:
    assert parse_budget(text) == exact


@pytest.mark.parametrize(
    "wrong",
    [True, False, "abc", "", "1/0", 0.5, 0, -1, "-3/2", math.nan, math.inf, -math.inf, 2000, 1024.5, None, [2], 1j],
    ids=repr,
)
def test_wrong_budget_names_the_value_and_what_is_allowed(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"kappa=.*expected a number of streams per token from 1 to 1024") as error:
        parse_budget(wrong, "kappa")
    assert repr(wrong) in str(error.value)


@pytest.mark.parametrize(
    "wrong",
    ["1e30000000", "1e-30000000", "1.5E+9999999999", "0.5e" + "9" * 5000, "9" * 5000, "1/" + "9" * 2000, 10**5000],
    ids=lambda wrong: f"{str(wrong)[:14]}..." if isinstance(wrong, str) else "10**5000",
)
def test_a_budget_beyond_all_bounds_is_refused_at_once(wrong: Any) -> None:
    with pytest.raises(ValueError, match="expected a number of streams per token from 1 to 1024") as error:
        parse_budget(wrong)
    assert len(str(error.value)) < 250


def test_an_exponent_within_bounds_is_read() -> None:
    assert parse_budget("150e-2") == parse_budget("0.15E+1") == Fraction(3, 2)


@given(budgets, counts)
def test_floor_and_ceil_of_an_integer_are_exact(ratio: Fraction, n: int) -> None:
    assert floor_times(ratio, n) == math.floor(ratio * n)
    assert ceil_times(ratio, n) == math.ceil(ratio * n)


@given(budgets, counts)
def test_floor_of_the_part_above_one_is_exact(ratio: Fraction, n: int) -> None:
    assert floor_times(ratio - 1, n) == math.floor((ratio - 1) * n)


@given(budgets, st.lists(counts, min_size=1, max_size=5))
def test_floor_and_ceil_of_a_tensor_are_exact(ratio: Fraction, ns: list[int]) -> None:
    assert floor_times(ratio, torch.tensor(ns)).tolist() == [math.floor(ratio * n) for n in ns]
    assert ceil_times(ratio, torch.tensor(ns)).tolist() == [math.ceil(ratio * n) for n in ns]


@pytest.mark.parametrize("decimal", LONG_DECIMALS)
def test_long_decimals_at_their_break_points(decimal: float) -> None:
    ratio = parse_budget(decimal)
    near = Fraction(decimal).limit_denominator(50)
    for n in range(near.denominator, 4000, near.denominator):  # where ratio * n is a hair from whole
        assert floor_times(ratio, n) == math.floor(ratio * n)
        assert ceil_times(ratio, n) == math.ceil(ratio * n)


def test_float_arithmetic_would_be_wrong() -> None:
    assert math.floor((1.2 - 1) * 5) == 0
    assert floor_times(parse_budget(1.2) - 1, 5) == 1
