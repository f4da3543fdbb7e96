"""The text of one answer, token by token."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from thoughtbubbles.serving.choosing import TokenScore
from thoughtbubbles.serving.endings import AnswerTrim, StopFinder
from thoughtbubbles.serving.orders import Order, PlacedScore, Written
from thoughtbubbles.support.detokenizer import Detokenizer, TokenTable


@dataclass(frozen=True)
class _Entry:
    """A token, and the stretch of the answer's text that was said with it."""

    score: TokenScore
    start: int
    end: int


class AnswerWriter:
    """Makes text of an answer's tokens: what it gives, joined, is the answer, and nothing of it changes.

    A token is given out once its text is final and stands before every stop string.

    Args:
        order: what is wanted.
        table: of the tokenizer.
    """

    def __init__(self, order: Order, table: TokenTable) -> None:
        border = len(order.ids) - order.echo
        self._detokenizer = Detokenizer(table, order.ids[:border])
        self._echoed = order.ids[border:]
        self._stops = StopFinder(order.stops)
        self._trim = None if order.tail is None else AnswerTrim(order.tail)
        self._scored = order.choosing.alternatives is not None
        self._entries: deque[_Entry] = deque()
        # Characters: of the echo, that the tokens have so far, that stand before every stop string.
        self._start = self._known = self._passed = 0

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string came."""
        return self._stops.found

    def echo(self, scores: Sequence[TokenScore]) -> Written:
        """The end of the prompt as the beginning of the answer; no stop string is looked for in it.

        Args:
            scores: one of each token that is echoed, or none at all.
        """
        text, offsets = "", []
        for token in self._echoed:
            offsets.append(len(text))
            text += self._detokenizer.push(token)
        self._start = len(text)
        return Written(text, list(map(PlacedScore, scores, offsets)))

    def push(self, score: TokenScore) -> Written:
        """Take a token of the answer."""
        text = self._detokenizer.push(score.token)
        if self._scored:
            self._entries.append(_Entry(score, self._known, self._known + len(text)))
        self._known += len(text)
        return self._passing(self._stops.push(text))

    def finish(self) -> Written:
        """What is left when no token follows."""
        text = self._detokenizer.finish() if not self.is_stopped else ""
        self._known += len(text)
        passed = self._stops.push(text) if text else ""
        if not self.is_stopped:
            passed += self._stops.finish()
        last = self._passing(passed)
        rest = [entry for entry in self._entries if not self.is_stopped or entry.start < self._passed]
        self._entries.clear()
        trimmed = "" if self._trim is None else self._trim.finish()
        return Written(last.text + trimmed, [*last.scores, *map(self._placed, rest)])

    def _passing(self, text: str) -> Written:
        """Text that stands before every stop string, with the tokens that it completes."""
        self._passed += len(text)
        scores = []
        while self._entries and self._entries[0].end <= self._passed:
            scores.append(self._placed(self._entries.popleft()))
        return Written(text if self._trim is None else self._trim.push(text), scores)

    def _placed(self, entry: _Entry) -> PlacedScore:
        return PlacedScore(entry.score, self._start + entry.start)
