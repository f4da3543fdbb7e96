"""Text of tokens as they come: what was said never changes, and in the end it is the text of all tokens."""

import codecs
import json
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import takewhile
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
LONGEST_CHARACTER = 4
"""Bytes of a character in UTF-8."""


class TokenTable:
    """What each token of a tokenizer stands for.

    It has a copy of the tokenizer that nothing changes, so that threads may share it.

    Attributes:
        is_byte_level: whether every token stands for some bytes, and a text is all of them one after the other.
        has_byte_tokens: whether tokens such as <0xE2> stand for a byte each, and a run of them is read as a whole.
        longest_word: characters of a text that a token stands for at most; None where there is no telling.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast") -> None:
        from tokenizers import Tokenizer

        self._backend: Tokenizer = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        content = json.loads(self._backend.to_str())
        kinds = list(_decoders(content["decoder"]))
        self.is_byte_level = kinds == ["ByteLevel"]
        self.has_byte_tokens = "ByteFallback" in kinds
        added = self._backend.get_added_tokens_decoder()
        whole = self.is_byte_level and content["normalizer"] is None and content["model"].get("unk_token") is None
        self.longest_word = max(map(len, self._backend.get_vocab())) if whole else None
        self._special = frozenset(token for token, word in added.items() if word.special)
        self._byte_of = {word: byte for byte, word in _alphabet().items()}

    def is_shown(self, token: int) -> bool:
        """Whether a token has a part in texts: special ones have none, nor has an id without a token."""
        return token not in self._special and self._backend.id_to_token(token) is not None

    def is_byte(self, token: int) -> bool:
        """Whether a token is one of those of which a run is read as a whole."""
        return self.has_byte_tokens and BYTE_TOKEN.fullmatch(self._word(token)) is not None

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens from the beginning of a text on, without special ones."""
        return str(self._backend.decode(list(tokens), skip_special_tokens=True))

    def raw(self, token: int) -> bytes:
        """What a token stands for inside a text; a special one for its word."""
        word = self._word(token)
        if token in self._special:
            return word.encode()
        if self.is_byte_level:
            return self._bytes_of(word)
        if self.is_byte(token):
            return bytes.fromhex(word[3:5])
        return self._inside(token).encode()

    def name(self, token: int) -> str:
        """A token for people: its text or, where that is no whole character, its bytes as in `bytes:\\xe2\\x82`."""
        raw = self.raw(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def _word(self, token: int) -> str:
        return self._backend.id_to_token(token) or ""

    def _bytes_of(self, word: str) -> bytes:
        """The bytes of a word of a byte-level vocabulary; one that is spelt in other letters is taken as it is."""
        if all(letter in self._byte_of for letter in word):
            return bytes(self._byte_of[letter] for letter in word)
        return word.encode()

    def _inside(self, token: int) -> str:
        """The text of a token that follows another, which may keep a space that it loses at the beginning."""
        return _behind(self.decode([token]), self.decode([token, token]))


def _decoders(decoder: Any) -> Iterator[str]:
    """The kinds of the decoders that one is made of."""
    if decoder is None:
        return
    if decoder["type"] == "Sequence":
        for each in decoder["decoders"]:
            yield from _decoders(each)
    else:
        yield decoder["type"]


@lru_cache(maxsize=1)
def _alphabet() -> dict[int, str]:
    """The letter of each byte in the vocabularies of byte-level tokenizers."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters: dict[int, str] = bytes_to_unicode()
    return letters


def _behind(before: str, whole: str) -> str:
    """What a text has beyond what it shares with the beginning of another."""
    same = (ours == theirs for ours, theirs in zip(before, whole, strict=False))
    return whole[sum(takewhile(bool, same)) :]


class Detokenizer:
    """Says the text of tokens that follow others.

    What `push` and `finish` return, joined, is `decode_after` of all tokens. A character waits for its last byte; where
    tokenizers read a run of byte tokens as a whole, so that one bad byte spoils all, it waits for the run to end.

    Args:
        table: of the tokenizer.
        before: the tokens that stand before.
    """

    def __init__(self, table: TokenTable, before: Sequence[int] = ()) -> None:
        self._table = table
        shown = [token for token in before if table.is_shown(token)]
        # Of the text before, what it ended with and may yet turn out otherwise.
        self._said = ""
        self._text = codecs.getincrementaldecoder("utf-8")("replace")
        self._anchor: list[int] = []
        self._run: list[int] = []
        if table.is_byte_level:
            self._follow_bytes(shown)
        else:
            self._follow_words(shown)

    def push(self, token: int) -> str:
        """The text that is final with one token more."""
        if not self._table.is_shown(token):
            return ""
        if self._table.is_byte_level:
            return self._new(self._text.decode(self._table.raw(token)))
        if self._table.is_byte(token):
            self._run.append(token)
            return ""
        return self._end_run() + self._segment([token])

    def finish(self) -> str:
        """What is left when no token follows."""
        return self._new(self._text.decode(b"", final=True)) if self._table.is_byte_level else self._end_run()

    def _follow_bytes(self, before: list[int]) -> None:
        tail = b""
        for token in reversed(before):
            if len(tail) >= LONGEST_CHARACTER:
                break
            tail = self._table.raw(token) + tail
        self._text.decode(tail)
        held, _ = self._text.getstate()
        self._said = held.decode("utf-8", "replace")

    def _follow_words(self, before: list[int]) -> None:
        run = len(list(takewhile(self._table.is_byte, reversed(before))))
        words = before[: len(before) - run]
        self._anchor, self._run = words[-1:], before[len(words) :]
        if self._run:
            self._said = _behind(self._table.decode(self._anchor), self._table.decode(self._anchor + self._run))

    def _new(self, text: str) -> str:
        """A text without what was said of it before."""
        if text and self._said:
            text, self._said = _behind(self._said, text), ""
        return text

    def _end_run(self) -> str:
        run, self._run = self._run, []
        return self._new(self._segment(run)) if run else ""

    def _segment(self, tokens: list[int]) -> str:
        """The text of tokens that stand together, as it follows that of those before."""
        before = self._table.decode(self._anchor)
        whole = self._table.decode(self._anchor + tokens)
        self._anchor = tokens
        return _behind(before, whole)
