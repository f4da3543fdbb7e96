"""Tokenizers: train a byte-level BPE or load one, and encode documents fast without changing their tokens."""

import hashlib
import json
import os
import re
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from thoughtbubbles.support.errors import DataError, UnfinishedError, is_network, library_reason
from thoughtbubbles.support.files import user_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
# One token a byte, and the end of text.
MIN_VOCAB_SIZE = 257
# Four times the largest in use. The trainer of the tokenizers library takes 66 bytes a token before it reads any text.
MAX_VOCAB_SIZE = 1 << 20

PIECE_CHARACTERS = 1 << 16
BATCH_CHARACTERS = 1 << 20
BATCH_PIECES = 1 << 12

# What pre-tokenizers of GPT-2's kind split by. None of its alternatives joins white space to a non-space before it,
# and none looks behind: a cut between the two changes no token.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CUT = re.compile(r"\S(?=[ \t\r\n])")

Tokens = npt.NDArray[np.uint32]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> "PreTrainedTokenizerFast":
    """Train a byte-level BPE; the same texts in the same order give the same tokenizer.

    Args:
        texts: the training documents.
        vocab_size: tokens at most, `<|endoftext|>` (id 0, also the bos token) included. A small corpus runs out
            of pairs that occur twice, and gives fewer.

    Raises:
        DataError: as `check_vocab_size`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    check_vocab_size(vocab_size)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((piece for text in texts for piece in cut_at_spaces(text)), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)


def check_vocab_size(vocab_size: int) -> None:
    """Check the size of a vocabulary that is to be trained.

    Raises:
        DataError: it is too small for the bytes and the end of text, or larger than any in use.
    """
    if not MIN_VOCAB_SIZE <= vocab_size <= MAX_VOCAB_SIZE:
        raise DataError(
            f"vocab_size is {vocab_size}: expected at least {MIN_VOCAB_SIZE} (bytes and end of text), "
            f"at most {MAX_VOCAB_SIZE}"
        )


def load_data_tokenizer(name: str | Path) -> "PreTrainedTokenizerFast":
    """Load a tokenizer from a folder that AutoTokenizer reads, or else by its name on the Hugging Face hub.

    Args:
        name: a folder, which is read without the network, or a name such as `openai-community/gpt2`.

    Raises:
        DataError: neither, not a tokenizer, a slow one, or one without an end-of-text (eos) token.
        UnfinishedError: the hub cannot be reached.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    local = str(name) != "" and user_path(name).is_dir()
    if not local and not HUB_NAME.fullmatch(str(name)):
        raise DataError(f"tokenizer {str(name)!r} is not a folder, and no name of a tokenizer on the hub")
    place = user_path(name) if local else name
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(place), local_files_only=local, trust_remote_code=False)
    except Exception as error:  # the libraries raise anything, the bare Exception included
        reason = library_reason(error)
        where = "" if local else " (no such folder; taken for a name on the hub)"
        kind = UnfinishedError if is_network(error) else DataError
        raise kind(f"tokenizer {str(name)!r} cannot be loaded by AutoTokenizer{where}: {reason}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise DataError(f"tokenizer {str(name)!r} is a slow one: expected one with a tokenizer.json")
    if tokenizer.eos_token_id is None:
        raise DataError(f"tokenizer {str(name)!r} has no eos token: expected one, to separate documents")
    return tokenizer


def save_tokenizer(tokenizer: "PreTrainedTokenizerFast", folder: Path) -> None:
    """Save a tokenizer for AutoTokenizer.

    Its `model_max_length` is lifted: that limit belongs to another model, and would make every long document warn.
    """
    from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

    tokenizer.model_max_length = VERY_LARGE_INTEGER
    tokenizer.save_pretrained(str(folder))


def tokenizer_hash(folder: Path) -> str:
    """The sha256 of the folder's tokenizer.json, in hexadecimal."""
    return hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()


def vocabulary_size(tokenizer: "PreTrainedTokenizerFast") -> int:
    """The rows that an embedding needs: one more than the greatest token id."""
    return max(tokenizer.get_vocab().values()) + 1


def cut_at_spaces(text: str) -> Iterator[str]:
    """Cut a text into pieces of about `PIECE_CHARACTERS`, none empty, each but the first starting with white space.

    Of an empty text there is one piece, which is empty too.
    """
    start = 0
    while cut := CUT.search(text, start + PIECE_CHARACTERS):
        yield text[start : cut.end()]
        start = cut.end()
    yield text[start:]


@dataclass(frozen=True)
class EncodedPiece:
    """The tokens of a document, or of a piece of it.

    Attributes:
        document: its key.
        tokens: the token ids.
        bytes: of the text in UTF-8.
        ends: whether the document ends with it.
    """

    document: int
    tokens: Tokens
    bytes: int
    ends: bool


Piece = tuple[int, str, bool]


class Encoder:
    """Encodes documents to token ids, `threads` at a time; the result does not depend on how many.

    Nothing is added to the documents and the text of a special token inside one is ordinary text. A long document
    is cut at white space where that provably changes no token (pre-tokenizers of GPT-2's kind, ours included);
    otherwise it is encoded whole, which takes about 120 bytes of memory a byte of text.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", threads: int) -> None:
        from tokenizers import Tokenizer

        self._threads = threads
        self._backend: Tokenizer = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True
        self._cuts = allows_cuts(json.loads(self._backend.to_str()))

    def encode(self, documents: Iterable[tuple[int, str]]) -> Generator[EncodedPiece, None, None]:
        """Encode (key, text) pairs, in order: the tokens of a document are those of its pieces, one after another."""
        batches = _batches(self._pieces(documents))
        waiting: deque[Future[list[EncodedPiece]]] = deque()
        with _one_core_a_call(), ThreadPoolExecutor(self._threads) as pool:
            try:
                # Two batches a thread keep it busy; more would only fill the memory.
                for batch in islice(batches, 2 * self._threads):
                    waiting.append(pool.submit(self._encode_batch, batch))
                while waiting:
                    yield from waiting.popleft().result()
                    for batch in islice(batches, 1):
                        waiting.append(pool.submit(self._encode_batch, batch))
            finally:
                pool.shutdown(cancel_futures=True)

    def encode_one(self, text: str) -> Tokens:
        """The tokens of a document, encoded in the calling thread."""
        pieces = list(cut_at_spaces(text)) if self._cuts else [text]
        encodings = self._backend.encode_batch_fast(pieces, add_special_tokens=False)
        return np.concatenate([np.array(encoding.ids, dtype=np.uint32) for encoding in encodings])

    def _pieces(self, documents: Iterable[tuple[int, str]]) -> Iterator[Piece]:
        for key, text in documents:
            left = len(text)
            for piece in cut_at_spaces(text) if self._cuts else (text,):
                left -= len(piece)
                yield key, piece, left == 0

    def _encode_batch(self, batch: list[Piece]) -> list[EncodedPiece]:
        encodings = self._backend.encode_batch_fast([text for _, text, _ in batch], add_special_tokens=False)
        return [
            EncodedPiece(document, np.array(encoding.ids, dtype=np.uint32), len(text.encode()), ends)
            for (document, text, ends), encoding in zip(batch, encodings, strict=True)
        ]


def allows_cuts(tokenizer_json: dict[str, Any]) -> bool:
    """Whether cutting a text where white space follows a non-space leaves the tokens of a tokenizer the same."""
    if tokenizer_json["normalizer"] is not None:
        return False
    if any(t["lstrip"] or t["rstrip"] or re.search(r"\s", t["content"]) for t in tokenizer_json["added_tokens"]):
        return False
    match tokenizer_json["pre_tokenizer"]:
        case {"type": "ByteLevel", "use_regex": True, "add_prefix_space": False}:
            return True
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "use_regex": False, "add_prefix_space": False},
            ],
        }:
            return bool(pattern == GPT2_PATTERN)
        case _:
            return False


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece[1])
        if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_PIECES:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


@contextmanager
def _one_core_a_call() -> Iterator[None]:
    """Keep the tokenizers library from spreading every call over all cores: the caller said how many."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
