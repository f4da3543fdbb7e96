"""The state that flows between layers: residual streams, their positions and their merge.

Shape letters: B batch, T tokens, N streams, D hidden size, V vocabulary.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Streams:
    """Residual streams of a batch, packed left in the order of their tokens (method: State).

    Attributes:
        residual: [B, N, D], zero in dead slots.
        log_score: [B, N] natural log of the cumulative score, <= 0, at least float32, zero in dead slots.
        token: [B, N] int64 ordinal of the stream's token, non-decreasing along a row; `num_tokens` when dead.
        alive: [B, N] bool, a run of True at the left of each row.
        num_tokens: T, the padded length in tokens.
        origin: [B, N] int64, right after a fork layer the candidate that each stream was (2 i for the fork and
            2 i + 1 for the keep of stream i before the layer), -1 in dead slots; None before the first.
        padded: whether slots may be dead. False lets a dense row skip the masking.
        offset: [B, 1] int64, tokens of each row before these, which a cache holds; None if there are none.
    """

    residual: Tensor
    log_score: Tensor
    token: Tensor
    alive: Tensor
    num_tokens: int
    origin: Tensor | None = None
    padded: bool = True
    offset: Tensor | None = None

    @classmethod
    def from_embeddings(
        cls, embeddings: Tensor, alive: Tensor | None = None, offset: Tensor | None = None
    ) -> "Streams":
        """One stream a token, log score 0. embeddings [B, T, D] packed left; alive [B, T], None if all are."""
        batch, length, _ = embeddings.shape
        ordinals = torch.arange(length, device=embeddings.device).expand(batch, length)
        score_type = torch.promote_types(embeddings.dtype, torch.float32)
        log_score = torch.zeros(batch, length, dtype=score_type, device=embeddings.device)
        if alive is None:
            everywhere = torch.ones_like(ordinals, dtype=torch.bool)
            return cls(embeddings, log_score, ordinals, everywhere, length, padded=False, offset=offset)
        residual = torch.where(alive[..., None], embeddings, 0)
        return cls(residual, log_score, torch.where(alive, ordinals, length), alive, length, offset=offset)

    def with_residual(self, residual: Tensor) -> "Streams":
        """The same streams with another residual [B, N, D]."""
        return replace(self, residual=residual)

    @property
    def is_root(self) -> Tensor:
        """[B, N] bool: the rightmost stream of each token."""
        following = torch.cat([self.token[:, 1:], self.token.new_full((len(self.token), 1), self.num_tokens)], dim=1)
        return self.alive & (self.token != following)

    def bubble_sizes(self) -> Tensor:
        """[B, T] int64: streams of each token, 0 for the ordinals that a row lacks."""
        sizes = self.token.new_zeros(len(self.token), self.num_tokens + 1)
        return sizes.scatter_add_(1, self.token, torch.ones_like(self.token))[:, :-1]

    @property
    def ordinal(self) -> Tensor:
        """[B, N] int64: `token`, counted from the start of the whole row."""
        return self.token if self.offset is None else self.token + self.offset

    def positions(self, origin: int = 0) -> Tensor:
        """[B, N] float positions (method: Positions): the i-th of c streams of ordinal t stands at t - 1 + i / c.

        Or that much further on where the root of a row's first token is to stand at `origin`.
        """
        token = self.token.contiguous()
        first = torch.searchsorted(token, token)
        end = torch.searchsorted(token, token, right=True)
        place = torch.arange(1, token.shape[1] + 1, device=token.device) - first
        return self.ordinal + (origin - 1) + place.to(self.log_score.dtype) / (end - first)

    def roots(self) -> Tensor:
        """[B, T, D]: the residual of each token's root, zero for the ordinals that a row lacks."""
        return self._sum_over_bubbles(torch.where(self.is_root[..., None], self.residual, 0))

    def shares(self) -> Tensor:
        """[B, N]: p / sum of p over the bubble, by logs, since p itself may underflow; in dead slots no matter what."""
        total = self._logsumexp(self.log_score[..., None])[..., 0].gather(1, self.token)
        return (self.log_score - total).exp()

    def merge_residuals(self, weights: Tensor | None = None) -> Tensor:
        """[B, T, D]: the sum over each bubble of weights [B, N] times x, or of x alone (method: Merge)."""
        if weights is None:
            return self._sum_over_bubbles(self.residual)
        return self._sum_over_bubbles(self.residual * weights[..., None].to(self.residual.dtype))

    def begins(self) -> Tensor:
        """[B, N] bool: the leftmost stream of each bubble; a run of dead slots counts as one."""
        before = torch.cat([self.token.new_full((len(self.token), 1), -1), self.token[:, :-1]], dim=1)
        return self.token != before

    def of_tokens(self, tokens: Tensor, widest: int) -> tuple["Streams", Tensor]:
        """The streams of some tokens alone, packed left, at most `widest` of each.

        Args:
            tokens: [B, K] ordinals in any order, some of them perhaps more than once.
            widest: the most streams that a bubble can have.

        Returns:
            Streams of K tokens, of which the last are missing where ordinals repeat, and [B, K] the ordinals among
            them that `tokens` have now.
        """
        batch, count = tokens.shape
        asked = self.alive.new_zeros(batch, self.num_tokens + 1).scatter(1, tokens, True)
        ordinal = asked.cumsum(1) - 1
        chosen = asked.gather(1, self.token) & self.alive
        order = torch.argsort(~chosen, dim=1, stable=True)[:, : count * widest]
        alive = chosen.gather(1, order)
        token = ordinal.gather(1, self.token.gather(1, order))
        residual = self.residual.gather(1, order[..., None].expand(-1, -1, self.residual.shape[-1]))
        streams = Streams(
            residual=torch.where(alive[..., None], residual, 0),
            log_score=torch.where(alive, self.log_score.gather(1, order), 0),
            token=torch.where(alive, token, count),
            alive=alive,
            num_tokens=count,
        )
        return streams, ordinal.gather(1, tokens)

    def mix_log_probs(self, log_probs: Tensor, weighted: bool) -> Tensor:
        """[B, T, V]: log of each bubble's mixture of distributions, weights p / sum p (paper eq. 11).

        log_probs [B, N, V] are the streams' log distributions; the result holds zeros for ordinals that a
        row lacks. Needs memory for N V numbers.
        """
        scores = self.log_score if weighted else torch.zeros_like(self.log_score)
        joint = log_probs + (scores - self._logsumexp(scores[..., None])[..., 0].gather(1, self.token))[..., None]
        return self._logsumexp(joint)[:, :-1]

    def _logsumexp(self, values: Tensor) -> Tensor:
        """[B, N, C] -> [B, T + 1, C], over the streams of each token; the last place gathers dead slots."""
        index = self.token[..., None].expand_as(values)
        shape = (len(values), self.num_tokens + 1, values.shape[-1])
        top = values.new_zeros(shape).scatter_reduce(1, index, values.detach(), "amax", include_self=False)
        sums = values.new_zeros(shape).scatter_add(1, index, (values - top.gather(1, index)).exp())
        return torch.where(sums > 0, sums, 1).log() + top

    def _sum_over_bubbles(self, values: Tensor) -> Tensor:
        """[B, N, D] -> [B, T, D]; dead slots fall into a place that is cut off."""
        if self.origin is None:
            return values  # nothing was forked yet: slots are tokens
        batch, _, width = values.shape
        places = self.num_tokens + 1
        row = torch.arange(batch, device=values.device)[:, None] * places
        sums = values.new_zeros(batch * places, width)
        sums = sums.index_add(0, (self.token + row).flatten(), values.flatten(0, 1))
        return sums.view(batch, places, width)[:, :-1]


@dataclass(frozen=True)
class ColumnMap:
    """Where the real tokens of a row stand among its columns (method: State).

    Attributes:
        column: [B, T] int64, the column of each ordinal; past a row's last token, its padding columns.
        ordinal: [B, T] int64, the ordinal of each real column (0 and up); padding repeats a neighbour's.
        real: [B, T] bool, the columns that hold real tokens.
        alive: [B, T] bool, the ordinals that exist: a run of True at the left.
    """

    column: Tensor
    ordinal: Tensor
    real: Tensor
    alive: Tensor

    @classmethod
    def from_mask(cls, attention_mask: Tensor) -> "ColumnMap":
        """attention_mask [B, T], non-zero at real tokens, which may stand anywhere."""
        real = attention_mask != 0
        count = real.sum(1, keepdim=True)
        return cls(
            column=torch.argsort(~real, dim=1, stable=True),
            ordinal=(real.cumsum(1) - 1).clamp(min=0),
            real=real,
            alive=torch.arange(real.shape[1], device=real.device) < count,
        )

    def compact(self, values: Tensor) -> Tensor:
        """Columns [B, T] or [B, T, D] to ordinals: real tokens to the left in their order."""
        return _take(values, self.column)

    def restore(self, values: Tensor) -> Tensor:
        """Ordinals [B, T] or [B, T, D] to columns; at padding some finite value that means nothing."""
        return _take(values, self.ordinal)


def _take(values: Tensor, index: Tensor) -> Tensor:
    """values[b, index[b, i]] for values [B, T] or [B, T, D]."""
    return values.gather(1, index) if values.dim() == 2 else values.gather(1, index[..., None].expand_as(values))
