"""The engine: one thread that runs a model for many answers at once.

A round reads at most a chunk of the prompts and writes one token of every answer that is being written, so that a long
prompt holds up nobody longer than a chunk. DecodingRows come and go between rounds.
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from thoughtbubbles.serving.choosing import NotFiniteError, TokenChooser, TokenScore, score_tokens
from thoughtbubbles.serving.orders import Failed, Finished, Ticket, Written
from thoughtbubbles.serving.rows import DecodingRows
from thoughtbubbles.serving.writing import AnswerWriter
from thoughtbubbles.support.detokenizer import TokenTable
from thoughtbubbles.support.errors import one_line

CHUNK = 256
"""Tokens of a prompt that are read between two steps of those that write."""
MOST_WAITING = 256
LONGEST_RETRY = 60
"""Seconds after which a client that was turned away is told to come again, at most."""

STOPPING = Failed("the server is stopping: try another", again=True)

logger = logging.getLogger(__name__)


class BusyError(Exception):
    """There is no room for more orders.

    Attributes:
        retry_after: seconds after which there may be.
    """

    def __init__(self, text: str, retry_after: int) -> None:
        super().__init__(text)
        self.retry_after = retry_after


@dataclass
class EngineTotals:
    """What an engine did since it began.

    Attributes:
        finished, cancelled, failed: answers by how they ended.
        prompt_tokens: that were read.
        tokens: that were chosen.
        streams: alive after the last layer, of all tokens that were read.
        steps: of the rows that write.
    """

    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    streams: int = 0
    steps: int = 0


@dataclass(eq=False)
class _Row:
    """An answer in a slot."""

    slot: int
    ticket: Ticket
    writer: AnswerWriter
    began: float
    read: int = 0
    tokens: list[int] = field(default_factory=list)
    echoed: list[TokenScore] = field(default_factory=list)

    @property
    def is_writing(self) -> bool:
        """Whether the whole prompt was read."""
        return self.read == len(self.ticket.order.ids)


class Engine:
    """Answers orders, as many at a time as there are slots; the others wait in their order.

    Args:
        rows: of the model.
        table: of its tokenizer.
        most_waiting: orders that may wait.
        chunk: tokens of a prompt that are read at once.

    Attributes:
        totals: what it did so far.
    """

    def __init__(
        self, rows: DecodingRows, table: TokenTable, most_waiting: int = MOST_WAITING, chunk: int = CHUNK
    ) -> None:
        self.totals = EngineTotals()
        self.most_waiting = most_waiting
        self._model, self._table, self._chunk = rows, table, chunk
        self._chooser = TokenChooser(rows.slots)
        self._rows: list[_Row | None] = [None] * rows.slots
        self._waiting: deque[Ticket] = deque()
        self._news = threading.Condition()
        self._closing = False
        self._seconds = 1.0  # that an answer took of late
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def slots(self) -> int:
        """Answers at a time."""
        return len(self._rows)

    @property
    def running(self) -> int:
        """Slots that are taken."""
        return sum(row is not None for row in self._rows)

    @property
    def waiting(self) -> int:
        """Orders that have no slot yet."""
        return len(self._waiting)

    @property
    def is_alive(self) -> bool:
        """Whether orders are answered."""
        return self._thread.is_alive() and not self._closing

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def close(self) -> None:
        """End: what is not answered by now fails."""
        with self._news:
            self._closing = True
            self._news.notify()
        if self._thread.is_alive():
            self._thread.join()

    def submit(self, tickets: Sequence[Ticket]) -> None:
        """Take orders, all or none; each is answered through its `say`.

        Raises:
            BusyError: more would wait than may.
        """
        with self._news:
            if self._closing:
                raise BusyError(STOPPING.message, 1)
            free = self.slots - self.running
            if len(self._waiting) + len(tickets) > self.most_waiting + free:
                raise BusyError(f"{len(self._waiting)} answers are waiting already: try again later", self._patience())
            self._waiting.extend(tickets)
            self._news.notify()

    def cancel(self, tickets: Sequence[Ticket]) -> None:
        """Drop orders that nobody wants any longer; those that have ended already are left alone."""
        with self._news:
            for ticket in tickets:
                ticket.cancelled = True
            wanted = [ticket for ticket in self._waiting if not ticket.cancelled]
            self.totals.cancelled += len(self._waiting) - len(wanted)
            self._waiting = deque(wanted)
            self._news.notify()

    def _patience(self) -> int:
        """Seconds until those that wait now have had their turn, as far as can be told."""
        rounds = (len(self._waiting) + self.running) / self.slots
        return min(max(1, math.ceil(rounds * self._seconds)), LONGEST_RETRY)

    def _run(self) -> None:
        try:
            while not self._closing:
                with self._news:
                    while not (self._closing or self._waiting or self.running):
                        self._news.wait()
                self._round()
        except Exception:  # not even a row can be emptied: of a GPU that is lost, nothing works again
            logger.exception("the engine failed")
        finally:
            self._stop()

    def _stop(self) -> None:
        """Take no more, and tell those that are not answered."""
        with self._news:
            self._closing = True
            left = [*(row.ticket for row in self._present()), *self._waiting]
            self._rows = [None] * self.slots
            self._waiting.clear()
        for ticket in left:
            self._say(ticket, STOPPING)

    def _round(self) -> None:
        for row in self._present():
            if row.ticket.cancelled:
                self._end(row, None)
        self._fill()
        writing = [row for row in self._present() if row.is_writing]
        self._read_prompts()
        if writing:
            self._guarded(writing, partial(self._step, writing))

    def _read_prompts(self) -> None:
        """Read of the prompts as many tokens as a chunk has, those that came first before the others."""
        left = self._chunk
        for row in sorted(self._present(), key=lambda row: row.began):
            if left > 0 and not row.is_writing:
                size = min(left, len(row.ticket.order.ids) - row.read)
                self._guarded([row], partial(self._read, row, size))
                left -= size

    def _present(self) -> list[_Row]:
        return [row for row in self._rows if row is not None]

    def _guarded(self, rows: Sequence[_Row], work: Callable[[], None]) -> None:
        """Do some work on rows; whatever it raises ends them and nothing else."""
        try:
            work()
        except Exception as error:
            logger.exception("an answer failed")
            for row in rows:
                if self._rows[row.slot] is row:
                    self._end(row, Failed(f"the model failed: {one_line(error)}"))

    def _fill(self) -> None:
        """Give free slots to those that wait."""
        for slot, row in enumerate(self._rows):
            while row is None and (ticket := self._next()) is not None:
                row = _Row(slot, ticket, AnswerWriter(ticket.order, self._table), time.monotonic())
                self._rows[slot] = row
                self._guarded([row], partial(self._begin, row))
                row = self._rows[slot]

    def _next(self) -> Ticket | None:
        with self._news:
            return self._waiting.popleft() if self._waiting else None

    def _begin(self, row: _Row) -> None:
        self._model.begin(row.slot, row.ticket.order.budget)
        self._chooser.begin(row.slot, row.ticket.order.choosing)

    def _read(self, row: _Row, size: int) -> None:
        """Read so many tokens of a prompt; behind the last stands the first of the answer."""
        order = row.ticket.order
        begin, end = row.read, row.read + size
        border = len(order.ids) - order.echo
        every = order.echo > 0 and order.choosing.alternatives is not None and end >= border
        logits = self._model.read(row.slot, order.ids[begin:end], every)
        if every:
            self._score_echo(row, logits, begin, end)
        row.read = end
        self.totals.prompt_tokens += end - begin
        if not row.is_writing:
            return
        if order.echo:
            self._say(row.ticket, row.writer.echo(row.echoed))
        if order.most == 0:
            self._finish(row, "length")
        else:
            self._take(logits[-1:] if every else logits[None], [row])

    def _score_echo(self, row: _Row, logits: Tensor, begin: int, end: int) -> None:
        """Note what the model thought of the prompt's tokens, given the logits [end - begin, V] after some of them."""
        order = row.ticket.order
        border = len(order.ids) - order.echo
        if begin == 0 and border == 0:
            row.echoed.append(TokenScore(order.ids[0]))
        first, last = max(begin + 1, border), min(end + 1, len(order.ids))
        if first < last:
            before = logits[first - 1 - begin : last - 1 - begin]
            row.echoed += score_tokens(before, order.ids[first:last], order.choosing.alternatives or 0)

    def _step(self, rows: Sequence[_Row]) -> None:
        """Write one token of each row."""
        tokens, active = [0] * self.slots, [False] * self.slots
        for row in rows:
            tokens[row.slot], active[row.slot] = row.tokens[-1], True
        logits = self._model.step(torch.tensor(tokens), active)
        self.totals.steps += 1
        slots = [row.slot for row in rows]
        self._take(logits if len(slots) == self.slots else logits[slots], rows)

    def _take(self, logits: Tensor, rows: Sequence[_Row]) -> None:
        """Choose the next token of rows by their logits [R, V]."""
        for row, chosen in zip(rows, self._chooser.choose(logits, [row.slot for row in rows]), strict=True):
            if isinstance(chosen, NotFiniteError):
                self._end(row, Failed(f"the model failed: {chosen}"))
            else:
                self._write(row, chosen)

    def _write(self, row: _Row, score: TokenScore) -> None:
        order = row.ticket.order
        row.tokens.append(score.token)
        self.totals.tokens += 1
        if score.token in order.ends:
            self._finish(row, "stop")
            return
        self._say(row.ticket, row.writer.push(score))
        if row.writer.is_stopped:
            self._finish(row, "stop")
        elif len(row.tokens) == order.most:
            self._finish(row, "length")

    def _finish(self, row: _Row, reason: str) -> None:
        self._say(row.ticket, row.writer.finish())
        # What the last bytes spell may be a stop string.
        reason = "stop" if row.writer.is_stopped else reason
        streams = self._model.streams(row.slot)
        self._seconds += 0.1 * (time.monotonic() - row.began - self._seconds)
        self._end(row, Finished(reason, len(row.ticket.order.ids), len(row.tokens), streams))

    def _end(self, row: _Row, ending: Finished | Failed | None) -> None:
        """Empty a slot, and say how the answer ended unless nobody wants to know."""
        streams = self._model.streams(row.slot)
        self._model.end(row.slot)
        self._rows[row.slot] = None
        self.totals.streams += streams
        if ending is None:
            self.totals.cancelled += 1
        else:
            self.totals.finished += isinstance(ending, Finished)
            self._say(row.ticket, ending)

    def _say(self, ticket: Ticket, saying: Written | Finished | Failed) -> None:
        if isinstance(saying, Failed):
            self.totals.failed += 1
        if not isinstance(saying, Written) or saying.text or saying.scores:
            ticket.say(saying)
