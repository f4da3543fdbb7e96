"""Fine-tuning data: rows of prompts and completions, or of conversations, become examples of tokens."""

import hashlib
import json
import os
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from thoughtbubbles.data.feed.chat import ChatTemplate, Targets, read_messages
from thoughtbubbles.data.preparation.packing import TokenArray, token_type
from thoughtbubbles.data.sources.corpora import Source, resolve_source
from thoughtbubbles.data.sources.formats import Row
from thoughtbubbles.data.sources.hub import missing_field
from thoughtbubbles.data.sources.reading import read_rows
from thoughtbubbles.data.splitting import hold_out
from thoughtbubbles.data.tokenizer import EncodedPiece, Encoder, Tokens, vocabulary_size
from thoughtbubbles.support.errors import DataError
from thoughtbubbles.support.progress import stage
from thoughtbubbles.support.sampling import DIGEST_BYTES, digest
from thoughtbubbles.support.text import start_document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# A literal brace, a field, or a brace that is neither.
MARK = re.compile(r"\{\{|\}\}|\{[^{}]+\}|[{}]")
LITERALS = {"{{": "{", "}}": "}"}

# What is kept of an example: the number of its row in the source, from 1; where its tokens start and end; the digest
# of its text.
EXAMPLE = np.dtype([("row", "<i8"), ("start", "<i8"), ("end", "<i8"), ("digest", f"V{DIGEST_BYTES}")])
PLACES = ("row", "start", "end")

ExampleArray = npt.NDArray[np.void]


class Template:
    """A text with fields of a row in braces, as in `Question: {question}`; `{{` and `}}` stand for braces.

    Args:
        name: what messages call it.
        text: the template.

    Raises:
        DataError: a brace that belongs to no field.
    """

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        self.text = text
        marks = [(mark.start(), mark[0]) for mark in MARK.finditer(text)]
        for place, mark in marks:
            if len(mark) == 1:
                raise DataError(
                    f"{name}={text!r}: character {place + 1} is a brace of no field: expected {{FIELD}}, "
                    "or {{ and }} for braces themselves"
                )
        self.fields = tuple(mark[1:-1] for _, mark in marks if mark not in LITERALS)

    def fill(self, row: Row, place: str) -> str:
        """The text with a row's values in place of the fields.

        Args:
            row: the values, text or numbers; what they hold is inserted as it is, braces too.
            place: names the row in messages.

        Raises:
            DataError: a field that the row lacks, or that holds neither text nor a number.
        """
        return MARK.sub(lambda mark: LITERALS.get(mark[0]) or _as_text(row, mark[0][1:-1], place), self.text)


def _as_text(row: Row, field: str, place: str) -> str:
    if field not in row:
        raise missing_field(place, field, list(row))
    value = row[field]
    if isinstance(value, str):
        return value
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        # Tables write a number that is missing as the one that does not equal itself.
        if value == value:
            return str(value)
        found = "is nan"
    else:
        found = "is null" if value is None else f"holds a {type(value).__name__}"
    raise DataError(f"{place}: field {field!r} {found}, expected text or a number")


@dataclass(frozen=True)
class Example:
    """A prompt and its completion, or a conversation.

    Attributes:
        tokens: [L], what precedes a text, the prompt, the completion, the end of text; or what a chat template writes.
        targets: [L], which of them are to be learnt.
    """

    tokens: TokenArray
    targets: Targets


@dataclass(frozen=True)
class Examples:
    """Examples of a source (a map-style dataset).

    Attributes:
        source: its name.
        tokens: of all examples, one after another.
        targets: which of these are to be learnt.
        table: [examples] of `EXAMPLE`, in the order of the rows.
        too_long: rows left out because they have more tokens than allowed.
    """

    source: str
    tokens: TokenArray
    targets: Targets
    table: ExampleArray
    too_long: int = 0

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Example:
        start, end = (int(self.table[name][index]) for name in PLACES[1:])
        return Example(self.tokens[start:end], self.targets[start:end])

    def __getitems__(self, indices: Sequence[int]) -> list[Example]:
        """Several of them."""
        return [self[index] for index in indices]

    def length(self, index: int) -> int:
        """Tokens of an example."""
        return int(self.table["end"][index] - self.table["start"][index])

    @property
    def longest(self) -> int:
        """Tokens of the longest example."""
        return int((self.table["end"] - self.table["start"]).max())

    def describe(self, index: int) -> str:
        """The source and the row of an example, counted from 1."""
        return f"{self.source}, row {self.table['row'][index]}"

    def fingerprint(self) -> str:
        """A hash of the tokens of all examples in their order, and of which are to be learnt."""
        content = hashlib.blake2b(digest_size=16)
        for example in self:
            content.update(f"{len(example.tokens)} ".encode())
            content.update(example.tokens.astype("<u4").tobytes())
            content.update(example.targets.tobytes())
        return content.hexdigest()

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    def split(self, fraction: float, seed: int) -> tuple["Examples", "Examples"]:
        """Divide them by content: equal ones fall on the same side.

        Args:
            fraction: of the examples to hold out.
            seed: of the choice.

        Returns:
            Those to train on and those held out.

        Raises:
            DataError: none are left to train on.
        """
        held_out = hold_out(self.table["digest"], fraction, seed)
        if held_out.all():
            raise DataError(
                f"no rows are left to train on: the {len(self)} of {self.source} are held out for validation, "
                "expected more different rows or a smaller validation_fraction"
            )
        return self._where(~held_out), self._where(held_out)

    def without(self, others: "Examples") -> "Examples":
        """Those whose text is not among others.

        Raises:
            DataError: none are left.
        """
        known = {each.tobytes() for each in others.table["digest"]}
        new = np.array([each.tobytes() not in known for each in self.table["digest"]], dtype=np.bool_)
        if not new.any():
            raise DataError(
                f"no rows are left to train on: the {len(self)} of {self.source} are all in {others.source} too, "
                "expected another validation_source"
            )
        return self._where(new)

    def _where(self, chosen: npt.NDArray[np.bool_]) -> "Examples":
        return Examples(self.source, self.tokens, self.targets, self.table[chosen], self.too_long)


def read_examples(
    source: str,
    prompt: Template,
    completion: Template,
    tokenizer: "PreTrainedTokenizerFast",
    max_length: int,
    progress: bool = False,
) -> Examples:
    """Read and tokenise the rows of a source; the result does not depend on the number of cores.

    An example is what precedes a text (see `start_document`), the tokens of the prompt, those of the completion and
    the eos token. Prompt and completion are tokenised apart, and the text of a special token inside
    them is ordinary text. All tokens are held in memory, 3 or 5 bytes each.

    Args:
        source: a file, folder, glob or hub dataset of rows, as `resolve_source` takes it.
        prompt: of each row.
        completion: of each row.
        tokenizer: has an eos token.
        max_length: tokens of the longest example; longer ones are left out.
        progress: show a bar.

    Raises:
        DataError: a source that cannot be read, without rows or with none short enough; a completion without a field;
            a row that lacks a field, or whose completion is empty.
    """
    if not completion.fields:
        raise DataError(f"{completion.name}={completion.text!r}: expected a field of the rows, such as {{completion}}")
    found = _rows_of(source)
    ids = start_document(tokenizer), [tokenizer.eos_token_id]
    start, end = (np.array(each, dtype=np.uint32) for each in ids)
    builder = _Builder(tokenizer, max_length)
    with stage("Tokenising rows", None, progress) as bar:
        texts = _texts(found, prompt, completion, builder.digests)
        pieces = _joined(Encoder(tokenizer, os.cpu_count() or 1).encode(texts))
        for number, (asked, answered) in enumerate(zip(pieces, pieces, strict=True), start=1):
            tokens = np.concatenate([start, asked, answered, end])
            builder.add(tokens, np.arange(len(tokens)) >= len(start) + len(asked))
            bar.advance(1, f"{number:,} rows")
        bar.show(f"{builder.rows:,} rows")
    return builder.examples(found.name)


def read_conversations(
    source: str, field: str, tokenizer: "PreTrainedTokenizerFast", max_length: int, progress: bool = False
) -> Examples:
    """Read and tokenise the conversations of a source, of which the assistant's answers are to be learnt.

    Args:
        source: as in `read_examples`.
        field: of the rows, that holds the messages.
        tokenizer: has an eos token and a chat template, which writes all that is in an example.
        max_length: tokens of the longest example; longer ones are left out.
        progress: show a bar.

    Raises:
        DataError: a source that cannot be read, without rows or with none short enough; a tokenizer without a chat
            template; a row that is no conversation, or one that `ChatTemplate.example` cannot use.
    """
    template, found = ChatTemplate(tokenizer), _rows_of(source)
    builder = _Builder(tokenizer, max_length)
    with stage("Tokenising rows", None, progress) as bar:
        for number, row in enumerate(read_rows(found), start=1):
            place = f"{found.name}, row {number}"
            messages = read_messages(row, field, place)
            builder.digests += digest(json.dumps(messages, sort_keys=True, default=str).encode())
            builder.add(*template.example(messages, place))
            bar.advance(1, f"{number:,} rows")
        bar.show(f"{builder.rows:,} rows")
    return builder.examples(found.name)


def holds_field(source: str, field: str) -> bool:
    """Whether the first row of a source has a field.

    Raises:
        DataError: a source that cannot be read.
    """
    return field in next(iter(read_rows(_rows_of(source))), {})


def _rows_of(source: str) -> Source:
    found = resolve_source(source)
    if found.field is not None:
        raise DataError(f"source {source!r}: field={found.field!r} has no use here: the recipe names the fields")
    return found


def _texts(source: Source, prompt: Template, completion: Template, digests: bytearray) -> Iterator[tuple[int, str]]:
    """Prompt and completion of each row, numbered through; the digests of the rows are added to `digests`."""
    for number, row in enumerate(read_rows(source)):
        place = f"{source.name}, row {number + 1}"
        asked, answered = prompt.fill(row, place), completion.fill(row, place)
        if not answered.strip():
            raise DataError(f"{place}: the completion {answered!r} is empty, expected text to learn")
        try:
            digests += digest(digest(asked.encode()) + digest(answered.encode()))
        except UnicodeEncodeError as error:  # a lone surrogate, as JSON can spell it
            raise DataError(f"{place}: {error.object[error.start]!r} is no character, expected Unicode text") from None
        yield 2 * number, asked
        yield 2 * number + 1, answered


def _joined(pieces: Iterable[EncodedPiece]) -> Iterator[Tokens]:
    """The tokens of each text, of which a long one comes in pieces."""
    parts: list[Tokens] = []
    for piece in pieces:
        parts.append(piece.tokens)
        if piece.ends:
            yield np.concatenate(parts)
            parts = []


class _Builder:
    """Collects examples in flat arrays: millions of rows as Python objects would not fit.

    Attributes:
        rows: added so far.
        digests: of the texts of all rows, for whoever adds them.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", max_length: int) -> None:
        self._type = token_type(vocabulary_size(tokenizer))
        self._max_length = max_length
        self._tokens, self._targets = bytearray(), bytearray()
        self._places = array("q")
        self._shortest: int | None = None
        self.rows = 0
        self.digests = bytearray()

    def add(self, tokens: TokenArray, targets: Targets) -> None:
        """Add the example of the next row, if it is not too long."""
        self.rows += 1
        length = len(tokens)
        self._shortest = min(length, self._shortest or length)
        if length > self._max_length:
            return
        first = len(self._targets)
        self._tokens += tokens.astype(self._type).tobytes()
        self._targets += targets.tobytes()
        self._places.extend((self.rows, first, first + length))

    def examples(self, source: str) -> Examples:
        """What was added."""
        if not self.rows:
            raise DataError(f"source {source!r} has no rows")
        if not self._places:
            raise DataError(
                f"source {source!r}: all {self.rows:,} rows are longer than max_length={self._max_length}, expected "
                f"at least {self._shortest}, the tokens of the shortest"
            )
        places = np.frombuffer(self._places, dtype=np.int64).reshape(-1, len(PLACES))
        table: ExampleArray = np.empty(len(places), dtype=EXAMPLE)
        for column, name in enumerate(PLACES):
            table[name] = places[:, column]
        table["digest"] = np.frombuffer(self.digests, dtype=EXAMPLE["digest"])[table["row"] - 1]
        tokens, targets = (np.frombuffer(*each) for each in ((self._tokens, self._type), (self._targets, np.bool_)))
        return Examples(source, tokens, targets, table, self.rows - len(table))
