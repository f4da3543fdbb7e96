"""The manifest of prepared data: what is in the folder, and what it was made from."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from thoughtbubbles.data.errors import DataError
from thoughtbubbles.files import write_text

FORMAT_VERSION = 3
MANIFEST_NAME = "manifest.json"
PACKING = (
    "documents, each after the end-of-text token, are concatenated and cut into blocks; "
    "attention and credit cross document borders inside a block"
)


@dataclass(frozen=True)
class SourceRecord:
    """A source that was read.

    Attributes:
        name: as the user wrote it.
        kind: `python-stdlib`, `text`, `parquet`, `jsonl` or several joined by `+`, or `hub`.
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


@dataclass(frozen=True)
class TokenizerRecord:
    """The tokenizer saved with the data.

    Attributes:
        name: the folder or the name on the hub that it came from, or `trained`.
        sha256: of its tokenizer.json, in hexadecimal.
        eos_token: the end-of-text token, which stands before each document.
        eos_token_id: its id.
        trained_documents: how many training documents it was trained on; None if it came from a folder.
        trained_bytes: of their text in UTF-8: a sample where there is more than the trainer needs.
    """

    name: str
    sha256: str
    eos_token: str
    eos_token_id: int
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


@dataclass(frozen=True)
class Manifest:
    """What a prepared folder holds (Design 4).

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
        excluded_documents: left out of train because a validation source holds the same text.
        packing: how documents became blocks, in words.
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
                values[name] = tuple(SourceRecord(**record) for record in values[name])
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
