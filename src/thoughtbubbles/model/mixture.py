"""The merge `probability`: the streams of a token predict together, by the mixture of their distributions (eq. 11).

Shape letters: B batch, N streams, K columns, D hidden size, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .loss import IGNORE_INDEX, ROWS, Bubbles
from .streams import ColumnMap, Streams


@dataclass(frozen=True)
class Mixture:
    """The streams that predict what follows some columns.

    Attributes:
        streams: theirs, or those of all tokens; normed.
        place: [B, K] the token of each column, as the streams name it; padding has some other column's.
        weighted: whether the weights are p / sum p; else they are equal.
        widest: the most streams of a token.
    """

    streams: Streams
    place: Tensor
    weighted: bool
    widest: int

    @classmethod
    def of(
        cls, streams: Streams, columns: ColumnMap | None, keep: slice | Tensor, weighted: bool, widest: int
    ) -> "Mixture":
        """Of the columns `keep` alone, whose streams are taken out where they may be fewer than all."""
        everywhere = torch.arange(streams.num_tokens, device=streams.token.device).expand(len(streams.token), -1)
        place = (everywhere if columns is None else columns.ordinal)[:, keep]
        if place.shape[1] * widest < streams.token.shape[1]:
            streams, place = streams.of_tokens(place, widest)
        return cls(streams, place, weighted, widest)

    @property
    def log_score(self) -> Tensor:
        """[B, N]: the weights of a token's streams are proportional to their exponentials."""
        return self.streams.log_score if self.weighted else torch.zeros_like(self.streams.log_score)

    def bubbles(self) -> Bubbles:
        """As the loss in chunks wants them."""
        return Bubbles(self.log_score, self.streams.begins(), self.widest)

    def targets(self, of_columns: Tensor) -> Tensor:
        """The targets [B, K] of the columns as those [B, N] of the streams."""
        # Padding, which has no target, may stand for a token that has one.
        of_tokens = self._tokens(of_columns).fill_(IGNORE_INDEX).scatter_reduce(1, self.place, of_columns, "amax")
        return of_tokens.gather(1, self.streams.token)

    def of_columns(self, values: Tensor) -> Tensor:
        """[B, K] the sum of `values` [B, N] over the streams of each column's token."""
        return self._tokens(values).scatter_add(1, self.streams.token, values).gather(1, self.place)

    def _tokens(self, values: Tensor) -> Tensor:
        return values.new_zeros(len(values), self.streams.num_tokens + 1)

    def log_probs(self, decode: Callable[[Tensor], Tensor]) -> Tensor:
        """[B, K, V] the log of each column's distribution; of a column without streams something finite.

        Args:
            decode: [1, N, D] to logits [1, N, V].

        Logits of more than one row are never held together, but where there are few: the backward pass forms them anew.
        """
        streams = self.streams

        def mix(residual: Tensor, log_score: Tensor, token: Tensor, place: Tensor) -> Tensor:
            row = Streams(residual, log_score, token, token < streams.num_tokens, streams.num_tokens)
            mixed = row.mix_log_probs(decode(residual).to(log_score.dtype).log_softmax(-1), weighted=True)
            return mixed.gather(1, place[..., None].expand(-1, -1, mixed.shape[-1]))

        parts = (streams.residual, self.log_score, streams.token, self.place)
        if streams.token.numel() <= ROWS:
            return mix(*parts)
        rows = zip(*(each.split(1) for each in parts), strict=True)
        return torch.cat([checkpoint(mix, *row, use_reentrant=False, preserve_rng_state=False) for row in rows])
