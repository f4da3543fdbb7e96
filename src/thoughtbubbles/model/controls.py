"""The controls (method: Controls): `random` and `uniform` admission by a hash, and the streams of `copy` and `pause`.

They ask what a learned choice of forks is worth beside one that knows nothing.

Shape letters: B batch, N streams, M candidates, D hidden size.
"""

from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from .budget import MAX_TOKENS, RowBudgets
from .routing import (
    CAUSAL,
    GRID,
    TOPK,
    Candidates,
    Router,
    RoutingOptions,
    Rule,
    WholeRowRouter,
    allowances,
    rank_optional,
    visiting_order,
)
from .streams import Streams

_LANES = (0x9E3779B9, 0x85EBCA6B)
_MASK = 2**32 - 1


def draw_scores(token: Tensor, layer: int, seed: int, step: Tensor | int = 0) -> Tensor:
    """[B, M] float64 in [0, 1): a hash of seed, step, layer, ordinal and place among the candidates of the token.

    The same on every device and in every batch (method: Controls).

    Args:
        token: [B, M] int64 ordinals of the candidates in the whole row, non-decreasing.
        layer: of the fork.
        seed: below 2^32.
        step: int64 scalar, of the optimizer; 0 in evaluation.
    """
    token = token.contiguous()
    place = torch.arange(token.shape[1], device=token.device) - torch.searchsorted(token, token)
    high, low = (_hash(lane, seed, step, layer, token, place) for lane in _LANES)
    return ((high << 21) | (low >> 11)).to(torch.float64) / 2**53


def _hash(state: int, *fields: Tensor | int) -> Tensor:
    """32 bits of the fields, each below 2^32."""
    mixed: Tensor | int = state
    for value in fields:
        mixed = _mix(mixed ^ value)
    assert isinstance(mixed, Tensor)
    return mixed


def _mix(x: Tensor | int) -> Tensor | int:
    """A permutation of the numbers below 2^32.

    The multipliers lie below 2^31, so that no product leaves int64: what overflow does is left to a compiler.
    """
    x = (x ^ (x >> 16)) * 0x21F0AAAD & _MASK
    x = (x ^ (x >> 15)) * 0x735A2D97 & _MASK
    return x ^ (x >> 15)


@torch.no_grad()
def route_uniform(
    scores: Tensor, token: Tensor, optional: Tensor, alive: Tensor, budget: Fraction | RowBudgets
) -> Tensor:
    """Evenly: token t admits a(t) - a(t - 1) of its optional candidates, those of greatest score (method: Controls).

    A router like those of `routing`, where the arguments are explained. Each token is routed by itself.
    """
    visit = visiting_order(rank_optional(scores, optional), token, alive)
    visited = torch.where(alive, token, MAX_TOKENS).gather(1, visit)
    rank = torch.arange(token.shape[1], device=token.device) - torch.searchsorted(visited, visited)
    share = allowances(budget, visited) - allowances(budget, visited - 1)
    admitted = optional.gather(1, visit) & (rank < share)
    return torch.zeros_like(optional).scatter(1, visit, admitted) | (alive & ~optional)


class DrawingRouter(Router):
    """Routes as another does, by a hash in the place of scores.

    Args:
        router: the other.
        layer: of the fork.
        seed: of the hash.
    """

    def __init__(self, router: Router, layer: int, seed: int) -> None:
        self.router = router
        self.layer = layer
        self.seed = seed

    def rivals(self, scores: Tensor, token: Tensor, step: Tensor | int) -> Tensor:
        """Draws, which have 53 bits: as whole steps of the routers' grid all of them count."""
        return draw_scores(token, self.layer, self.seed, step) * (2**53 * GRID)

    def whole(self, candidates: Candidates) -> Tensor:
        """As the other router."""
        return self.router.whole(candidates)

    def further(self, candidates: Candidates, memory: Any) -> Tensor:
        """As the other router."""
        return self.router.further(candidates, memory)


class UniformRouter(Router):
    """Routes each token by itself, so that there is nothing to remember."""

    def whole(self, candidates: Candidates) -> Tensor:
        """Of each token its share."""
        return route_uniform(*candidates[:5])

    def further(self, candidates: Candidates, memory: Any) -> Tensor:
        """Of each token its share."""
        return self.whole(candidates)


def _drawing(rule: Rule, router: type[Router], name: str, words: str) -> Rule:
    """A rule like another that draws by a hash."""

    def make(config: RoutingOptions, layer: int) -> Router:
        return DrawingRouter(router(), layer, config.routing_seed)

    return replace(rule, name=name, words=words, router=make, learned=False)


_RANDOM = ("random", "random: forks survive by a hash that knows nothing of the text")
_BY_RULE = {"causal": _drawing(CAUSAL, Router, *_RANDOM), "topk": _drawing(TOPK, WholeRowRouter, *_RANDOM)}
RANDOM = replace(_BY_RULE["causal"], settled=lambda config: _BY_RULE[config.random_rule])
UNIFORM = _drawing(
    *(CAUSAL, UniformRouter, "uniform"), "uniform: every token may fork equally often, the forks chosen by a hash"
)
NONE = Rule("none", "none: no forks")
COPY = Rule(
    name="copy",
    words="copy: from one layer on every token is several streams, at first equal",
    copied_at=lambda config: config.copy_layer,
)
PAUSE = Rule(
    name="pause",
    words="pause: learned vectors follow every token",
    copied_at=lambda config: 0,
    with_vectors=True,
)


class StreamCopier(nn.Module):
    """Makes every token as many streams as the budget says, of log score 0 (method: Controls).

    `copy` repeats the token's residual. `pause` leaves it leftmost and lets learned vectors follow it, one a place;
    the last of them is the root.

    Args:
        hidden_size: of a residual, D.
        vectors: how many are learned; None where residuals are repeated.
        dropout: of the vectors.
    """

    def __init__(self, hidden_size: int, vectors: int | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.pause_embeddings = None if vectors is None else nn.Embedding(vectors, hidden_size)

    def forward(self, streams: Streams, copies: int) -> Streams:
        """Streams [B, N] of one stream a token to `copies` of each."""
        token, alive, log_score = (
            values.repeat_interleave(copies, dim=1) for values in (streams.token, streams.alive, streams.log_score)
        )
        slot = torch.arange(token.shape[1], device=token.device)
        # As a gate would name them: the root is a keep, the others are forks.
        origin = slot // copies * 2 + (slot % copies == copies - 1)
        return replace(
            streams,
            residual=torch.where(alive[..., None], self._residuals(streams.residual, copies), 0),
            log_score=log_score,
            token=token,
            alive=alive,
            origin=torch.where(alive, origin, -1),
        )

    def _residuals(self, residual: Tensor, copies: int) -> Tensor:
        if self.pause_embeddings is None:
            return residual.repeat_interleave(copies, dim=1)
        pauses = self.pause_embeddings(torch.arange(copies - 1, device=residual.device)).to(residual.dtype)
        each = self.dropout(pauses.expand(*residual.shape[:2], -1, -1))
        return torch.cat([residual[:, :, None], each], dim=2).flatten(1, 2)
