"""Routing: which candidates of a fork layer survive (method: Routing).

A rule is a `Rule`, its name among `rules.RULES`; at a fork layer a `Router` of it decides, by a pure function of the
candidates' scores, never of residuals. All such functions take

    scores    [B, M] float, log scores of the candidates in packed order
    token     [B, M] int64, ordinal of each candidate's token, non-decreasing; anything where not alive
    optional  [B, M] bool, every alive candidate that is not the keep of a root
    alive     [B, M] bool
    budget    the exact rational kappa; causal rules take one for each row too

The causal rule can also go on from a past (method: Cache).

and return survive [B, M] bool. The keeps of roots survive every rule, order is preserved, ties go to the
leftmost. Scores are compared on a grid (`on_grid`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .budget import MAX_TOKENS, RowBudgets, ceil_times, floor_times
from .memory import ForkMemory, RouteMemory

GRID = 2.0**-16
"""Nats between two scores that a router tells apart."""

FEW = 32
"""Scores that are compared with the past one by one: a step's, where sorting the past would be the greater work."""

LEAK = "topk routing sees later tokens"
"""What is said of a rule that leaks, after the word."""


class RoutingOptions(Protocol):
    """What rules read of a model's configuration."""

    random_rule: str
    routing_seed: int
    copy_layer: int

    @property
    def gated_layers(self) -> tuple[int, ...]:
        """The layers that have a gate."""


class Candidates(NamedTuple):
    """What a router decides on, explained above.

    Attributes:
        single: whether a row's are all of one token, as in a decoding step.
    """

    scores: Tensor
    token: Tensor
    optional: Tensor
    alive: Tensor
    budget: Fraction | RowBudgets
    single: bool = False


class Router:
    """How the candidates of one fork layer are routed; that of `causal`, which others change.

    Attributes:
        histogram: what training has to keep for it, a module of the gate's; None is nothing.
    """

    histogram: Any = None

    def rivals(self, scores: Tensor, token: Tensor, step: Tensor | int) -> Tensor:
        """[B, M] what is compared of candidates with log scores [B, M]; `step` as in `controls.draw_scores`."""
        return scores.detach()

    def whole(self, candidates: Candidates) -> Tensor:
        """[B, M] the survivors of whole rows."""
        return route_causal(*candidates[:5])

    def further(self, candidates: Candidates, memory: Any) -> Tensor:
        """[B, M] the survivors among those that follow what the memory of a cache holds, which takes them in."""
        past = memory.past_scores, memory.past_admitted
        survive = route_step(candidates, *past) if candidates.single else route_causal(*candidates[:5], *past)
        memory.append(candidates.scores, candidates.token, survive, candidates.optional)
        return survive

    def observe(self, candidates: Candidates) -> None:
        """Learn of the candidates of a forward pass in training."""


class WholeRowRouter(Router):
    """`topk`; with a cache, which never holds a whole row, `causal`."""

    def whole(self, candidates: Candidates) -> Tensor:
        """The best of the row."""
        assert isinstance(candidates.budget, Fraction)
        return route_topk(*candidates[:4], candidates.budget)


@dataclass(frozen=True)
class Rule:
    """A routing rule, and all that the rest of the package asks about it.

    Attributes:
        name: of the option `routing`.
        words: what a model card says of it.
        router: makes that of a fork layer; None where no layer has a gate.
        learned: whether the gates' scores choose the forks.
        leaks: whether a prediction may depend on later tokens.
        rounded: how the width after a fork layer rounds kappa T: `floor_times` or `ceil_times`.
        memory: what a cache has to remember of the past at a fork layer.
        copied_at: the layer at whose input every token becomes `budget` streams, for a rule without gates.
        with_vectors: whether those streams are learned, so that no budget may be above the configured one.
        settled: the rule itself, for one that depends on other options.
    """

    name: str
    words: str
    router: Callable[[RoutingOptions, int], Router] | None = None
    learned: bool = False
    leaks: bool = False
    rounded: Callable[[Fraction, int], int] = floor_times
    memory: type[RouteMemory] = ForkMemory
    copied_at: Callable[[RoutingOptions], int] | None = None
    with_vectors: bool = False
    settled: "Callable[[RoutingOptions], Rule] | None" = None

    @property
    def is_dense(self) -> bool:
        """Whether every token is one stream."""
        return self.router is None and self.copied_at is None

    def width_after(self, width: int, num_tokens: int, budget: Fraction | RowBudgets) -> int:
        """N' = min(2N, floor or ceil of kappa T): static for a shape, whatever the content (method: State)."""
        most = max(budget.exact) if isinstance(budget, RowBudgets) else budget
        return min(2 * width, self.rounded(most, num_tokens))


def on_grid(scores: Tensor) -> Tensor:
    """The nearest multiples of `GRID`, halves to even: what is equal but for rounding, as at the head of a row that
    repeats a token, ties whatever the batch, the padding or the cache that it was computed with."""
    return (scores / GRID).round() * GRID


@torch.no_grad()
def route_causal(
    scores: Tensor,
    token: Tensor,
    optional: Tensor,
    alive: Tensor,
    budget: Fraction | RowBudgets,
    past_scores: Tensor | None = None,
    past_admitted: Tensor | None = None,
) -> Tensor:
    """Left to right within an allowance: no decision depends on a later token (method: Routing).

    Both steps of the rule are evaluated in visiting order: by token, and by descending score within one.

    Args:
        past_scores: [B, P] scores of the optional candidates of the tokens before these, -inf where a row has fewer;
            `token` counts from the start of the whole row then.
        past_admitted: [B] how many of those were admitted.
    """
    rank = rank_optional(scores, optional)
    visit = visiting_order(rank, token, alive)
    allowance = allowances(budget, token.gather(1, visit))

    # Before c come, in visiting order, all optional candidates of earlier tokens and the better ones of its
    # own: exactly those of tokens <= t that may outrank it.
    outranked_by = _count_smaller_before(rank.gather(1, visit))
    if past_scores is not None:
        outranked_by = outranked_by + _count_at_least(past_scores, scores).gather(1, visit)
    eligible = optional.gather(1, visit) & (outranked_by < allowance)
    credit_used = 0 if past_admitted is None else past_admitted[:, None]
    admitted = admit_within_credit(eligible, allowance, credit_used)
    return torch.zeros_like(optional).scatter(1, visit, admitted) | (alive & ~optional)


@torch.no_grad()
def route_step(
    candidates: Candidates,
    past_scores: Tensor | None = None,
    past_admitted: Tensor | None = None,
    threshold: Tensor | float = -torch.inf,
) -> Tensor:
    """`route_causal` of the candidates of one token, in few operations, and those alone that reach a threshold.

    Of these the eligible ones are the first of their ranking, so that the credit, too, goes to the first.
    """
    scores, token, optional, alive, budget, _ = candidates
    rank, allowance = rank_few(scores, optional), allowances(budget, token)
    outranked_by = rank if past_scores is None else rank + _count_at_least(past_scores, scores)
    credit = allowance if past_admitted is None else allowance - past_admitted[:, None]
    admitted = (outranked_by < allowance) & (rank < credit) & (on_grid(scores) >= threshold)
    return torch.where(optional, admitted, alive)


@torch.no_grad()
def route_topk(scores: Tensor, token: Tensor, optional: Tensor, alive: Tensor, budget: Fraction) -> Tensor:
    """The paper's rule: the ceil(kappa n) best of the whole row of n tokens, roots first (method: Routing).

    It leaks: whether an early fork survives depends on later tokens.
    """
    roots = alive & ~optional
    tokens = roots.sum(1, keepdim=True)
    return roots | (optional & (rank_optional(scores, optional) < ceil_times(budget, tokens) - tokens))


CAUSAL = Rule(
    name="causal",
    words="causal: exactly left to right, no logit depends on a later token",
    router=lambda config, layer: Router(),
    learned=True,
)
TOPK = Rule(
    name="topk",
    words="topk: the best candidates of the whole row survive",
    router=lambda config, layer: WholeRowRouter(),
    learned=True,
    leaks=True,
    rounded=ceil_times,
)


def rank_optional(scores: Tensor, optional: Tensor) -> Tensor:
    """[B, M] place of each candidate in a stable descending sort, all optional ones first: a permutation."""
    order = torch.argsort(on_grid(scores).masked_fill(~optional, -torch.inf), dim=1, descending=True, stable=True)
    return torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )


def rank_few(scores: Tensor, optional: Tensor) -> Tensor:
    """The ranks of `rank_optional`, of optional ones [B, M] alone, by comparing each with each."""
    values = on_grid(scores).masked_fill(~optional, -torch.inf)
    place = torch.arange(scores.shape[1], device=scores.device)
    mine, others = values[..., None], values[:, None]
    return ((others > mine) | ((others == mine) & (place < place[:, None]))).sum(2)


def visiting_order(rank: Tensor, token: Tensor, alive: Tensor) -> Tensor:
    """[B, M] the candidates by token, and by their places [B, M] in a ranking within one; the dead come last."""
    return torch.argsort(torch.where(alive, token, MAX_TOKENS) * token.shape[1] + rank, dim=1)


def allowances(budget: Fraction | RowBudgets, token: Tensor) -> Tensor:
    """a(t) for ordinals [B, M] (method: Routing): how many optional candidates tokens 0..t may have admitted."""
    return budget.extra(token + 1) if isinstance(budget, RowBudgets) else floor_times(budget - 1, token + 1)


def admit_within_credit(eligible: Tensor, allowance: Tensor, credit_used: Tensor | int) -> Tensor:
    """Step 2 of the causal rule in closed form (method: Routing): [B, M] in visiting order, credit used [B, 1]."""
    visited = eligible.cumsum(1)
    slack = torch.where(eligible, allowance - credit_used - visited, 0)
    admitted_so_far = visited + slack.cummin(1).values.clamp(max=0)
    return eligible & (admitted_so_far.diff(dim=1, prepend=torch.zeros_like(visited[:, :1])) > 0)


def _count_at_least(past: Tensor, scores: Tensor) -> Tensor:
    """For each score [B, M] the number of past ones [B, P] that come before it: the past stands to the left."""
    if scores.shape[1] <= FEW:
        return (on_grid(past)[:, None] >= on_grid(scores)[..., None]).sum(2)
    return past.shape[1] - torch.searchsorted(on_grid(past).sort(dim=1).values, on_grid(scores).contiguous())


def _count_smaller_before(rank: Tensor) -> Tensor:
    """For each place of a permutation [B, M] the number of smaller values to its left, in O(M log M).

    Radix partition from the highest bit down. When the values are grouped by their bits above the current one,
    each group a contiguous block in original order, a value with the bit set has to its left, within its block,
    the smaller ones that first differ from it in this bit: one cumulative sum a bit counts them.
    """
    batch, length = rank.shape
    bits = max(length - 1, 1).bit_length()
    size = 1 << bits
    fill = torch.arange(length, size, device=rank.device).expand(batch, -1)
    values = torch.cat([rank, fill], dim=1)
    counts = torch.zeros_like(values)
    for bit in reversed(range(bits)):
        blocks = values.view(batch, -1, 2 << bit)
        is_set = (blocks >> bit) & 1
        zeros = (1 - is_set).cumsum(2)
        place = torch.arange(2 << bit, device=rank.device)
        # Each block holds as many values with the bit as without: zeros go to its first half, ones to its second.
        target = torch.where(is_set == 1, (1 << bit) + place - zeros, zeros - 1)
        counts = counts.view_as(blocks) + is_set * zeros
        values = torch.empty_like(blocks).scatter_(2, target, blocks).view(batch, size)
        counts = torch.empty_like(blocks).scatter_(2, target, counts).view(batch, size)
    return counts.gather(1, rank)
