"""What training costs: tokens, floating-point operations, time, memory."""

import sys
import time
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

import torch

from thoughtbubbles.data.feed.rundata import RowLengths
from thoughtbubbles.model.accounting import training_flops
from thoughtbubbles.model.budget import Budget, parse_budget
from thoughtbubbles.model.configuration import ThoughtbubblesConfig
from thoughtbubbles.recipes.training import Recipe, TrainingSection
from thoughtbubbles.support.sampling import draw


def budget_of_step(budgets: Sequence[Budget], seed: int, step: int) -> Budget:
    """The budget of an optimizer step, 1-based, drawn from the list by (seed, step) alone."""
    return budgets[int.from_bytes(draw(seed, "budget", str(step).encode())[:8], "big") % len(budgets)]


RUNGS = 8
"""Of the rise of the budget: few, since a compiled model has a graph for each."""


def rising_budgets(own: Budget) -> list[Fraction]:
    """The budgets, from 1 on, through which a ramp goes up to a model's own."""
    return [1 + (parse_budget(own) - 1) * Fraction(rung, RUNGS) for rung in range(RUNGS)]


def training_budget(settings: TrainingSection, own: Budget, step: int) -> Budget | None:
    """The budget at which an optimizer step, 1-based, trains; None is the model's own."""
    if settings.training_budgets is not None:
        return budget_of_step(settings.training_budgets, settings.seed, step)
    ramp = settings.budget_ramp * settings.steps
    if step > ramp:
        return None
    return str(rising_budgets(own)[int(RUNGS * (step - 1) / ramp)])


class Meter:
    """Tokens and floating-point operations of the first steps of a run: functions of the recipe and its data.

    Args:
        micro_batch_size: rows of one forward pass, which are padded to the longest of them.
    """

    def __init__(
        self, recipe: Recipe, config: ThoughtbubblesConfig, samples: RowLengths, micro_batch_size: int
    ) -> None:
        self._settings = recipe.training
        self._config = config
        self._samples = samples
        self._micro_batch_size = micro_batch_size
        self._step = 0
        self._tokens = 0
        self._rows: Counter[tuple[int, str | None]] = Counter()

    def tokens(self, step: int) -> int:
        """Real tokens seen in the first `step` steps."""
        self._advance(step)
        return self._tokens

    def flops(self, step: int) -> int:
        """Floating-point operations, as `accounting` counts them, spent on training in the first `step` steps."""
        self._advance(step)
        return sum(rows * training_flops(self._config, length, budget) for (length, budget), rows in self._rows.items())

    def _advance(self, step: int) -> None:
        if step < self._step:
            self._step, self._tokens = 0, 0
            self._rows.clear()
        batch, micro = self._settings.batch_size, self._micro_batch_size
        settings, length = self._settings, self._samples.uniform_length
        ramped = self._step < settings.budget_ramp * settings.steps
        if length is not None and settings.training_budgets is None and not ramped:
            self._tokens += (step - self._step) * batch * length
            self._rows[length, None] += (step - self._step) * batch
            self._step = step
            return
        for number in range(self._step + 1, step + 1):
            drawn = training_budget(settings, self._config.budget, number)
            budget = None if drawn is None else str(drawn)
            first = (number - 1) * batch
            if length is not None:
                self._tokens += batch * length
                self._rows[length, budget] += batch
                continue
            lengths = [self._samples.length(index) for index in range(first, first + batch)]
            self._tokens += sum(lengths)
            for start in range(0, batch, micro):
                rows = lengths[start : start + micro]
                self._rows[max(rows), budget] += len(rows)
        self._step = step


def peak_memory(device: torch.device) -> int:
    """Bytes that this process has held at most: on a GPU in tensors, elsewhere all in all, libraries included.

    0 on a platform that does not say.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Clock:
    """Seconds spent training, evaluations and checkpoints left out.

    Args:
        tokens: seen before.
        flops: spent before.
    """

    def __init__(self, tokens: int, flops: int) -> None:
        self.seconds = 0.0
        self._first_tokens = tokens
        self._started: float | None = None
        self._last = (tokens, flops, 0.0)

    def start(self) -> None:
        """Go on counting."""
        if self._started is None:
            self._started = time.perf_counter()

    def stop(self) -> None:
        """Count until now, and no further."""
        if self._started is not None:
            self.seconds += time.perf_counter() - self._started
        self._started = None

    def rates(self, tokens: int, flops: int) -> tuple[float, float]:
        """Tokens and operations per second since the last call, given those so far."""
        before, self._last = self._last, (tokens, flops, self.seconds)
        return _ratio(tokens - before[0], self.seconds - before[2]), _ratio(flops - before[1], self.seconds - before[2])

    def mean_rate(self, tokens: int) -> float:
        """Tokens per second since the start of this process."""
        return _ratio(tokens - self._first_tokens, self.seconds)


def _ratio(amount: float, seconds: float) -> float:
    return amount / seconds if seconds > 0 else 0.0
