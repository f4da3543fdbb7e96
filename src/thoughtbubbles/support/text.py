"""Between text and tokens: what precedes a text, how a text is encoded, and how tokens read as text.

All who put a text before a model ask here, so that a model meets what it was trained on.
"""

from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from thoughtbubbles.support.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# In tokenizer_config.json, which goes wherever the tokenizer goes: the token before each document of the training data.
RECORD = "document_start"
# Any text that a tokenizer does not change when something stands beside it.
PROBE = "a"


def start_document(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The tokens that precede a text.

    They are what the data that a model was trained on put before each document, as recorded with its tokenizer.
    Without a record they are the tokenizer's own rule: what it puts before a text by itself, or else its bos token, or
    else its eos token; none where it has neither.

    Raises:
        InputError: for a record that names no token of the vocabulary.
    """
    if (recorded := recorded_start(tokenizer)) is not None:
        return [recorded]
    if own := _put_in_front(tokenizer):
        return own
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return [] if start is None else [int(start)]


def recorded_start(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """The token that the data of a model put before each document; None where nothing is recorded.

    Raises:
        InputError: for a record that names no token of the vocabulary.
    """
    token = tokenizer.init_kwargs.get(RECORD)
    if token is None:
        return None
    known = tokenizer.get_vocab()
    if not isinstance(token, str) or token not in known:
        raise InputError(f"tokenizer_config.json: {RECORD}={token!r}: expected a token of the vocabulary")
    return int(known[token])


def record_start(tokenizer: "PreTrainedTokenizerBase", token: int) -> None:
    """Record with a tokenizer what its data put before each document; saving the tokenizer saves it."""
    tokenizer.init_kwargs[RECORD] = tokenizer.convert_ids_to_tokens(token)


def document_separator(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The token that data in the making puts before each document: the recorded one, or else the eos token.

    The bos token of a tokenizer that says no more was perhaps never trained on.
    """
    recorded = recorded_start(tokenizer)
    return int(tokenizer.eos_token_id) if recorded is None else recorded


def document_ends(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The tokens that end a document: eos, and what stands before the next document."""
    found = [token for token in (tokenizer.eos_token_id, recorded_start(tokenizer)) if token is not None]
    return list(dict.fromkeys(map(int, found)))


def token_list(ends: int | list[int] | None) -> list[int]:
    """The tokens of a setting that names one, several or none."""
    return [] if ends is None else ends if isinstance(ends, list) else [ends]


def text_ends(tokenizer: "PreTrainedTokenizerBase", settings: Any) -> list[int]:
    """The tokens that end what a model writes: those that end a document, and those that its own settings name.

    Args:
        tokenizer: of the model.
        settings: the model's `generation_config`, or None.
    """
    own = token_list(getattr(settings, "eos_token_id", None))
    return list(dict.fromkeys([*document_ends(tokenizer), *map(int, own)]))


def encode_text(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """The tokens of a text as training data has them: nothing is added, the words of a special token are ordinary."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
    return ids


def decode_after(
    tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int], start: int, skip_special_tokens: bool = True
) -> str:
    """The text of the tokens from number `start` on, as it follows the text of those before.

    Decoded by themselves they would lose the space that some tokenizers keep in a word's first token. A character that
    the border cuts belongs to the text.
    """
    parts = (ids, ids[:start])
    whole, before = (str(tokenizer.decode(list(part), skip_special_tokens=skip_special_tokens)) for part in parts)
    same = (ours == theirs for ours, theirs in zip(whole, before, strict=False))
    return whole[sum(takewhile(bool, same)) :]


def decode_continuation(tokenizer: "PreTrainedTokenizerBase", ids: Iterable[int], skip_special_tokens: bool) -> str:
    """The text of tokens that follow some other text, which is not known."""
    anchor = encode_text(tokenizer, PROBE)
    return _decode_behind(tokenizer, anchor, list(ids), skip_special_tokens)


def token_pieces(tokenizer: "PreTrainedTokenizerBase", ids: Iterable[int]) -> list[str]:
    """The text of each token by itself as it is inside a text, special tokens as their words."""
    anchor = encode_text(tokenizer, PROBE)
    return [_decode_behind(tokenizer, anchor, [token], False) for token in ids]


def _decode_behind(
    tokenizer: "PreTrainedTokenizerBase", anchor: list[int], ids: list[int], skip_special_tokens: bool
) -> str:
    def decode(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens))

    before, whole = decode(anchor), decode([*anchor, *ids])
    return whole[len(before) :] if whole.startswith(before) else decode(ids)


def _put_in_front(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """What a tokenizer puts before a text by itself."""
    bare = encode_text(tokenizer, PROBE)
    dressed: Any = tokenizer.encode(PROBE, add_special_tokens=True)
    for start in range(len(dressed) - len(bare) + 1):
        if bare and dressed[start : start + len(bare)] == bare:
            return [int(token) for token in dressed[:start]]
    return []
