"""From requests to orders: what a served model makes of prompts, limits and ends."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from thoughtbubbles.data.feed.chat import MARK, ChatMessage, ChatTemplate
from thoughtbubbles.model.budget import Budget, budget_text
from thoughtbubbles.model.modeling import ThoughtbubblesForCausalLM
from thoughtbubbles.serving.choosing import Choosing
from thoughtbubbles.serving.orders import Order
from thoughtbubbles.serving.refusals import RefusedError, bad_field
from thoughtbubbles.serving.requests import ChatFields, CompletionFields, RequestFields, without_nulls
from thoughtbubbles.support.detokenizer import TokenTable
from thoughtbubbles.support.errors import DataError, InputError, shown
from thoughtbubbles.support.text import encode_text, start_document, text_ends

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ROLES = ("system", "developer", "user", "assistant")
MOST_BIASED = 1000
LONGEST_BIAS = 100
HEAD = 16
"""Characters of a text that are looked at first for each token of a row: texts have about four."""


@dataclass(frozen=True)
class Limits:
    """What a request may ask for at most; None is what the model can.

    Attributes:
        prompt: tokens of a prompt.
        output: tokens of an answer.
        budget: streams per token; None is the model's own, or what requests have that say nothing, the greater.
        answers: of one request, over all of its prompts.
    """

    prompt: int | None = None
    output: int | None = None
    budget: Budget | None = None
    answers: int | None = None


class ServedModel:
    """A model's name, tokenizer and limits, and how it reads requests.

    Reading encodes, and so takes a while for long prompts; it is for one thread at a time.

    Args:
        name: by which requests call it.
        model: in evaluation mode.
        tokenizer: its own.
        budget: streams per token where a request says nothing; None is the model's own.
        limits: of requests.

    Attributes:
        table: of the tokenizer, for any thread.
        longest: tokens of a row, prompt and answer together.
        budget: as above.
        most_budget: of a request.

    Raises:
        ValueError: a budget that the model cannot have, or above the limit.
        InputError: a damaged record of what precedes a text.
    """

    def __init__(
        self,
        name: str,
        model: ThoughtbubblesForCausalLM,
        tokenizer: "PreTrainedTokenizerFast",
        budget: Budget | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.name = name
        self.table = TokenTable(tokenizer)
        self._tokenizer = tokenizer
        self._config = model.config
        self._limits = limits or Limits()
        self.budget = self._config.exact_budget(budget)
        usual = max(self.budget, self._config.exact_budget())
        self.most_budget = usual if self._limits.budget is None else self._config.exact_budget(self._limits.budget)
        if self.budget > self.most_budget:
            raise InputError(
                f"budget={budget_text(self.budget)}: expected at most {budget_text(self.most_budget)}, the limit of "
                "requests"
            )
        self.longest = int(self._config.max_position_embeddings)
        self._most_characters = self.table.longest_word and self.table.longest_word * self.longest
        self._start = start_document(tokenizer)
        self._ends = text_ends(tokenizer, model.generation_config)
        self._chat: ChatTemplate | DataError
        try:
            self._chat = ChatTemplate(tokenizer)
        except DataError as error:
            self._chat = error

    def check_name(self, name: str | None) -> None:
        """Check that a request asks for this model, or for none.

        Raises:
            RefusedError: it names another.
        """
        if name is not None and name != self.name:
            message = f"model={shown(name)}: there is {self.name!r} alone"
            raise RefusedError(404, message, "model", "model_not_found")

    def completions(self, fields: CompletionFields) -> list[Order]:
        """The orders of a request to go on with texts: `n` of each prompt, one prompt after the other.

        Raises:
            RefusedError: a prompt or another field that cannot be served.
        """
        self.check_name(fields.model)
        orders: list[Order] = []
        prompts = _each_prompt(fields.prompt)
        self._check_answers(fields.n * len(prompts))
        for place, prompt in prompts:
            ids, before = self._completion_prompt(prompt, place)
            orders += self._orders(fields, ids, place, echo=len(ids) - before if fields.echo else 0)
        return orders

    def chats(self, fields: ChatFields) -> list[Order]:
        """The orders of a request for the next message: `n` of them.

        Raises:
            RefusedError: messages or another field that cannot be served.
        """
        self.check_name(fields.model)
        if isinstance(self._chat, DataError):
            raise RefusedError(400, str(self._chat), "messages", "no_chat_template")
        self._check_answers(fields.n)
        messages = [_read_message(message, f"messages[{place}]") for place, message in enumerate(fields.messages)]
        self._check_length("\n".join(message["content"] for message in messages), "messages")
        try:
            ids = self._chat.prompt(messages, "messages")
        except DataError as error:
            raise bad_field("messages", str(error)) from None
        ends = [] if self._chat.end is None else [self._chat.end]
        return self._orders(fields, ids, "messages", tail=self._chat.tail, ends=ends)

    def _check_answers(self, count: int) -> None:
        most = self._limits.answers
        if most is not None and count > most:
            raise bad_field("n", f"{count} answers in one request: expected at most {most}")

    def _check_length(self, text: str, place: str) -> None:
        """Refuse what is certainly too long for a row without encoding all of it, which takes a while."""
        head = text[: HEAD * self.longest]
        if len(head) == len(text):
            return
        if self._most_characters is not None and len(text) > self._most_characters:
            least = self.longest
        else:
            least = len(encode_text(self._tokenizer, head)) // 2  # where a text is cut, more tokens may come of it
        if least >= self.longest:
            raise self._too_long(place, f"more than {self.longest}", 1)

    def _too_long(self, place: str, count: str, room: int) -> RefusedError:
        """What to say of a prompt with `count` tokens, where an answer wants `room` of them."""
        most = min(self.longest - room, self._limits.prompt or self.longest)
        message = f"{place}: {count} tokens, expected at most {most} (a row has {self.longest}, answer included)"
        return bad_field(place.partition("[")[0], message, "context_length_exceeded")

    def _completion_prompt(self, prompt: str | list[int], place: str) -> tuple[list[int], int]:
        """The tokens of a prompt, and how many of them precede what was given."""
        if isinstance(prompt, str):
            self._check_length(prompt, place)
            ids = self._start + encode_text(self._tokenizer, prompt)
            if not ids:
                expected = "expected some text, since the tokenizer has no token to start a document with"
                raise bad_field("prompt", f"{place}='': {expected}")
            return ids, len(self._start)
        if not prompt:
            raise bad_field("prompt", f"{place}=[]: expected some tokens")
        size = self._config.vocab_size
        if wrong := [token for token in prompt if not 0 <= token < size]:
            raise bad_field("prompt", f"{place}: token {wrong[0]}: expected ids from 0 to {size - 1}")
        return prompt, 0

    def _orders(
        self,
        fields: RequestFields,
        ids: list[int],
        place: str,
        echo: int = 0,
        tail: str | None = None,
        ends: Sequence[int] = (),
    ) -> list[Order]:
        most = self._tokens(fields, len(ids), place)
        budget, seed = self._budget_of(fields.budget), secrets.randbits(63) if fields.seed is None else fields.seed
        bias = self._bias(fields.logit_bias)

        def order(number: int) -> Order:
            choosing = Choosing(
                temperature=fields.temperature,
                top_p=fields.top_p,
                top_k=fields.top_k,
                presence_penalty=fields.presence_penalty,
                frequency_penalty=fields.frequency_penalty,
                bias=bias,
                seed=seed,
                number=number,
                alternatives=fields.alternatives,
            )
            return Order(ids, budget, most, choosing, frozenset([*self._ends, *ends]), fields.stops, echo, tail)

        return [order(number) for number in range(fields.n)]

    def _tokens(self, fields: RequestFields, size: int, place: str) -> int:
        """Tokens that an answer to a prompt of `size` tokens may have.

        Raises:
            RefusedError: the prompt is too long, or more tokens are asked for than any answer may have.
        """
        asked, limit = fields.tokens_asked, self._limits.output
        if asked is not None and limit is not None and asked > limit:
            raise bad_field("max_tokens", f"max_tokens={asked}: expected at most {limit}")
        room = self.longest - size
        if room < (asked != 0) or (self._limits.prompt is not None and size > self._limits.prompt):
            raise self._too_long(place, str(size), int(asked != 0))
        wanted = fields.default_tokens if asked is None else asked
        return min(each for each in (room, wanted, limit) if each is not None)

    def _budget_of(self, asked: Budget | None) -> Fraction:
        if asked is None:
            return self.budget
        try:
            budget = self._config.exact_budget(asked)
        except ValueError as error:
            raise bad_field("budget", str(error)) from None
        if budget > self.most_budget:
            raise bad_field("budget", f"budget={shown(asked)}: expected at most {budget_text(self.most_budget)}")
        return budget

    def _bias(self, asked: Mapping[str, float]) -> dict[int, float]:
        if len(asked) > MOST_BIASED:
            raise bad_field("logit_bias", f"logit_bias of {len(asked)} tokens: expected at most {MOST_BIASED}")
        size = self._config.vocab_size
        for token, value in asked.items():
            if not (token.isascii() and token.isdigit() and len(token) < 10 and int(token) < size):
                raise bad_field("logit_bias", f"logit_bias: token {shown(token)}: expected ids from 0 to {size - 1}")
            if not -LONGEST_BIAS <= value <= LONGEST_BIAS:
                expected = f"expected numbers from -{LONGEST_BIAS} to {LONGEST_BIAS}"
                raise bad_field("logit_bias", f"logit_bias: {value} for token {token}: {expected}")
        return {int(token): value for token, value in asked.items()}


def _each_prompt(given: Any) -> list[tuple[str, str | list[int]]]:
    """The prompts of a request, and what to call each: a text, tokens, or a list of either."""
    if _is_prompt(given):
        return [("prompt", given)]
    if isinstance(given, list) and all(map(_is_prompt, given)):
        return list(zip(_places(len(given)), given, strict=True))
    raise bad_field("prompt", f"prompt={shown(given)}: expected a text, token ids, or a list of texts or of token ids")


def _is_prompt(given: Any) -> bool:
    """Whether something is one prompt: a text, or a list of tokens, which may be empty."""
    return isinstance(given, str) or (isinstance(given, list) and all(type(token) is int for token in given))


def _places(count: int) -> list[str]:
    return ["prompt"] if count == 1 else [f"prompt[{number}]" for number in range(count)]


def _read_message(given: Mapping[str, Any], place: str) -> ChatMessage:
    """A message of a conversation; of content in parts, the text of all.

    Raises:
        RefusedError: what is no message, or has what is not served.
    """
    message = {name: value for name, value in without_nulls(given).items() if value != []}
    role, content = message.pop("role", None), message.pop("content", "" if given.get("role") == "assistant" else None)
    if role not in ROLES:
        raise bad_field("messages", f"{place}.role={shown(role)}: expected one of {', '.join(ROLES)}")
    for name, value in message.items():
        raise bad_field("messages", f"{place}.{name}={shown(value)}: not served here", "unsupported_parameter")
    if isinstance(content, Sequence) and not isinstance(content, str):
        content = "".join(_part(part, f"{place}.content[{number}]") for number, part in enumerate(content))
    if not isinstance(content, str):
        raise bad_field("messages", f"{place}.content={shown(content)}: expected text")
    if MARK in content:
        raise bad_field("messages", f"{place}.content: {MARK!r} is no character, expected Unicode text")
    return {"role": role, "content": content}


def _part(part: Any, place: str) -> str:
    match part:
        case {"type": "text", "text": str(text), **rest} if not without_nulls(rest):
            return text
    raise bad_field("messages", f"{place}={shown(part)}: expected text, as in {{'type': 'text', 'text': '...'}}")
