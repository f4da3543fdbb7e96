"""Conversations as tokens: a tokenizer's chat template, and which of the tokens an assistant has to learn.

The template writes the whole row: what precedes a text is its business here, and nothing stands before it twice.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise, takewhile
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from thoughtbubbles.data.sources.formats import Row
from thoughtbubbles.data.sources.hub import missing_field
from thoughtbubbles.data.tokenizer import Tokens
from thoughtbubbles.support.errors import DataError, one_line
from thoughtbubbles.support.text import encode_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ROLES = ("system", "developer", "user", "assistant", "tool")
# Stands in messages before what would read as a special token. Unicode keeps it from ever being a character of a text.
MARK = "\ufdd0"
# With which a template says itself what an assistant writes.
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# An answer that no template has in its own words.
PROBE = "thoughtbubbles"

ChatMessage = dict[str, Any]
Conversation = Sequence[ChatMessage]
# The first and the last character of an answer with what ends it, as a slice has them.
Span = tuple[int, int]
Targets = npt.NDArray[np.bool_]


def read_messages(row: Row, field: str, place: str) -> list[ChatMessage]:
    """The conversation of a row; keys that hold nothing are left out.

    Args:
        row: a row of data.
        field: that holds a list of messages, each with `role` and `content` and perhaps more that a template reads.
        place: names the row in messages.

    Raises:
        DataError: no such list, a role that is none of `ROLES`, a content that is no text, an answer that is empty, or
            a conversation without one or that begins with it.
    """
    if field not in row:
        raise missing_field(place, field, list(row))
    given = row[field]
    if not isinstance(given, list) or not given:
        found = "an empty list" if given == [] else "null" if given is None else f"a {type(given).__name__}"
        raise DataError(f"{place}: field {field!r} holds {found}, expected a list of messages with role and content")
    messages = [_read_message(each, f"{place}, message {number}") for number, each in enumerate(given, start=1)]
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise DataError(f"{place}: no message is the assistant's, expected one to learn")
    if roles[0] == "assistant":
        raise DataError(f"{place}: message 1 is the assistant's, expected one before it to answer")
    return messages


def _read_message(given: Any, place: str) -> ChatMessage:
    if not isinstance(given, Mapping):
        raise DataError(f"{place} is a {type(given).__name__}, expected role and content")
    message = {key: value for key, value in given.items() if value is not None}
    if "role" not in message:
        raise missing_field(place, "role", list(message))
    role, calls = message["role"], message.get("tool_calls")
    if role not in ROLES:
        raise DataError(f"{place}: role={role!r}, expected one of {', '.join(ROLES)}")
    content = message.setdefault("content", "") if role == "assistant" and calls else message.get("content")
    if not isinstance(content, str):
        found = "is null" if content is None else f"holds a {type(content).__name__}"
        raise DataError(f"{place}: content {found}, expected text")
    if role == "assistant" and not calls and not content.strip():
        raise DataError(f"{place}: the answer {content!r} is empty, expected text to learn")
    _check_characters(message, place)
    return message


def _check_characters(value: Any, place: str) -> None:
    """Check that all text in a value can be written, and that the mark is free."""
    for each in _texts(value):
        if MARK in each:
            raise DataError(f"{place}: {MARK!r} is no character, expected Unicode text")
        try:
            each.encode()
        except UnicodeEncodeError as error:  # a lone surrogate, as JSON can spell it
            raise DataError(f"{place}: {each[error.start]!r} is no character, expected Unicode text") from None


def _texts(value: Any) -> list[str]:
    match value:
        case str():
            return [value]
        case dict():
            return [text for item in value.items() for each in item for text in _texts(each)]
        case list():
            return [text for each in value for text in _texts(each)]
        case _:
            return []


@dataclass(frozen=True)
class _Frame:
    """What a template writes around an answer, without white space: a header that no prompt has, words, a token."""

    header: str = ""
    tail: str = ""
    end: str | None = None


class ChatTemplate:
    """A tokenizer's chat template. What reads as a special token inside a message is ordinary text.

    Args:
        tokenizer: with a chat template.

    Attributes:
        end: the special token that the template writes behind an answer, or else before the next message; None where
            it writes none.
        tail: words that it writes behind an answer and before `end`, without white space around them.

    Raises:
        DataError: no template, several of which none is the default, or one for messages that are no text.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast") -> None:
        if not tokenizer.chat_template:
            raise DataError(
                "the tokenizer has no chat template: expected chat_template.jinja beside it, which data.chat_template "
                "of a recipe puts there, recipes/chat.jinja for one"
            )
        self._tokenizer = tokenizer
        try:
            self._template = tokenizer.get_chat_template()
        except ValueError as error:
            raise DataError(f"the tokenizer's chat template: {one_line(error)}") from error
        self._tagged = GENERATION.search(self._template) is not None
        special = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
        words = "|".join(map(re.escape, sorted(special, key=len, reverse=True))) or "(?!)"
        self._word = re.compile(words)
        # Group 1 is a token that the template wrote.
        self._token = re.compile(f"{MARK}(?:{words})|({words})")
        self._frame = self._find_frame()
        self.tail = self._frame.tail
        self.end = None if self._frame.end is None else self._id_of(self._frame.end)

    def prompt(self, messages: Conversation, place: str) -> list[int]:
        """The tokens after which the assistant answers.

        Raises:
            DataError: as `example`.
        """
        text = self._render(self._marked(messages), place, prompt=True)[0]
        self._check_words(text, place)
        return self._encode([text])[0]

    def example(self, messages: Conversation, place: str) -> tuple[Tokens, Targets]:
        """The tokens [L] of a conversation, and which of them [L] are to be learnt: the answers and what ends them.

        Behind a last answer that the template does not end with a special token stands the eos token.

        Args:
            messages: as `read_messages` gives them.
            place: names them in messages.

        Raises:
            DataError: a template that begins an answer but no prompt for it, or messages that it refuses, that it
                writes otherwise once more follow, or whose answers begin or end inside a token.
        """
        if self._frame.header and not self._tagged:
            raise DataError(
                f"the chat template begins an answer with {self._frame.header!r} but asks for none: expected it to "
                "write that where add_generation_prompt is true"
            )
        given = self._marked(messages)
        text, tagged = self._render(given, place)
        turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        spans = self._closed(text, tagged) if self._tagged else [self._turn(given, text, n, place) for n in turns]
        if not any(end > begin for begin, end in spans):
            raise DataError(f"{place}: the chat template's generation blocks are empty, expected the answers in them")
        last = turns[-1] == len(messages) - 1 and not text[spans[-1][1] :].strip()
        unended = last and not self._is_ended(text, spans[-1])
        if unended:
            spans[-1] = (spans[-1][0], len(text))
        self._check_words(text, place)
        ids, borders = self._encode_to(text, [border for span in spans for border in span], place)
        targets = np.zeros(len(ids) + unended, dtype=np.bool_)
        for begin, end in zip(borders[::2], borders[1::2], strict=True):
            targets[begin:end] = True
        targets[len(ids) :] = True
        return np.array(ids + [self._tokenizer.eos_token_id] * unended, dtype=np.uint32), targets

    def _find_frame(self) -> "_Frame":
        """What stands around an answer that ends a conversation."""
        chat = [{"role": role, "content": text} for role, text in (("user", "?"), ("assistant", PROBE), ("user", "?"))]
        asks = (1, True), (1, False), (2, False), (3, False)
        try:
            asked, unasked, whole, followed = (self._render(chat[:count], "", prompt)[0] for count, prompt in asks)
        except DataError:  # it may want another kind of conversation
            return _Frame()
        if PROBE not in whole:
            raise DataError("the chat template leaves an answer's text out: expected one for messages of text")
        begin = whole.rfind(PROBE)
        header = whole[len(asked) : begin].strip() if asked == unasked and whole.startswith(asked) else ""
        behind = self._token.search(whole, begin)
        tail = whole[begin + len(PROBE) : None if behind is None else behind.start()].strip()
        ending = behind or self._token.search(followed, max(0, followed.rfind(PROBE)))
        return _Frame(header, tail, None if ending is None else ending[1])

    def _marked(self, value: Any) -> Any:
        """A value with a mark before every special token's words in its text."""
        match value:
            case str():
                return self._word.sub(lambda found: MARK + found[0], value)
            case dict():
                return {key: self._marked(each) for key, each in value.items()}
            case list():
                return [self._marked(each) for each in value]
            case _:
                return value

    def _render(self, messages: Conversation, place: str, prompt: bool = False) -> tuple[str, list[Span]]:
        """The text of a conversation and, where the template says so, what the assistant writes in it."""
        from transformers.utils import chat_template_utils

        render: Any = chat_template_utils.render_jinja_template  # transformers types what it returns as text
        try:
            texts, spans = render(
                conversations=[list(messages)],
                chat_template=self._template,
                return_assistant_tokens_mask=self._tagged,
                add_generation_prompt=prompt,
                **self._tokenizer.special_tokens_map,
            )
        except Exception as error:  # a template is a program, and fails as one
            raise DataError(f"{place}: the chat template refuses it: {one_line(error)}") from error
        return str(texts[0]), list(spans[0]) if self._tagged else []

    def _turn(self, messages: Conversation, text: str, number: int, place: str) -> Span:
        """Where message `number`, an answer, stands in the whole text.

        It begins where the prompt that asks for it ends, and ends where the text of the messages up to it does; a
        template may write more at the end of a conversation than inside it.
        """
        before, _ = self._render(messages[:number], place, prompt=True)
        after = self._render(messages[: number + 1], place)[0] if number + 1 < len(messages) else text
        same = (ours == theirs for ours, theirs in zip(text, after, strict=False))
        begin, shared = len(before), len(after) if text.startswith(after) else sum(takewhile(bool, same))
        if text.startswith(before) and begin < shared:
            written = [found for found in self._token.finditer(text, begin, shared) if found[1]]
            if ends := [found.end() for found in written if found[1] == self._frame.end]:
                return begin, ends[-1]
            if shared == len(after):
                return self._closed(text, [(begin, shared)])[0]
        raise DataError(
            f"{place}, message {number + 1}: the chat template writes it otherwise after its prompt, or once more "
            "follows, than in the whole conversation: expected a template that keeps what stands, or one with "
            "{% generation %} around answers"
        )

    def _closed(self, text: str, spans: Sequence[Span]) -> list[Span]:
        """Spans of the template with the special token behind each that has none at its end."""
        return [span if self._is_ended(text, span) else self._extended(text, span) for span in spans]

    def _extended(self, text: str, span: Span) -> Span:
        """A span with the special token that follows it, if one does."""
        found = self._token.match(text, span[1])
        return (span[0], found.end()) if found and found[1] else span

    def _is_ended(self, text: str, span: Span) -> bool:
        """Whether what ends in a span, but for white space, is a special token of the template's."""
        end = span[0] + len(text[slice(*span)].rstrip())
        return any(found[1] and found.end() == end for found in self._token.finditer(text, *span))

    def _encode_to(self, text: str, borders: list[int], place: str) -> tuple[list[int], list[int]]:
        """The tokens of a text, and how many of them stand before each of some characters, in ascending order."""
        parts = [text[start:end] for start, end in pairwise([0, *borders, len(text)])]
        *pieces, ids = self._encode([*parts, text])
        if ids == list(chain.from_iterable(pieces)):
            return ids, list(accumulate(map(len, pieces[:-1])))
        # Some tokenizers encode the beginning of a text in a way of its own.
        heads = self._encode([text[:border] for border in borders])
        for head, border in zip(heads, borders, strict=True):
            if ids[: len(head)] != head:
                before, behind = (each.replace(MARK, "") for each in (text[:border][-10:], text[border:][:10]))
                raise DataError(
                    f"{place}: an answer begins or ends inside a token, between {before!r} and {behind!r}: expected a "
                    "chat template whose prompt ends where a token does, such as before a space"
                )
        return ids, list(map(len, heads))

    def _encode(self, texts: list[str]) -> list[list[int]]:
        """Tokens of texts that a template wrote: its special tokens are such, those in messages are not."""
        if not any(MARK in text for text in texts):
            return self._encode_plain(texts)
        return [self._encode_parts(text) for text in texts]

    def _encode_plain(self, texts: list[str]) -> list[list[int]]:
        backend: Any = self._tokenizer.backend_tokenizer
        backend.encode_special_tokens = False
        backend.no_truncation()
        backend.no_padding()
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _encode_parts(self, text: str) -> list[int]:
        """The same of a text with marks: what stands between special tokens is encoded by itself."""
        ids, place = [], 0
        for found in self._token.finditer(text):
            if found[1]:
                ids += encode_text(self._tokenizer, text[place : found.start()].replace(MARK, ""))
                ids.append(self._id_of(found[1]))
                place = found.end()
        return ids + encode_text(self._tokenizer, text[place:].replace(MARK, ""))

    def _id_of(self, word: str) -> int:
        found: Any = self._tokenizer.convert_tokens_to_ids(word)
        return int(found)

    def _check_words(self, text: str, place: str) -> None:
        """Check that a text with marks can be encoded in parts: without what they mark it is the same in one."""
        if MARK not in text:
            return
        marked = [found[0] for found in self._token.finditer(text) if not found[1]]
        plain = self._token.sub(lambda found: found[1] or "", text).replace(MARK, "")
        if self._encode_parts(plain) != self._encode_plain([plain])[0]:
            word = marked[0].removeprefix(MARK) if marked else ""
            raise DataError(f"{place}: holds {word!r}, which this tokenizer only knows as a special token")
