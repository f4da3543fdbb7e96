"""Rows of a batch that are filled, decoded and emptied independently: what the engine asks of a model."""

from collections.abc import Sequence
from fractions import Fraction
from typing import Protocol

import torch
from torch import Tensor

from thoughtbubbles.model.budget import RowBudgets
from thoughtbubbles.model.cache import StreamCache
from thoughtbubbles.model.graph import StepGraph
from thoughtbubbles.model.modeling import ThoughtbubblesForCausalLM
from thoughtbubbles.model.static import StaticStreamCache


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

    def begin(self, slot: int, budget: Fraction) -> None:
        """Make an empty slot ready for a row."""
        self._caches[slot], self._budgets[slot] = StreamCache(), budget

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
        self._caches[slot], self._budgets[slot] = None, None

    def streams(self, slot: int) -> int:
        """Streams alive after the last layer, over all tokens of a row so far."""
        cache = self._caches[slot]
        return 0 if cache is None or not cache.is_initialized else sum(cache.attention[-1].lengths)

    @torch.inference_mode()
    def _pass(self, slot: int, ids: Tensor, keep: int) -> Tensor:
        """The logits [n, V] of the last `keep` of some ids [1, T], or of all."""
        out = self._model(
            ids,
            cache=self._caches[slot],
            budget=self._budgets[slot],
            logits_to_keep=keep,
        )
        logits: Tensor = out.logits[0]
        return logits


class StaticRows:
    """`DecodingRows` over one cache of fixed shapes, so that a step is one pass of all rows.

    Args:
        model: in evaluation mode, whose rows may have their own budgets.
        slots: rows.
        most: the greatest budget of a row.
    """

    def __init__(self, model: ThoughtbubblesForCausalLM, slots: int, most: Fraction) -> None:
        self.slots, self.longest = slots, int(model.config.max_position_embeddings)
        self._model, self._cache = model, StaticStreamCache(slots, self.longest, most, model.device)
        self._budgets = RowBudgets([Fraction(1)] * slots, model.device)
        with torch.inference_mode():
            self._cache.begin(model.config, self._budgets, slots)
            self._step = StepGraph(model.advance, self._cache)
            # Makes room for all that is kept.
            self._cache.step([True] * slots)
            alive = torch.ones(slots, 1, dtype=torch.bool, device=model.device)
            model.advance(alive.long() * 0, alive, self._cache)
            for slot in range(slots):
                self._cache.clear(slot)
            if self._step.is_replayed:
                self._step.prepare()

    @torch.inference_mode()
    def begin(self, slot: int, budget: Fraction) -> None:
        """Make an empty slot ready for a row."""
        self._cache.clear(slot, budget)

    @torch.inference_mode()
    def read(self, slot: int, ids: Sequence[int], every: bool = False) -> Tensor:
        """More of a row's prompt: logits [V], or [n, V]."""
        given = torch.tensor([list(ids)], device=self._model.device)
        with self._cache.row(slot) as row:
            out = self._model(given, cache=row, budget=[self._budgets.exact[slot]], logits_to_keep=0 if every else 1)
        logits: Tensor = out.logits[0]
        return logits if every else logits[-1]

    def step(self, tokens: Tensor, active: Sequence[bool]) -> Tensor:
        """One token more of every active row: logits [slots, V], good until the next step."""
        return self._step(tokens, active)

    @torch.inference_mode()
    def end(self, slot: int) -> None:
        """Forget a row."""
        self._cache.clear(slot)

    def streams(self, slot: int) -> int:
        """Streams alive after the last layer, over all tokens of a row so far."""
        return int(self._cache.attention[-1].lengths.length[slot])


def make_rows(model: ThoughtbubblesForCausalLM, slots: int, most: Fraction) -> DecodingRows:
    """Rows of a model at budgets up to `most`: over one cache of fixed shapes where its rule allows."""
    return StaticRows(model, slots, most) if model.config.has_row_budgets else GrowingRows(model, slots)
