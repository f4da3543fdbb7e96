"""A cache whose shapes never change, so that one decoding step is a graph (method: Cache).

It holds what a `StreamCache` does, in tensors made once for so many rows of so many tokens. Rows have their own
budgets, and can be emptied and filled again one by one. How full they are the device knows alone; the host knows how
many tokens each was given, from which follows how many streams there are at most.

Shape letters: B batch, S kept streams or candidates of a row, N new streams, M new candidates, G heads of keys.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from .budget import Budget, RowBudgets, floor_times, parse_budget
from .cache import Placement, StreamCache
from .configuration import ThoughtbubblesConfig
from .memory import CreditMemory, ForkMemory, RouteMemory

__all__ = ["StaticStreamCache"]

SHORTEST = 64
"""Tokens of the shortest context that a step has a graph of its own for; longer ones double."""


class Frame:
    """What the memories of a static cache know of a pass without asking the device.

    Attributes:
        tokens: of each row, at most.
        first: whether no row held any before the pass.
        reach: tokens of the fullest row after it, at most, rounded up to what there is a graph for.
        steps: whether the pass is a single token of every row, whose widths may not depend on what it holds.
        longest: tokens of a row.
        most: the greatest budget that a row may have.
        fixed: whether steps are as wide as they can be, so that nothing has to be looked up.
    """

    def __init__(self, rows: int, longest: int, most: Fraction, fixed: bool) -> None:
        self.tokens = [0] * rows
        self.longest, self.most, self.fixed = longest, most, fixed
        self.first, self.reach, self.steps = True, longest, False

    def begin(self, new: int) -> None:
        """A pass of so many columns."""
        self.first, self.steps = not any(self.tokens), new == 1
        self.tokens = [tokens + new for tokens in self.tokens]
        self.reach = self.rounded(max(self.tokens))

    def step(self, active: Sequence[bool]) -> None:
        """A pass of one token of every row that is active, whatever they hold."""
        self.first, self.steps = False, True
        self.tokens = [tokens + is_active for tokens, is_active in zip(self.tokens, active, strict=True)]
        self.reach = self.rounded(max(self.tokens))

    def rounded(self, tokens: int) -> int:
        """The tokens that a pass makes room for which reaches so many."""
        return min(max(SHORTEST, 1 << (tokens - 1).bit_length()), self.longest)

    def streams(self, tokens: int, forks: int) -> int:
        """The most streams that so many tokens can have after so many fork layers."""
        return min((1 << forks) * tokens, floor_times(self.most, tokens))

    def optional(self, tokens: int, forks: int) -> int:
        """The most optional candidates that they can bring to the fork layer after so many others."""
        return 2 * self.streams(tokens, forks) - tokens

    def width(self, survive: Tensor) -> int | None:
        """The most survivors of candidates [B, M] of a step; None where they are looked up."""
        is_known = self.steps and self.fixed
        return min(survive.shape[1], 1 + floor_times(self.most - 1, self.longest)) if is_known else None


@dataclass(frozen=True)
class StaticPlacement(Placement):
    """As `Placement`, with where the new streams go as flat indices into rows and slots.

    Attributes:
        index: [B N] int64.
        width: streams of a row that are attended to.
    """

    index: Tensor
    width: int


class StreamLengths:
    """Streams of each row [B] between two fork layers, of at most `capacity`; one more slot takes what is dead."""

    def __init__(self, frame: Frame, forks: int, length: Tensor) -> None:
        self.frame, self.forks, self.length = frame, forks, length
        self.capacity = frame.streams(frame.longest, forks)

    def place(self, token: Tensor, alive: Tensor) -> StaticPlacement:
        """How a pass of new streams [B, N] meets what is kept, which grows by them."""
        rows, new = alive.shape
        ends = self.length[:, None] + torch.arange(new, device=alive.device)
        base = torch.arange(rows, device=alive.device)[:, None] * (self.capacity + 1)
        index = (base + ends.clamp(max=self.capacity)).flatten()
        self.length.add_(alive.sum(1))
        if self.frame.first:
            return StaticPlacement(token, [], None, True, index, new)
        width = self.frame.streams(self.frame.reach, self.forks)
        mask = torch.arange(width, device=alive.device) <= ends[..., None]
        return StaticPlacement(token, [], mask[:, None], False, index, width)


class StaticAttentionMemory:
    """Keys and values [B, S, G, K] of one attention layer, made when the first come; layers may share their lengths."""

    def __init__(self, lengths: StreamLengths) -> None:
        self.lengths = lengths
        self.data: list[Tensor] = []

    def place(self, token: Tensor, alive: Tensor) -> Placement:
        """As `AttentionMemory.place`, once for all that share their lengths."""
        return self.lengths.place(token, alive)

    def append(self, keys: Tensor, values: Tensor, placement: Placement) -> tuple[Tensor, Tensor]:
        """As `AttentionMemory.append`; where nothing was kept before, the new streams are all."""
        assert isinstance(placement, StaticPlacement)
        self.make(keys, values)
        for data, new in zip(self.data, (keys, values), strict=True):
            data.flatten(0, 1).index_copy_(0, placement.index, new.transpose(1, 2).flatten(0, 1))
        if placement.is_causal:
            return keys, values
        found = [data[:, : placement.width].transpose(1, 2) for data in self.data]
        return found[0], found[1]

    def part(self, lengths: StreamLengths, rows: slice) -> "StaticAttentionMemory":
        """Some rows, in the same memory, with their lengths."""
        part = StaticAttentionMemory(lengths)
        part.data = [data[rows] for data in self.data]
        return part

    def make(self, *like: Tensor) -> None:
        """Make room for keys and values like these [.., G, N, K], if there is none."""
        if not self.data:
            with torch.inference_mode(False):
                self.data = [x.new_zeros(len(x), self.lengths.capacity + 1, x.shape[1], x.shape[3]) for x in like]


class StaticRouteMemory(RouteMemory):
    """What the memories of fork layers share: of each row [B] how many optional candidates were admitted."""

    def __init__(self, frame: Frame, forks: int, rows: int, device: torch.device | str) -> None:
        self.frame, self.forks = frame, forks
        self.used = torch.zeros(rows, dtype=torch.int64, device=device)

    @property
    def past_admitted(self) -> Tensor:
        """[B]."""
        return self.used.clone()

    def width(self, survive: Tensor) -> int:
        """Of a step the widest there can be."""
        fixed = self.frame.width(survive)
        return super().width(survive) if fixed is None else fixed

    def tensors(self) -> list[Tensor]:
        """All that is kept, rows first."""
        return [self.used]

    def part(self, frame: Frame, rows: slice) -> "StaticRouteMemory":
        """Some rows, in the same memory."""
        part = copy.copy(self)
        part.frame, part.used = frame, self.used[rows]
        return part

    def clear(self, rows: slice) -> None:
        """Forget some rows."""
        self.used[rows] = 0


class StaticCreditMemory(StaticRouteMemory):
    """As `CreditMemory`."""

    planned_bytes = staticmethod(CreditMemory.planned_bytes)

    def append(self, token: Tensor, admitted: Tensor) -> None:
        """As that of a growing memory; `admitted` [B, M]."""
        self.used.add_(admitted.sum(1))


class StaticForkMemory(StaticRouteMemory):
    """As `ForkMemory`: the scores [B, S] of the optional candidates so far, -inf past a row's, and their number."""

    planned_bytes = staticmethod(ForkMemory.planned_bytes)

    def __init__(self, frame: Frame, forks: int, rows: int, device: torch.device | str) -> None:
        super().__init__(frame, forks, rows, device)
        self.count = torch.zeros_like(self.used)
        self.scores: Tensor | None = None

    @property
    def past_scores(self) -> Tensor | None:
        """[B, S] of what a pass reaches; None if there are none."""
        if self.frame.first or self.scores is None:
            return None
        return self.scores[:, : self.frame.optional(self.frame.reach, self.forks)]

    def append(self, scores: Tensor, token: Tensor, admitted: Tensor, optional: Tensor) -> None:
        """As that of a growing memory; one more place takes what has none."""
        if self.scores is None:
            places = self.frame.optional(self.frame.longest, self.forks) + 1
            with torch.inference_mode(False):
                self.scores = torch.full((len(scores), places), -torch.inf, dtype=scores.dtype, device=scores.device)
        order = torch.argsort(~optional, dim=1, stable=True)
        packed = scores.masked_fill(~optional, -torch.inf).gather(1, order)
        place = self.count[:, None] + torch.arange(order.shape[1], device=scores.device)
        self.scores.scatter_(1, place.clamp(max=self.scores.shape[1] - 1), packed)
        self.count.add_(optional.sum(1))
        self.used.add_((admitted & optional).sum(1))

    def tensors(self) -> list[Tensor]:
        """All that is kept, rows first."""
        return [self.used, self.count, *([] if self.scores is None else [self.scores])]

    def part(self, frame: Frame, rows: slice) -> "StaticForkMemory":
        """Some rows, in the same memory."""
        part = super().part(frame, rows)
        assert isinstance(part, StaticForkMemory)
        part.count, part.scores = self.count[rows], None if self.scores is None else self.scores[rows]
        return part

    def clear(self, rows: slice) -> None:
        """Forget some rows."""
        super().clear(rows)
        self.count[rows] = 0
        if self.scores is not None:
            self.scores[rows] = -torch.inf


STATIC: dict[type[RouteMemory], type[StaticRouteMemory]] = {
    ForkMemory: StaticForkMemory,
    CreditMemory: StaticCreditMemory,
}
"""What takes the place of a growing memory."""


class StaticStreamCache(StreamCache):
    """A `StreamCache` of fixed shapes: so many rows of at most so many tokens.

    Rows may have their own budgets, and can be emptied and filled again one by one. It forgets whole rows alone, so
    that nothing can be cropped.

    Args:
        rows: of the batch.
        longest: tokens of a row, padding included.
        most: the greatest budget that a row may have.
        device: that of the model.
        fixed: whether a step, too, has the same shapes whatever it holds, as a graph needs; None is on other devices
            than a processor, which looks up faster how wide a step is than it computes slots that stay empty.
    """

    is_croppable = False
    graph: Any = None
    """What `forward` takes a step of all rows by, in place of computing it."""

    def __init__(
        self,
        rows: int,
        longest: int,
        most: Budget,
        device: torch.device | str = "cpu",
        fixed: bool | None = None,
    ) -> None:
        self.rows, self.longest, self.most = rows, longest, parse_budget(most)
        self.device = torch.device(device)
        self.fixed = self.device.type != "cpu" if fixed is None else fixed
        super().__init__()

    def reset(self) -> None:
        """Forget everything, the budget included."""
        super().reset()
        self.frame = Frame(self.rows, self.longest, self.most, self.fixed)
        self.seen = torch.zeros(self.rows, dtype=torch.int64, device=self.device)

    def _open(self, config: ThoughtbubblesConfig) -> None:
        frame, rule, gated = self.frame, config.rule, config.gated_layers
        if gated and rule.memory not in STATIC:
            raise ValueError(f"routing {rule.name}: expected a rule that a static cache remembers for")
        for layer in range(config.depth):
            # Copies come all at once.
            forks = sum(fork <= layer for fork in gated) + 10 * any(copied <= layer for copied in config.copied_layers)
            if layer in (0, *gated, *config.copied_layers):
                lengths = StreamLengths(frame, forks, torch.zeros_like(self.seen))
            self.attention.append(StaticAttentionMemory(lengths))
        for forks, layer in enumerate(gated):
            self.forks[layer] = STATIC[rule.memory](frame, forks, self.rows, self.device)
            if config.fork_content == "attended":
                self.attended[layer] = StaticAttentionMemory(StreamLengths(frame, forks, torch.zeros_like(self.seen)))

    def begin(self, config: ThoughtbubblesConfig, budget: Fraction | RowBudgets, batch: int) -> None:
        """As that of a growing cache.

        Raises:
            ValueError: as there; for a greater budget than there is room for.
        """
        given = budget.exact if isinstance(budget, RowBudgets) else [budget]
        self._check_room(max(given))
        if batch != self.rows:
            raise ValueError(f"batch of {batch} rows: expected {self.rows}, those of the cache")
        super().begin(config, budget, batch)

    def _check_room(self, budget: Fraction) -> None:
        if budget > self.most:
            raise ValueError(f"budget={budget}: expected at most {self.most}, for which the cache has room")

    @property
    def tokens(self) -> Tensor | None:
        """[B] real tokens so far; None where no row has any."""
        return self.seen.clone() if any(self.frame.tokens) else None

    def see(self, real: Tensor) -> None:
        """Note the columns [B, q] of a pass, True at real tokens.

        Raises:
            ValueError: for more than there is room for.
        """
        columns = max(self.frame.tokens) + real.shape[1]
        if columns > self.longest:
            raise ValueError(f"{columns} tokens: expected at most {self.longest}, for which the cache has room")
        self.frame.begin(real.shape[1])
        self.seen.add_(real.sum(1))

    def step(self, active: Sequence[bool]) -> None:
        """Get ready for a pass of one token of every row that is active.

        Raises:
            ValueError: for a row that is full.
        """
        full = [row for row, is_active in enumerate(active) if is_active and self.frame.tokens[row] >= self.longest]
        if full:
            raise ValueError(f"rows {full}: expected fewer than {self.longest} tokens in each, for which there is room")
        self.frame.step(active)

    def takes_step_of(self, input_ids: Tensor, attention_mask: Tensor | None) -> bool:
        """Whether a pass over these ids, if it may be, is a step that there is a graph for."""
        if self.graph is None or not self.is_initialized or input_ids.shape != (self.rows, 1):
            return False
        return attention_mask is None or attention_mask.shape == (self.rows, self.get_seq_length() + 1)

    def take_step(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Logits [B, 1, V] of a step of all rows, by its graph; the mask's last column says which tokens are real."""
        alive = None if attention_mask is None else attention_mask[:, -1] != 0
        logits: Tensor = self.graph(input_ids[:, 0], [True] * self.rows, alive)
        return logits[:, None].clone()

    @contextmanager
    def reaching(self, tokens: int) -> Iterator[None]:
        """Steps inside make room for so many tokens, whatever the rows hold."""
        frame = self.frame
        kept = frame.first, frame.reach, frame.steps
        frame.first, frame.reach, frame.steps = False, tokens, True
        yield
        frame.first, frame.reach, frame.steps = kept

    def advance(self, alive: Tensor) -> Tensor:
        """[B, 1] real tokens so far; those that a step adds [B, 1] are noted."""
        before = self.seen[:, None].clone()
        self.seen.add_(alive[:, 0])
        return before

    @contextmanager
    def row(self, row: int) -> Iterator["StaticStreamCache"]:
        """A row as a cache of its own, in the same memory, which all rows must have had a token of before."""
        at, part = slice(row, row + 1), copy.copy(self)
        part.rows, part.seen = 1, self.seen[at]
        part.frame = Frame(1, self.longest, self.most, self.fixed)
        part.frame.tokens = [self.frame.tokens[row]]
        lengths = {each: StreamLengths(part.frame, each.forks, each.length[at]) for each in self._lengths()}
        part.attention = [memory.part(lengths[memory.lengths], at) for memory in self.attention]
        part.attended = {layer: memory.part(lengths[memory.lengths], at) for layer, memory in self.attended.items()}
        part.forks = {layer: memory.part(part.frame, at) for layer, memory in self.forks.items()}
        if isinstance(self.budget, RowBudgets):
            part.budget = self.budget.part(row)
        yield part
        self.frame.tokens[row] = part.frame.tokens[0]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns so far: tokens of the fullest row, padding included."""
        return max(self.frame.tokens)

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """Tokens of a row."""
        return self.longest

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Tokens of a row."""
        return self.longest

    def crop(self, tokens_to_remove: int) -> None:
        """Not possible.

        Raises:
            ValueError: unless nothing is to be removed.
        """
        if tokens_to_remove:
            raise ValueError(f"tokens_to_remove={tokens_to_remove}: a static cache cannot be cropped; expected another")

    def clear(self, row: int, budget: Budget | None = None) -> None:
        """Forget a row, and give it another budget where one is named; the model's rule must let rows have their own.

        Raises:
            ValueError: for a greater budget than there is room for.
        """
        at = slice(row, row + 1)
        if budget is not None:
            self._check_room(exact := parse_budget(budget))
            if not isinstance(self.budget, RowBudgets):
                self.budget = RowBudgets([self.budget or exact] * self.rows, self.device)
            self.budget.set(row, exact)
        self.frame.tokens[row] = 0
        self.seen[at] = 0
        for lengths in self._lengths():
            lengths.length[at] = 0
        for memory in self.forks.values():
            memory.clear(at)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Put the rows at `indices`, as many as there are, in that order.

        Raises:
            ValueError: for another number of rows.
        """
        if len(indices) != self.rows:
            raise ValueError(f"{len(indices)} rows: expected {self.rows}, those of the cache")
        order = indices.tolist()
        self.frame.tokens = [self.frame.tokens[row] for row in order]
        if isinstance(self.budget, RowBudgets):
            self.budget = self.budget.select(order)
        for tensor in self._tensors():
            tensor.copy_(tensor.index_select(0, indices.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Not possible: rows are made once.

        Raises:
            ValueError: for more than one.
        """
        self.batch_select_indices(torch.arange(self.rows).repeat_interleave(repeats))

    def _lengths(self) -> list[StreamLengths]:
        """Those that memories share, once each."""
        return list(dict.fromkeys(memory.lengths for memory in (*self.attention, *self.attended.values())))

    def _tensors(self) -> list[Tensor]:
        """All that is kept, rows first."""
        kept = [self.seen, *(lengths.length for lengths in self._lengths())]
        kept += [data for memory in (*self.attention, *self.attended.values()) for data in memory.data]
        return kept + [tensor for memory in self.forks.values() for tensor in memory.tensors()]

    @property
    def is_initialized(self) -> bool:
        """Whether a row holds anything."""
        return any(self.frame.tokens)

    @property
    def batch_size(self) -> int:
        """Rows."""
        return self.rows

    @property
    def nbytes(self) -> int:
        """Bytes of memory held."""
        return sum(tensor.nbytes for tensor in self._tensors())
