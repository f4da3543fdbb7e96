"""The budget: streams per token that may exist, an exact rational (method: State)."""

import copy
import re
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import overload

import torch

Budget = int | float | str | Fraction

# Multiples n beyond this are refused; it keeps `numerator * n` far inside int64.
MAX_TOKENS = 2**24
MAX_BUDGET = 1024
# Of a budget's text. An exponent of a few digits more makes a rational that no memory holds.
MAX_CHARACTERS = 1000
MAX_EXPONENT = 1000
EXPONENT = re.compile(r"[eE]([-+]?[0-9_]+)\s*$")


def parse_budget(budget: Budget, name: str = "budget") -> Fraction:
    """Read a budget as the exact rational of its decimal text: 1.2 is 6/5, "4/3" is 4/3.

    Raises:
        ValueError: if it is no number, below 1 or above 1024.
    """
    expected = f"expected a number of streams per token from 1 to {MAX_BUDGET}, such as 1, 1.5, 2 or '4/3'"
    try:
        if isinstance(budget, bool):
            raise ValueError
        value = budget if isinstance(budget, int | Fraction) else _read(str(budget))
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"{name}={_shown(budget)}: {expected}") from None
    if value < 1 or value > MAX_BUDGET:  # the rational on the left: compilers trace its comparison
        raise ValueError(f"{name}={_shown(budget)}: {expected}")
    return Fraction(value)


def _read(text: str) -> Fraction:
    """The rational that a text writes out.

    Raises:
        ValueError: if it writes none, or one too long or too far from 1 to be a budget.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError
    exponent = EXPONENT.search(text)
    if exponent is not None and abs(int(exponent[1])) > MAX_EXPONENT:
        raise ValueError
    return Fraction(text)


def _shown(budget: object) -> str:
    """A value for a message, which has one line."""
    try:
        text = repr(budget)
    except ValueError:  # Python writes no whole number of more than some thousand digits
        return "a number of thousands of digits"
    return text if len(text) <= MAX_CHARACTERS // 10 else f"{text[: MAX_CHARACTERS // 10]}..."


class RowBudgets:
    """A budget for each row of a batch (method: Budget at test time).

    Attributes:
        exact: of each row.
        numerator, denominator: [B, 1] int64, of the greatest fraction up to it that products with tokens can hold.
    """

    def __init__(self, budgets: Sequence[Fraction], device: torch.device | str = "cpu") -> None:
        self.exact = list(budgets)
        bounds = [_neighbours(budget)[0] for budget in budgets]
        self.numerator, self.denominator = (
            torch.tensor([[getattr(bound, part)] for bound in bounds], dtype=torch.int64, device=device)
            for part in ("numerator", "denominator")
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RowBudgets) and self.exact == other.exact

    __hash__ = None  # type: ignore[assignment]  # rows change

    def __str__(self) -> str:
        return f"[{', '.join(map(budget_text, self.exact))}]"

    def set(self, row: int, budget: Fraction) -> None:
        """Give a row another budget, in place."""
        self.exact[row] = budget
        bound, _ = _neighbours(budget)
        self.numerator[row], self.denominator[row] = bound.numerator, bound.denominator

    def part(self, row: int) -> "RowBudgets":
        """A row's alone, in the same memory."""
        part = copy.copy(self)
        part.exact = [self.exact[row]]
        part.numerator, part.denominator = self.numerator[row : row + 1], self.denominator[row : row + 1]
        return part

    def select(self, rows: Sequence[int]) -> "RowBudgets":
        """Those of the rows at these places, in their order."""
        return RowBudgets([self.exact[row] for row in rows], self.numerator.device)

    def extra(self, n: torch.Tensor) -> torch.Tensor:
        """floor((kappa - 1) n) of n [B, M] in integer arithmetic, as `floor_times`."""
        return (self.numerator - self.denominator) * n // self.denominator


def budget_text(budget: Budget) -> str:
    """A budget for people: 1.5 rather than 3/2, where a short decimal says the same."""
    value = parse_budget(budget)
    short = f"{float(value):g}"
    return short if Fraction(short) == value else str(value)


@overload
def floor_times(ratio: Fraction, n: int) -> int: ...
@overload
def floor_times(ratio: Fraction, n: torch.Tensor) -> torch.Tensor: ...
def floor_times(ratio: Fraction, n: int | torch.Tensor) -> int | torch.Tensor:
    """floor(ratio * n) in integer arithmetic, exact for 0 <= n <= 2**24 (method: State)."""
    bound, _ = _neighbours(ratio)
    return bound.numerator * n // bound.denominator


@overload
def ceil_times(ratio: Fraction, n: int) -> int: ...
@overload
def ceil_times(ratio: Fraction, n: torch.Tensor) -> torch.Tensor: ...
def ceil_times(ratio: Fraction, n: int | torch.Tensor) -> int | torch.Tensor:
    """ceil(ratio * n) in integer arithmetic, exact for 0 <= n <= 2**24 (method: State)."""
    _, bound = _neighbours(ratio)
    return -(-bound.numerator * n // bound.denominator)


@lru_cache(maxsize=256)
def _neighbours(ratio: Fraction) -> tuple[Fraction, Fraction]:
    """The closest fractions with denominators <= MAX_TOKENS at or below and at or above `ratio`.

    No fraction m / n with n <= MAX_TOKENS lies strictly between `ratio` and either of them, so they have
    the same floor(ratio * n) and ceil(ratio * n), while their products with n fit int64 where those of a
    long decimal would not. Found as convergent and semiconvergent of the continued fraction.
    """
    if ratio.denominator <= MAX_TOKENS:
        return ratio, ratio
    p0, q0, p1, q1 = 0, 1, 1, 0
    n, d = ratio.numerator, ratio.denominator
    while q0 + (n // d) * q1 <= MAX_TOKENS:
        a = n // d
        p0, q0, p1, q1 = p1, q1, p0 + a * p1, q0 + a * q1
        n, d = d, n - a * d
    k = (MAX_TOKENS - q0) // q1
    pair = sorted((Fraction(p1, q1), Fraction(p0 + k * p1, q0 + k * q1)))
    return pair[0], pair[1]
