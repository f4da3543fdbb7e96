"""Answers in OpenAI's shapes: whole, and in the chunks of a stream."""

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from thoughtbubbles.serving.choosing import TokenScore
from thoughtbubbles.serving.orders import Finished, Order, PlacedScore, Written
from thoughtbubbles.support.detokenizer import TokenTable

Json = dict[str, Any]


@dataclass
class AnswerSoFar:
    """One of the answers to a request, as far as it is written."""

    texts: list[str] = field(default_factory=list)
    scores: list[PlacedScore] = field(default_factory=list)
    finished: Finished | None = None

    def add(self, written: Written) -> None:
        """Take more of it."""
        self.texts.append(written.text)
        self.scores.extend(written.scores)


class AnswerFormat(ABC):
    """The shapes of the answers to one request.

    Args:
        model: its name.
        table: of its tokenizer.
        orders: of the request.
    """

    prefix: str
    whole_name: str
    chunk_name: str

    def __init__(self, model: str, table: TokenTable, orders: Sequence[Order]) -> None:
        self._table = table
        self._orders = orders
        self._scored = orders[0].choosing.alternatives is not None
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, answers: Sequence[AnswerSoFar]) -> Json:
        """All answers at once."""
        choices = [self._whole_choice(index, answer) for index, answer in enumerate(answers)]
        return {**self._head, "object": self.whole_name, "choices": choices, "usage": self.usage(answers)}

    def opening(self) -> list[Json]:
        """The chunks before any text."""
        return []

    def more(self, index: int, written: Written) -> Json:
        """A chunk with more of an answer."""
        return self._chunk([self._choice(index, written.text, written.scores, None)])

    def end(self, index: int, finished: Finished) -> Json:
        """The last chunk of an answer."""
        return self._chunk([self._choice(index, "", None, finished.reason)])

    def spent(self, answers: Sequence[AnswerSoFar]) -> Json:
        """The chunk that says what a stream used."""
        return {**self._chunk([]), "usage": self.usage(answers)}

    def usage(self, answers: Sequence[AnswerSoFar]) -> Json:
        """What was used: each prompt is counted once; streams are what was spent, on each reading of it."""
        pairs = [(order, answer.finished) for order, answer in zip(self._orders, answers, strict=True)]
        ended = [(order, finished) for order, finished in pairs if finished is not None]
        prompt = sum(finished.prompt_tokens for order, finished in ended if order.choosing.number == 0)
        written = sum(finished.tokens for _, finished in ended)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": written,
            "total_tokens": prompt + written,
            "streams": sum(finished.streams for _, finished in ended),
        }

    def _chunk(self, choices: list[Json]) -> Json:
        return {**self._head, "object": self.chunk_name, "choices": choices}

    def _whole_choice(self, index: int, answer: AnswerSoFar) -> Json:
        reason = None if answer.finished is None else answer.finished.reason
        return self._choice(index, "".join(answer.texts), answer.scores, reason)

    @abstractmethod
    def _choice(self, index: int, text: str, scores: Sequence[PlacedScore] | None, reason: str | None) -> Json:
        """An answer or a part of it; without scores it has no log-probabilities whatever was asked."""


class CompletionFormat(AnswerFormat):
    """Texts that go on."""

    prefix = "cmpl"
    whole_name = chunk_name = "text_completion"

    def _choice(self, index: int, text: str, scores: Sequence[PlacedScore] | None, reason: str | None) -> Json:
        logprobs = self._logprobs(scores) if self._scored and scores is not None else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, scores: Sequence[PlacedScore]) -> Json:
        return {
            "tokens": [self._table.name(each.score.token) for each in scores],
            "token_logprobs": [each.score.logprob for each in scores],
            "top_logprobs": [self._likeliest(each.score) for each in scores],
            "text_offset": [each.offset for each in scores],
        }

    def _likeliest(self, score: TokenScore) -> dict[str, float] | None:
        """The likeliest tokens and the one that stands there; where two have one name, the likelier."""
        if score.logprob is None:
            return None
        named: dict[str, float] = {}
        for token, logprob in (*score.top, (score.token, score.logprob)):
            named.setdefault(self._table.name(token), logprob)
        return named


class ChatFormat(AnswerFormat):
    """Messages of the assistant."""

    prefix = "chatcmpl"
    whole_name = "chat.completion"
    chunk_name = "chat.completion.chunk"

    def opening(self) -> list[Json]:
        """A chunk for each answer that says whose it is."""
        delta = {"role": "assistant", "content": ""}
        choices = [self._part(index, delta, None, None) for index in range(len(self._orders))]
        return [self._chunk([choice]) for choice in choices]

    def _choice(self, index: int, text: str, scores: Sequence[PlacedScore] | None, reason: str | None) -> Json:
        return self._part(index, {"content": text} if reason is None else {}, scores, reason)

    def _whole_choice(self, index: int, answer: AnswerSoFar) -> Json:
        reason = None if answer.finished is None else answer.finished.reason
        choice = self._part(index, {}, answer.scores, reason)
        del choice["delta"]
        return {**choice, "message": {"role": "assistant", "content": "".join(answer.texts), "refusal": None}}

    def _part(self, index: int, delta: Json, scores: Sequence[PlacedScore] | None, reason: str | None) -> Json:
        logprobs = None
        if self._scored and scores is not None:
            logprobs = {"content": [self._entry(each.score) for each in scores], "refusal": None}
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def _entry(self, score: TokenScore) -> Json:
        top = [self._named(token, logprob) for token, logprob in score.top]
        return {**self._named(score.token, score.logprob), "top_logprobs": top}

    def _named(self, token: int, logprob: float | None) -> Json:
        return {"token": self._table.name(token), "logprob": logprob, "bytes": list(self._table.raw(token))}
