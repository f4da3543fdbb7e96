"""What a cache remembers of past tokens: tensors whose rows grow, each to its own length (method: Cache).

Shape letters: B batch, S kept entries of a row, M new candidates.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

BLOCK = 128
"""Entries by which a row's memory grows."""


class RowBuffer:
    """Tensors [B, ..., S, ...] whose rows have their own lengths along one dimension, grown in blocks.

    Entries past a row's length are finite and mean nothing.
    """

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self.data: Tensor | None = None

    def write(self, values: Tensor, starts: list[int]) -> None:
        """Lay `values` [B, ..., n, ...] into each row from its start on."""
        count, end = values.shape[self.dim], max(starts) + values.shape[self.dim]
        data = self._with_room(values, end)
        if min(starts) == max(starts):
            data.narrow(self.dim, starts[0], count).copy_(values)
            return
        shape = [1] * values.dim()
        shape[0] = len(starts)
        begin = torch.tensor(starts, device=values.device).view(shape)
        shape[0], shape[self.dim] = 1, count
        index = begin + torch.arange(count, device=values.device).view(shape)
        data.scatter_(self.dim, index.expand_as(values), values)

    def read(self, width: int) -> Tensor:
        """The first `width` entries of every row."""
        assert self.data is not None
        return self.data.narrow(self.dim, 0, width)

    def select_rows(self, index: Tensor) -> None:
        """Keep the rows at `index`, in that order, repeated where it repeats."""
        if self.data is not None:
            self.data = self.data.index_select(0, index.to(self.data.device))

    def _with_room(self, values: Tensor, entries: int) -> Tensor:
        held = 0 if self.data is None else self.data.shape[self.dim]
        if entries > held:
            shape = list(values.shape)
            shape[self.dim] = -(-entries // BLOCK) * BLOCK - held
            room = values.new_zeros(shape)
            self.data = room if self.data is None else torch.cat([self.data, room], self.dim)
        assert self.data is not None
        return self.data


class RowMemory:
    """Buffers that share the lengths of their rows, one of them the ordinals of the entries' tokens."""

    def __init__(self, token: RowBuffer, *others: RowBuffer) -> None:
        self.token = token
        self.buffers = (token, *others)
        self.lengths: list[int] = []

    def crop(self, tokens: Tensor) -> None:
        """Forget the entries of ordinals from `tokens` [B] on; ordinals do not decrease along a row."""
        if any(self.lengths):
            ordinals = self.token.read(max(self.lengths))
            self.lengths = ((ordinals < tokens[:, None]) & _valid(self.lengths, ordinals)).sum(1).tolist()

    def select_rows(self, index: Tensor) -> None:
        """As `RowBuffer.select_rows`."""
        for buffer in self.buffers:
            buffer.select_rows(index)
        self.lengths = [self.lengths[row] for row in index.tolist()] if self.lengths else []


class RouteMemory(RowMemory, ABC):
    """What a fork layer must remember of the past to route what follows; each router has one that it fills."""

    def __init__(self, *others: RowBuffer) -> None:
        super().__init__(RowBuffer(1), *others)

    def width(self, survive: Tensor) -> int:
        """How many streams to make room for, of the survivors [B, M] of a pass: those of the fullest row."""
        return max(int(survive.sum(1).max()), 1)

    @staticmethod
    @abstractmethod
    def planned_bytes(optional: int, admitted: int) -> int:
        """Bytes for so many optional candidates of a row, some of them admitted."""


class ForkMemory(RouteMemory):
    """The optional candidates so far, and which of them were admitted."""

    @staticmethod
    def planned_bytes(optional: int, admitted: int) -> int:
        """Of each optional candidate its score, its ordinal, and whether it was admitted."""
        return optional * (4 + 8 + 1)

    def __init__(self) -> None:
        self.scores, self.admitted = RowBuffer(1), RowBuffer(1)
        super().__init__(self.scores, self.admitted)

    @property
    def past_scores(self) -> Tensor | None:
        """[B, S] log scores of the past optional candidates, -inf past a row's end; None if there are none."""
        if not any(self.lengths):
            return None
        scores = self.scores.read(max(self.lengths))
        return scores.masked_fill(~_valid(self.lengths, scores), -torch.inf)

    @property
    def past_admitted(self) -> Tensor | None:
        """[B] how many of them were admitted; None if there are none."""
        if not any(self.lengths):
            return None
        admitted = self.admitted.read(max(self.lengths))
        return (admitted & _valid(self.lengths, admitted)).sum(1)

    def append(self, scores: Tensor, token: Tensor, admitted: Tensor, optional: Tensor) -> None:
        """Keep the optional ones of new candidates [B, M], `token` their ordinals in the whole row."""
        counts: list[int] = optional.sum(1).tolist()
        width = max(counts)
        starts = self.lengths or [0] * len(counts)
        if width:
            order = torch.argsort(~optional, dim=1, stable=True)[:, :width]
            for buffer, values in ((self.scores, scores), (self.token, token), (self.admitted, admitted)):
                buffer.write(values.gather(1, order), starts)
        self.lengths = [start + count for start, count in zip(starts, counts, strict=True)]


class CreditMemory(RouteMemory):
    """The ordinals of what was admitted, and no scores: enough where a threshold chooses."""

    @staticmethod
    def planned_bytes(optional: int, admitted: int) -> int:
        """Of each that was admitted its ordinal."""
        return admitted * 8

    @property
    def past_admitted(self) -> Tensor | None:
        """[B] how many optional candidates were admitted; None if there are none."""
        ordinals = self.token.data
        return torch.tensor(self.lengths, device=ordinals.device) if ordinals is not None and self.lengths else None

    def append(self, token: Tensor, admitted: Tensor) -> None:
        """Keep the ordinals `token` of the new candidates [B, M] that were admitted."""
        counts: list[int] = admitted.sum(1).tolist()
        starts = self.lengths or [0] * len(counts)
        if width := max(counts):
            order = torch.argsort(~admitted, dim=1, stable=True)[:, :width]
            self.token.write(token.gather(1, order), starts)
        self.lengths = [start + count for start, count in zip(starts, counts, strict=True)]


def _valid(lengths: list[int], values: Tensor) -> Tensor:
    """[B, S] bool: the entries before each row's end."""
    ends = torch.tensor(lengths, device=values.device)[:, None]
    return torch.arange(values.shape[1], device=values.device) < ends
