"""The cache of exact decoding (method: Cache).

With causal routing nothing about a past token ever changes, so everything that later tokens need of it can be kept:
keys and values of its streams, and at each fork layer the scores that its candidates competed with.

Shape letters: B batch, S kept streams or candidates of a row, N new streams, H heads.
"""

import copy
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import Cache

from .budget import RowBudgets
from .configuration import ThoughtbubblesConfig
from .memory import RowBuffer, RowMemory

__all__ = ["StreamCache"]

# All but what says nothing about the tokens so far; of budgets a call has its own.
_SETTINGS = sorted(
    set(ThoughtbubblesConfig.__annotations__)
    - {"budget", "hidden_dropout", "initializer_range", "max_position_embeddings", "tie_word_embeddings", "vocab_size"}
    - {"bos_token_id", "eos_token_id", "pad_token_id"}
)


@dataclass(frozen=True)
class Placement:
    """Where the new streams of a pass go in the memory of the layers up to the next fork, and what they see.

    Attributes:
        token: [B, N] ordinals of the new streams in the whole row; meaningless where dead.
        counts: new streams of each row, the first so many of its N.
        mask: [B, 1, N, S] bool, what each new stream attends to; None where that is all up to itself (`is_causal`) or
            all there is.
        is_causal: whether the new streams are all there is and see each other left to right.
    """

    token: Tensor
    counts: list[int]
    mask: Tensor | None
    is_causal: bool


class AttentionMemory(Protocol):
    """Keys and values of one attention layer, as they enter the product: rotated, with their scores applied."""

    def place(self, token: Tensor, alive: Tensor) -> Placement:
        """How a pass of new streams [B, N], with the ordinals of their tokens, meets what is kept."""

    def append(self, keys: Tensor, values: Tensor, placement: Placement) -> tuple[Tensor, Tensor]:
        """Keep the new streams' keys and values [B, H, N, K]; return those of all streams [B, H, S, K]."""


class GrowingMemory(RowMemory):
    """An `AttentionMemory` whose rows grow."""

    def __init__(self) -> None:
        self.keys, self.values = RowBuffer(2), RowBuffer(2)
        super().__init__(RowBuffer(1), self.keys, self.values)

    def place(self, token: Tensor, alive: Tensor) -> Placement:
        """As `AttentionMemory.place`."""
        counts: list[int] = alive.sum(1).tolist()
        starts = self.lengths or [0] * len(counts)
        new = token.shape[1]
        if max(starts) == 0:
            return Placement(token, counts, None, is_causal=True)
        if new == 1 and min(starts) == max(starts):
            return Placement(token, counts, None, is_causal=False)
        begin = torch.tensor(starts, device=token.device)[:, None, None]
        reach = begin + torch.arange(1, new + 1, device=token.device)[None, :, None]
        mask = torch.arange(max(starts) + new, device=token.device) < reach
        return Placement(token, counts, mask[:, None], is_causal=False)

    def append(self, keys: Tensor, values: Tensor, placement: Placement) -> tuple[Tensor, Tensor]:
        """As `AttentionMemory.append`."""
        starts = self.lengths or [0] * len(keys)
        self.keys.write(keys, starts)
        self.values.write(values, starts)
        self.token.write(placement.token, starts)
        width = max(starts) + keys.shape[2]
        self.lengths = [start + count for start, count in zip(starts, placement.counts, strict=True)]
        return self.keys.read(width), self.values.read(width)


class StreamCache(Cache):
    """Everything that decoding needs of the tokens so far (method: Cache).

    Pass an empty one as `cache`; `generate` does so by itself. It serves one model at one budget.
    """

    is_compileable = False
    is_croppable = True

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.reset()

    def reset(self) -> None:
        """Forget everything, the budget included."""
        self.budget: Fraction | RowBudgets | None = None
        self.attention: list[Any] = []
        self.forks: dict[int, Any] = {}
        self.attended: dict[int, Any] = {}
        self.real: Tensor | None = None
        self._settings: dict[str, Any] | None = None

    def begin(self, config: ThoughtbubblesConfig, budget: Fraction | RowBudgets, batch: int) -> None:
        """Get ready for a pass of a model.

        Raises:
            ValueError: if the cache was filled by a model of other settings, at another budget or for another batch.
        """
        settings = {name: getattr(config, name) for name in _SETTINGS}
        if self._settings is None:
            self._settings, self.budget = copy.deepcopy(settings), budget
            self._open(config)
        others = [name for name, value in settings.items() if value != self._settings[name]]
        if others:
            filled, now = ({name: of[name] for name in others} for of in (self._settings, settings))
            raise ValueError(f"cache: filled by a model with {filled}, expected {now}")
        if budget != self.budget:
            raise ValueError(f"budget={budget}: expected {self.budget}, with which the cache was filled")
        if self.real is not None and len(self.real) != batch:
            raise ValueError(f"batch of {batch} rows: expected {len(self.real)}, those of the cache")

    def _open(self, config: ThoughtbubblesConfig) -> None:
        """Make the memories of a model's layers."""
        self.attention = [GrowingMemory() for _ in range(config.depth)]
        self.forks = {layer: config.rule.memory() for layer in config.gated_layers}
        if config.fork_content == "attended":
            self.attended = {layer: GrowingMemory() for layer in config.gated_layers}

    @property
    def tokens(self) -> Tensor | None:
        """[B] real tokens so far; None before the first."""
        return None if self.real is None else self.real.sum(1)

    def place(self, layer: int, token: Tensor, alive: Tensor) -> Placement:
        """Where the new streams [B, N] that enter `layer`, the first or one that forks or copies, go up to the next."""
        placement: Placement = self.attention[layer].place(token, alive)
        return placement

    def see(self, real: Tensor) -> None:
        """Note the columns [B, q] of a pass, True at real tokens."""
        self.real = real if self.real is None else torch.cat([self.real, real], dim=1)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns so far: tokens of a row, padding included."""
        return 0 if self.real is None else self.real.shape[1]

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """No bound of its own: -1."""
        return -1

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """No bound of its own: -1."""
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Columns that a pass over `query_length` of them attends to, and the first of them."""
        return self.get_seq_length() + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last columns, as many as the negative of `tokens_to_remove`, which is transformers' convention.

        Raises:
            ValueError: for a positive number, which older versions took for the length to keep.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove={tokens_to_remove}: expected the negative of a number of columns, or 0")
        if self.real is None or tokens_to_remove == 0:
            return
        self.real = self.real[:, : max(self.real.shape[1] + tokens_to_remove, 0)]
        tokens = self.real.sum(1)
        for memory in self._memories():
            memory.crop(tokens)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows `beam_idx` [B], in that order."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row in place."""
        if self.real is not None:
            self.batch_select_indices(torch.arange(len(self.real)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows at `indices`, in that order."""
        if self.real is None:
            return
        self.real = self.real.index_select(0, indices.to(self.real.device))
        if isinstance(self.budget, RowBudgets):
            self.budget = self.budget.select(indices.tolist())
        for memory in self._memories():
            memory.select_rows(indices)

    def _memories(self) -> list[RowMemory]:
        return [*self.attention, *self.forks.values(), *self.attended.values()]

    @property
    def is_initialized(self) -> bool:
        """Whether a pass was made."""
        return self.real is not None

    @property
    def batch_size(self) -> int:
        """Rows, 0 before the first pass."""
        return 0 if self.real is None else len(self.real)

    @property
    def is_sliding(self) -> list[bool]:
        """No layer forgets."""
        return [False] * len(self.attention)

    @property
    def is_linear(self) -> list[bool]:
        """No layer is linear attention; a cache without layers yet must not pass for one of such layers alone."""
        return [False] * max(len(self.attention), 1)

    @property
    def nbytes(self) -> int:
        """Bytes of memory held."""
        buffers = (buffer for memory in self._memories() for buffer in memory.buffers)
        return sum(buffer.data.nbytes for buffer in buffers if buffer.data is not None)

    def __len__(self) -> int:
        return len(self.attention)

    def __repr__(self) -> str:
        return f"StreamCache(columns={self.get_seq_length()}, rows={self.batch_size}, budget={self.budget})"
