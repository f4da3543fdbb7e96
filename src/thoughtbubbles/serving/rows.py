"""Rows of a batch that are filled, decoded and emptied independently: what the engine asks of a model."""

from collections.abc import Sequence
from fractions import Fraction
from typing import Protocol

import torch
from torch import Tensor

from thoughtbubbles.model.cache import StreamCache
from thoughtbubbles.model.modeling import ThoughtbubblesForCausalLM


class DecodingRows(Protocol):
    """Rows of a batch, each with its own tokens and its own budget.

    A slot is filled by `begin`, given a prompt by one or more calls of `read`, continued by `step`, and emptied by
    `end`. What a row gives does not depend on the other rows.

    Attributes:
        slots: how many rows there are.
        longest: tokens of a row, prompt and answer together.
    """

    slots: int
    longest: int

    def begin(self, slot: int, budget: Fraction) -> None:
        """Make an empty slot ready for a row.

        Args:
            slot: from 0 on.
            budget: streams per token of this row.
        """

    def read(self, slot: int, ids: Sequence[int], every: bool = False) -> Tensor:
        """More of a row's prompt.

        Args:
            slot: a row that was begun.
            ids: n token ids, at least one.
            every: whether to give the logits after every token.

        Returns:
            Logits [V] after the last token, or with `every` [n, V]; `log_softmax` makes log-probabilities of them.
        """

    def step(self, tokens: Tensor, active: Sequence[bool]) -> Tensor:
        """One token more of every active row.

        Args:
            tokens: [slots] int64, on the model's device or not; those of other rows mean nothing.
            active: of each slot, whether its row goes on. The others stay as they are.

        Returns:
            Logits [slots, V]; those of other rows mean nothing.
        """

    def end(self, slot: int) -> None:
        """Forget a row; its slot is empty again."""

    def streams(self, slot: int) -> int:
        """Streams alive after the last layer, over all tokens of a row so far; 0 for an empty slot."""


class GrowingRows:
    """`DecodingRows` with a growing cache each: a forward a row, exact and plain.

    Args:
        model: in evaluation mode.
        slots: rows.
    """

    def __init__(self, model: ThoughtbubblesForCausalLM, slots: int) -> None:
        self.slots = slots
        self.longest = int(model.config.max_position_embeddings)
        self._model = model
        self._caches: list[StreamCache | None] = [None] * slots
        self._budgets: list[Fraction | None] = [None] * slots
        self._streams = [0] * slots

    def begin(self, slot: int, budget: Fraction) -> None:
        """Make an empty slot ready for a row."""
        self._caches[slot], self._budgets[slot], self._streams[slot] = StreamCache(), budget, 0

    def read(self, slot: int, ids: Sequence[int], every: bool = False) -> Tensor:
        """More of a row's prompt: logits [V], or [n, V]."""
        logits = self._pass(slot, torch.tensor([list(ids)], device=self._model.device), 0 if every else 1)
        return logits if every else logits[-1]

    def step(self, tokens: Tensor, active: Sequence[bool]) -> Tensor:
        """One token more of every active row: logits [slots, V]."""
        tokens = tokens.to(self._model.device)
        out = tokens.new_zeros((self.slots, self._model.config.vocab_size), dtype=self._model.dtype)
        for slot in (slot for slot, goes_on in enumerate(active) if goes_on):
            logits = self._pass(slot, tokens[slot].view(1, 1), 1)[-1]
            out = out.to(logits.dtype)
            out[slot] = logits
        return out

    def end(self, slot: int) -> None:
        """Forget a row."""
        self._caches[slot], self._budgets[slot], self._streams[slot] = None, None, 0

    def streams(self, slot: int) -> int:
        """Streams alive after the last layer, over all tokens of a row so far."""
        return self._streams[slot]

    @torch.inference_mode()
    def _pass(self, slot: int, ids: Tensor, keep: int) -> Tensor:
        """The logits [n, V] of the last `keep` of some ids [1, T], or of all."""
        out = self._model(
            ids,
            cache=self._caches[slot],
            budget=self._budgets[slot],
            logits_to_keep=keep,
            output_streams=True,
        )
        assert out.streams is not None
        self._streams[slot] += int(out.streams[-1].alive.sum())
        logits: Tensor = out.logits[0]
        return logits
