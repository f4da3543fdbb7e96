"""The words that tokens are pieces of."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from thoughtbubbles.support.text import token_pieces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIRST, LATER, OTHER = "first piece", "later piece", "no word"
KINDS = (FIRST, LATER, OTHER)
# What the bytes of half a character are decoded to.
_PARTIAL = "\N{REPLACEMENT CHARACTER}"


def split_words(pieces: Sequence[str]) -> tuple[list[str], list[str]]:
    """What each piece is, one of `KINDS`, and the word that it belongs to in lower case, "" where it is no word.

    A word is a run of pieces that letters or digits join: what begins with one goes on with a word that ends so.
    """
    kinds: list[str] = []
    words: list[list[str]] = []
    for before, piece in zip(["", *pieces], pieces, strict=False):
        if not any(map(_is_letter, piece)):
            kinds.append(OTHER)
            words.append([])
        elif _is_letter(piece[0]) and before and _is_letter(before[-1]):
            kinds.append(LATER)
            words[-1].append(piece)
            words.append(words[-1])
        else:
            kinds.append(FIRST)
            words.append([piece])
    return kinds, ["".join(parts).strip().lower() for parts in words]


def count_words(tokenizer: "PreTrainedTokenizerBase", rows: Iterable[Sequence[int]]) -> Counter[str]:
    """How often each word stands in rows of token ids."""
    counts: Counter[str] = Counter()
    pieces: dict[int, str] = {}
    for row in rows:
        new = list(set(row) - pieces.keys())
        pieces |= zip(new, token_pieces(tokenizer, new), strict=True)
        kinds, words = split_words([pieces[token] for token in row])
        counts.update(word for kind, word in zip(kinds, words, strict=True) if kind == FIRST)
    return counts


def _is_letter(character: str) -> bool:
    return character.isalnum() or character == _PARTIAL
