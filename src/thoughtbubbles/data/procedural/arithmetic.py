"""The task `arithmetic`: `(3+5)*2=` is answered by `16`.

    prompt     = operand operator operand "="
    operand    = digit | "(" operand operator operand ")"
    operator   = "+" | "-" | "*"
    digit      = "0" ... "9"

The difficulty counts operators. The answer is the value in decimal, with "-" before a negative one. No value, those in
brackets included, is below -99 or above 99, so that a longer expression takes more steps, not larger numbers.
"""

import operator
import random
from collections.abc import Callable

from thoughtbubbles.data.procedural.examples import ProceduralTask

OPERATORS: dict[str, Callable[[int, int], int]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}
LARGEST = 99


def make_arithmetic(chooser: random.Random, difficulty: int) -> tuple[str, str]:
    """A random expression of `difficulty` operators with "=" behind it, and its value."""
    text, value = _expression(chooser, difficulty)
    return f"{text}=", str(value)


def _expression(chooser: random.Random, operators: int) -> tuple[str, int]:
    """An expression without outer brackets, and its value."""
    if operators == 0:
        digit = chooser.randrange(10)
        return str(digit), digit
    left_operators = chooser.randrange(operators)
    left, a = _operand(chooser, left_operators)
    right, b = _operand(chooser, operators - 1 - left_operators)
    # There is one at least: of numbers of one sign the difference is small, of two signs the sum.
    small = [name for name, apply in OPERATORS.items() if abs(apply(a, b)) <= LARGEST]
    name = chooser.choice(small)
    return f"{left}{name}{right}", OPERATORS[name](a, b)


def _operand(chooser: random.Random, operators: int) -> tuple[str, int]:
    text, value = _expression(chooser, operators)
    return (f"({text})" if operators else text), value


# With 30 operators the longest row has 125 tokens, its start and its end included.
ARITHMETIC = ProceduralTask("arithmetic", (*"0123456789", *OPERATORS, *"()="), 30, make_arithmetic)
