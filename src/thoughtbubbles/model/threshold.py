"""The calibrated causal rule: forks whose scores reach the threshold of their layer (method: Routing).

Shape letters: B batch, M candidates.
"""

from fractions import Fraction

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import initialization as init

from .budget import RowBudgets
from .memory import CreditMemory
from .routing import (
    Candidates,
    Router,
    Rule,
    admit_within_credit,
    allowances,
    on_grid,
    rank_optional,
    route_step,
    visiting_order,
)

BINS, BINS_PER_NAT = 2048, 64
HORIZON = 32
"""Updates that the running mean goes back."""


@torch.no_grad()
def route_threshold(
    scores: Tensor,
    token: Tensor,
    optional: Tensor,
    alive: Tensor,
    budget: Fraction | RowBudgets,
    threshold: Tensor | float,
    past_admitted: Tensor | None = None,
) -> Tensor:
    """Left to right within an allowance, whoever reaches the threshold: a router like those of `routing`.

    Neither ranks nor scores of the past take part: a cache has to remember the credit alone.

    Args:
        threshold: scalar or [B, 1], the least score that is eligible; -inf where all are.
        past_admitted: [B] optional candidates admitted among the tokens before these.
    """
    visit = visiting_order(rank_optional(scores, optional), token, alive)
    eligible = (optional & (on_grid(scores) >= threshold)).gather(1, visit)
    credit_used = 0 if past_admitted is None else past_admitted[:, None]
    admitted = admit_within_credit(eligible, allowances(budget, token.gather(1, visit)), credit_used)
    return torch.zeros_like(optional).scatter(1, visit, admitted) | (alive & ~optional)


def share_admitted(budget: Fraction | RowBudgets, fork: int) -> float | Tensor:
    """The share of its optional candidates that a fork layer can admit; [B, 1] of budgets of rows.

    `fork` counts the fork layers before it.

    A token brings min(2^fork, kappa) streams where every allowance is spent, two candidates each, all optional but
    the keep of its root, and may add kappa - 1.
    """
    n, d = budget.numerator, budget.denominator
    if isinstance(n, Tensor):
        return ((n - d).double() / (2 * torch.minimum(2**fork * d, n) - d)).clamp(max=1)
    share: float = (n - d) / (2 * min(2**fork * d, n) - d)
    return min(share, 1.0)


class ScoreHistogram(nn.Module):
    """A running histogram of the scores of a fork layer's optional candidates: every budget has its threshold there.

    Forward passes in training are observed; `update`, after an optimizer step, lets the running mean take in what they
    saw. Counts add up, so that neither micro-batches nor processes matter. In evaluation nothing changes. Before the
    first update every candidate is eligible.

    Attributes:
        reached: [2048] float32, the share of the optional candidates with scores above -(i + 1) / 64.
        updates: int64 scalar.
    """

    reached: Tensor
    updates: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("reached", torch.empty(BINS))
        self.register_buffer("updates", torch.empty((), dtype=torch.int64))
        # No buffer, since DDP would overwrite it with that of the first process.
        self.observed = torch.zeros(BINS, dtype=torch.int64, device="cpu")
        self.forget()

    @torch.no_grad()
    def forget(self) -> None:
        """Begin anew: no update was made."""
        init.zeros_(self.reached)
        init.zeros_(self.updates)

    @torch.no_grad()
    def observe(self, scores: Tensor, optional: Tensor) -> None:
        """Count the optional ones of candidates [B, M]; what is no number, in a run that diverges, has no bin."""
        self.observed = self.observed.to(scores.device)
        counted = optional & ~scores.isnan()
        # Clamped before they are whole numbers: what an infinite one becomes is left to the device.
        bins = torch.where(counted, on_grid(scores) * -BINS_PER_NAT, 0).clamp(0, BINS - 1).long()
        self.observed.scatter_add_(0, bins.flatten(), counted.flatten().long())

    @torch.no_grad()
    def update(self) -> None:
        """One step of the running mean, over what all processes observed since the last, if they did at all.

        Nothing is read back from the device.
        """
        counts = self.observed.to(self.reached.device)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts)
        observed = counts.any()
        self.updates += observed
        reached = (counts.cumsum(0) / counts.sum().clamp(min=1)).to(self.reached.dtype)
        self.reached.lerp_(reached, observed / self.updates.clamp(1, HORIZON).to(reached.dtype))
        self.observed = torch.zeros_like(counts)

    def threshold(self, budget: Fraction | RowBudgets, fork: int) -> Tensor:
        """The lower end of the bin by which the share that can be admitted is reached (`share_admitted`).

        [1], or [B, 1] of budgets of rows.
        """
        share = share_admitted(budget, fork)
        reached_before = self.reached < (share.to(self.reached.dtype) if isinstance(share, Tensor) else share)
        bins = 1 + reached_before.sum(-1, keepdim=True)
        everything = (self.updates == 0) | (share == 1)
        return torch.where(everything, -torch.inf, bins / -BINS_PER_NAT)


class ThresholdRouter(Router):
    """Routes by the threshold that a histogram says; `fork` counts the fork layers before it."""

    histogram: ScoreHistogram

    def __init__(self, fork: int) -> None:
        self.fork = fork
        self.histogram = ScoreHistogram()

    def whole(self, candidates: Candidates) -> Tensor:
        """Whoever reaches it."""
        return route_threshold(*candidates[:5], self.histogram.threshold(candidates.budget, self.fork))

    def further(self, candidates: Candidates, memory: CreditMemory) -> Tensor:
        """Whoever reaches it, as far as the credit goes."""
        threshold = self.histogram.threshold(candidates.budget, self.fork)
        if candidates.single:
            survive = route_step(candidates, None, memory.past_admitted, threshold)
        else:
            survive = route_threshold(*candidates[:5], threshold, memory.past_admitted)
        memory.append(candidates.token, survive & candidates.optional)
        return survive

    def observe(self, candidates: Candidates) -> None:
        """Count their scores."""
        self.histogram.observe(candidates.scores, candidates.optional)


THRESHOLD = Rule(
    name="threshold",
    words="threshold: exactly left to right, forks survive whose scores reach a threshold that training set",
    router=lambda config, layer: ThresholdRouter(sum(fork < layer for fork in config.gated_layers)),
    learned=True,
    memory=CreditMemory,
)


def update_thresholds(model: nn.Module) -> None:
    """What a training loop calls after each optimizer step, on every process, of a model with routing `threshold`.

    A model with another routing has nothing to update.
    """
    for module in model.modules():
        if isinstance(module, ScoreHistogram):
            module.update()
