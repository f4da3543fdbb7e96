"""What training costs: tokens, floating-point operations, time, memory."""

import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from transformers import TrainerCallback

from thoughtbubbles.data.feed.rundata import Samples
from thoughtbubbles.model.accounting import training_flops
from thoughtbubbles.model.budget import Budget
from thoughtbubbles.model.configuration import ThoughtbubblesConfig
from thoughtbubbles.recipes.training import Recipe
from thoughtbubbles.support.sampling import draw


def budget_of_step(budgets: Sequence[Budget], seed: int, step: int) -> Budget:
    """The budget of an optimizer step, 1-based, drawn from the list by (seed, step) alone."""
    return budgets[int.from_bytes(draw(seed, "budget", str(step).encode())[:8], "big") % len(budgets)]


class Meter:
    """Tokens and floating-point operations of the first steps of a run: functions of the recipe and its data.

    Args:
        micro_batch_size: rows of one forward pass, which are padded to the longest of them.
    """

    def __init__(self, recipe: Recipe, config: ThoughtbubblesConfig, samples: Samples, micro_batch_size: int) -> None:
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
        budgets, length = self._settings.training_budgets, self._samples.uniform_length
        if length is not None and budgets is None:
            self._tokens += (step - self._step) * batch * length
            self._rows[length, None] += (step - self._step) * batch
            self._step = step
            return
        for number in range(self._step + 1, step + 1):
            budget = None if budgets is None else str(budget_of_step(budgets, self._settings.seed, number))
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


class Clock(TrainerCallback):
    """Seconds spent training: evaluations and checkpoints left out.

    Args:
        tokens: seen before.
    """

    def __init__(self, tokens: int) -> None:
        self.seconds = 0.0
        self.first_tokens = tokens
        self._mark = 0.0
        self._last = (tokens, 0.0)

    def rate(self, tokens: int) -> float:
        """Tokens per second since the last call, given the tokens seen so far."""
        rate = _ratio(tokens - self._last[0], self.seconds - self._last[1])
        self._last = (tokens, self.seconds)
        return rate

    def mean_rate(self, tokens: int) -> float:
        """Tokens per second since the start of this process."""
        return _ratio(tokens - self.first_tokens, self.seconds)

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        self._mark = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Count the time since the last step, evaluation or checkpoint ended."""
        now = time.perf_counter()
        self.seconds += now - self._mark
        self._mark = now

    def on_evaluate(self, *_: Any, **__: Any) -> None:
        """Leave the evaluation's time out."""
        self._mark = time.perf_counter()

    def on_save(self, *_: Any, **__: Any) -> None:
        """Leave the checkpoint's time out."""
        self._mark = time.perf_counter()


def _ratio(amount: float, seconds: float) -> float:
    return amount / seconds if seconds > 0 else 0.0
