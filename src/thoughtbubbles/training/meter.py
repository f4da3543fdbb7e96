"""What training costs: tokens, floating-point operations, time, memory."""

import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from thoughtbubbles.data.feed.rundata import Samples
from thoughtbubbles.model.accounting import training_flops
from thoughtbubbles.model.budget import Budget
from thoughtbubbles.model.configuration import ThoughtbubblesConfig
from thoughtbubbles.model.gate import ForkGate
from thoughtbubbles.model.streams import Streams
from thoughtbubbles.recipes.training import Recipe
from thoughtbubbles.support.sampling import draw
from thoughtbubbles.training.sharding import whole


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


QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
# torch.quantile takes no more numbers than this.
MOST_SCORES = 1 << 24


class ForkStatistics:
    """Watches the forward passes of an optimizer step.

    `summary` gives, for each fork layer L: `forks/L/streams_per_token`, the mean over real tokens;
    `forks/L/bubble_share`, the share of tokens with more than one stream; `forks/L/log_score_qXX`, quantiles of the
    survivors' log scores, roots included. On several processes, of the first one's share of the batch.
    """

    def __init__(self, model: nn.Module) -> None:
        self._gates = {name.rpartition(".")[2]: gate for name, gate in model.named_modules() if type(gate) is ForkGate}
        # They stay: a compiled graph would not notice hooks that come later.
        self._taps = {layer: _Tap(gate) for layer, gate in self._gates.items()}
        self._sizes: dict[str, list[Tensor]] = {}
        self._scores: dict[str, list[Tensor]] = {}

    def watch(self) -> None:
        """Note what the gates did in the last forward pass."""
        for layer, tap in self._taps.items():
            assert tap.streams is not None
            sizes = tap.streams.bubble_sizes()
            self._sizes.setdefault(layer, []).append(sizes[sizes > 0])
            self._scores.setdefault(layer, []).append(tap.streams.log_score[tap.streams.alive])

    def summary(self) -> dict[str, float]:
        """The figures of what was watched since the last summary."""
        found: dict[str, float] = {}
        for layer, sizes in self._sizes.items():
            size, scores = torch.cat(sizes), torch.cat(self._scores[layer])[:MOST_SCORES]
            found[f"forks/{layer}/streams_per_token"] = size.double().mean().item()
            found[f"forks/{layer}/bubble_share"] = (size > 1).double().mean().item()
            levels = torch.tensor(QUANTILES, dtype=scores.dtype, device=scores.device)
            for level, value in zip(QUANTILES, torch.quantile(scores, levels).tolist(), strict=True):
                found[f"forks/{layer}/log_score_q{round(100 * level):02}"] = value
        self._sizes, self._scores = {}, {}
        return found

    def gradient_norm(self) -> float:
        """Norm of the gradient of all gates' parameters."""
        gradients = [p.grad for gate in self._gates.values() for p in gate.parameters() if p.grad is not None]
        return float(whole(nn.utils.get_total_norm(gradients)))

    def __bool__(self) -> bool:
        return bool(self._gates)


class _Tap:
    """The streams that left a gate last, without their residuals."""

    def __init__(self, gate: ForkGate) -> None:
        self.streams: Streams | None = None
        gate.register_forward_hook(self._note)

    def _note(self, _gate: nn.Module, _arguments: Any, streams: Streams) -> None:
        nothing = streams.log_score.new_zeros(*streams.token.shape, 0)
        self.streams = replace(streams, residual=nothing, log_score=streams.log_score.detach())
