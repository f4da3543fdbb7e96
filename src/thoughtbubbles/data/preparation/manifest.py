"""The manifest of prepared data: what is in the folder, and what it was made from."""

import dataclasses
import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from thoughtbubbles.support.errors import DataError
from thoughtbubbles.support.files import write_text

FORMAT_VERSION = 3
MANIFEST_NAME = "manifest.json"
PACKED, PADDED = PACKINGS = ("packed", "padded")


@dataclass(frozen=True)
class SourceRecord:
    """A source that was read.

    Attributes:
        name: as the user wrote it.
        kind: `python-stdlib`, `text`, `parquet`, `jsonl`, `json`, `csv` or several joined by `+`, or `hub`.
        files: files read; None for a dataset of the hub.
        field: of its rows that holds the text; None where there are only text files, or a template.
        config: of a dataset of the hub, None if none was named; so are the four that follow.
        split: of it.
        revision: of it.
        commit: at which the hub had it; None also if the hub did not say.
        streaming: whether it was read without a download.
        documents: documents kept.
        bytes: of their text in UTF-8.
        tokens: of theirs, separators included.
        skipped: documents left out because they are empty or not UTF-8.
        limit_tokens: the reading stopped with the document that reached so many tokens; None is no limit.
        reached_limit: whether it came to that.
        template: that made the texts of its rows; None where a field held them.
        undecodable: how many of those left out are not UTF-8.
        undecodable_named: where the first few of them stand.
        unread_files: files of its folders that are not read, their number by suffix.
    """

    name: str
    kind: str
    files: int | None
    field: str | None
    config: str | None
    split: str | None
    revision: str | None
    commit: str | None
    streaming: bool | None
    documents: int
    bytes: int
    tokens: int
    skipped: int
    limit_tokens: int | None
    reached_limit: bool
    template: str | None = None
    undecodable: int = 0
    undecodable_named: tuple[str, ...] = ()
    unread_files: dict[str, int] = dataclasses.field(default_factory=dict)

    def left_out(self) -> list[str]:
        """What is left out of the source, in lines for a person."""
        lines = []
        if self.undecodable:
            more = ", ..." if self.undecodable > len(self.undecodable_named) else ""
            named = ", ".join(self.undecodable_named) + more
            lines.append(f"{self.name}: {self.undecodable:,} left out that are not UTF-8: {named}")
        if empty := self.skipped - self.undecodable:
            lines.append(f"{self.name}: {empty:,} left out that are empty")
        if self.unread_files:
            kinds = ", ".join(f"{number:,} of {suffix}" for suffix, number in self.unread_files.items())
            lines.append(
                f"{self.name}: {sum(self.unread_files.values()):,} files left out that are no text or rows: {kinds}"
            )
        return lines


@dataclass(frozen=True)
class Cut:
    """Where the only document there was is cut into what is trained on and what is not.

    Attributes:
        train_bytes: of the beginning, which is trained on, in UTF-8.
        gap_bytes: of what follows it and is in neither split.
        validation_bytes: of the rest.
    """

    train_bytes: int
    gap_bytes: int
    validation_bytes: int

    def __str__(self) -> str:
        return (
            f"one document: its first {self.train_bytes:,} bytes are to train on, its last {self.validation_bytes:,} "
            f"for validation, and the {self.gap_bytes:,} between them in neither"
        )


@dataclass(frozen=True)
class TokenizerRecord:
    """The tokenizer saved with the data.

    Attributes:
        name: the folder or the name on the hub that it came from, or `trained`.
        sha256: of its tokenizer.json, in hexadecimal.
        eos_token: its end-of-text token.
        eos_token_id: the id of that.
        separator: the token that stands before each document.
        separator_id: the id of that.
        trained_documents: how many training documents it was trained on; None if it came from a folder.
        trained_bytes: of their text in UTF-8: a sample where there is more than the trainer needs.
    """

    name: str
    sha256: str
    eos_token: str
    eos_token_id: int
    separator: str
    separator_id: int
    trained_documents: int | None
    trained_bytes: int | None


@dataclass(frozen=True)
class SplitRecord:
    """The train or validation split.

    Attributes:
        documents: documents packed.
        bytes: of their text in UTF-8, dropped tokens included.
        tokens: separators (one a document) and dropped ones included: blocks * block_size + dropped_tokens.
        blocks: blocks of block_size tokens.
        dropped_tokens: left over at the end, too few for a block.
    """

    documents: int
    bytes: int
    tokens: int
    blocks: int
    dropped_tokens: int

    @property
    def tokens_per_byte(self) -> float | None:
        """Separators counted; None for a split without text."""
        return self.tokens / self.bytes if self.bytes else None


@dataclass(frozen=True)
class Manifest:
    """What a prepared folder holds.

    Attributes:
        format_version: of the folder's layout.
        fingerprint: sha256 of the options, of files' paths, sizes and times, and of hub datasets' names.
        sources: what was read.
        validation_sources: what was read for validation alone; empty if validation was held out of `sources`.
        text_field: the field of parquet and jsonl rows.
        block_size: tokens a block.
        validation_fraction: of the documents, asked for; None with validation sources.
        seed: of the split and the order.
        vocab_size: rows that an embedding needs.
        cut: where the only document is cut in two; None where whole documents are held out.
        excluded_documents: left out of train because a validation source holds the same text.
        packing: how documents became blocks: `packed`, one after another, or `padded`, each by itself.
        tokenizer: the tokenizer.
        train: the train split.
        validation: the validation split.
        versions: of python and the libraries that made it.
        files: sha256 of every other file of the folder, in hexadecimal, by its path there.
    """

    format_version: int
    fingerprint: str
    sources: tuple[SourceRecord, ...]
    validation_sources: tuple[SourceRecord, ...]
    text_field: str
    block_size: int
    validation_fraction: float | None
    seed: int
    vocab_size: int
    cut: Cut | None
    excluded_documents: int
    packing: str
    tokenizer: TokenizerRecord
    train: SplitRecord
    validation: SplitRecord
    versions: dict[str, str]
    files: dict[str, str]

    @property
    def content(self) -> str:
        """Sha256 of the blocks and the tokenizer: the same wherever the same text was prepared in the same way."""
        parts = [(name, digest) for name, digest in self.files.items() if name.endswith((".arrow", "/tokenizer.json"))]
        return hashlib.sha256(json.dumps(sorted(parts)).encode()).hexdigest()

    @property
    def is_padded(self) -> bool:
        """Whether each document has a row of its own."""
        return self.packing == PADDED

    def remarks(self) -> list[str]:
        """What a person who prepared the data should know, in lines."""
        cut = [] if self.cut is None else [str(self.cut)]
        if self.is_padded and (dropped := self.train.dropped_tokens + self.validation.dropped_tokens):
            cut.append(f"{dropped:,} tokens are left out: the beginnings of documents that are longer than a block")
        return cut + [line for source in (*self.sources, *self.validation_sources) for line in source.left_out()]

    def to_json(self) -> str:
        """The manifest as indented JSON text."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """Read what `to_json` wrote.

        Raises:
            DataError: not a manifest, or one of another format version.
        """
        try:
            values: dict[str, Any] = json.loads(text)
            version = values["format_version"]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise DataError("not a manifest of prepared data: expected JSON with a format_version") from error
        if version != FORMAT_VERSION:
            raise DataError(f"format_version is {version}, expected {FORMAT_VERSION}: prepare the data again")
        try:
            for name in ("sources", "validation_sources"):
                values[name] = tuple(
                    SourceRecord(**{**record, "undecodable_named": tuple(record["undecodable_named"])})
                    for record in values[name]
                )
            values["cut"] = values["cut"] and Cut(**values["cut"])
            for name in ("train", "validation"):
                values[name] = SplitRecord(**values[name])
            values["tokenizer"] = TokenizerRecord(**values["tokenizer"])
            manifest = cls(**values)
            for name, kind in (("block_size", int), ("vocab_size", int), ("fingerprint", str), ("files", dict)):
                if type(values[name]) is not kind:
                    raise TypeError(f"{name} is {values[name]!r}")
            return manifest
        except (TypeError, KeyError) as error:
            raise DataError(f"a broken manifest of prepared data: {error}") from error

    def write(self, folder: Path) -> None:
        """Write the manifest into a folder, whole or not at all."""
        write_text(folder / MANIFEST_NAME, self.to_json())

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read the manifest of a prepared folder.

        Raises:
            DataError: no manifest there, a broken one, or one of another format version.
        """
        path = folder / MANIFEST_NAME
        if not path.is_file():
            raise DataError(f"{folder} is not a prepared folder: it has no {MANIFEST_NAME}")
        try:
            return cls.from_json(path.read_text(encoding="utf-8"))
        except (DataError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: {error}") from error
