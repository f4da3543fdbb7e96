"""Preparation: from sources to a folder of training blocks, complete or absent."""

import hashlib
import json
import os
import platform
import secrets
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from thoughtbubbles.data.corpora import PYTHON_STDLIB, Source, read_documents, resolve_source
from thoughtbubbles.data.errors import DataError
from thoughtbubbles.data.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    PACKING,
    Manifest,
    SourceRecord,
    SplitRecord,
    TokenizerRecord,
)
from thoughtbubbles.data.packing import Packed, TokenStore, hold_out, pack, shuffled, token_type
from thoughtbubbles.data.prepared import check_complete
from thoughtbubbles.data.tokenizer import (
    MIN_VOCAB_SIZE,
    Encoder,
    load_tokenizer,
    save_tokenizer,
    tokenizer_hash,
    train_tokenizer,
    vocabulary_size,
)
from thoughtbubbles.progress import Stage, say, stage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Twelve seconds of training on two cores; more text changes a byte-level BPE of usual size little.
TOKENIZER_TRAINING_BYTES = 100_000_000
# Whose versions the manifest names, beside python's.
LIBRARIES = ("datasets", "tokenizers", "transformers")


def prepare(
    output: str | Path,
    sources: Sequence[str] = (PYTHON_STDLIB,),
    *,
    text_field: str = "text",
    tokenizer: str | None = None,
    vocab_size: int = 4096,
    block_size: int = 512,
    validation_fraction: float = 0.05,
    validation: Sequence[str] = (),
    seed: int = 0,
    num_proc: int = 1,
    overwrite: bool = False,
    progress: bool = True,
) -> Manifest:
    """Read documents, tokenise them, and write blocks of token ids for training and validation (Design 4, 7).

    Documents, each after the end-of-text token, are concatenated and cut into blocks, those of train in an order
    shuffled by the seed. Attention and routing credit cross document borders inside a block. The tokens left over
    at the end of a split are dropped and counted. Documents that are empty or not UTF-8 are skipped and counted.

    Validation is held out by document: no text of a validation document is in train. The result depends on the
    sources, the options and the seed alone, not on `num_proc`.

    The folder appears when it is complete: OUTPUT/train and OUTPUT/validation (Arrow, column `input_ids`, fixed
    length, uint16 or int32), OUTPUT/tokenizer and OUTPUT/manifest.json. A failure leaves nothing behind. If the
    folder already holds the same sources, unchanged, with the same options, nothing is done.

    Args:
        output: the folder to write; missing parents are made.
        sources: each `python-stdlib` (the running Python's standard library, a file a document), a text file (one
            document), a folder (every text, parquet and jsonl file below it), a parquet or jsonl file (a row a
            document), or a glob.
        text_field: the field of parquet and jsonl rows that holds the text.
        tokenizer: a folder that AutoTokenizer loads, with an eos token; None trains a byte-level BPE on the
            training documents, or on a sample of them of `TOKENIZER_TRAINING_BYTES`.
        vocab_size: of the trained tokenizer, at most, the end-of-text token included; without effect on another.
        block_size: tokens a block.
        validation_fraction: of the documents, at least one, to hold out; without effect given `validation`.
        validation: sources of validation documents. A document of `sources` that holds the same text as one of
            them is left out.
        seed: of the held-out documents and of the order.
        num_proc: threads that tokenise.
        overwrite: replace a folder prepared with other options.
        progress: show progress bars on standard error.

    Returns:
        The manifest, as in OUTPUT/manifest.json.

    Raises:
        DataError: a source, option or tokenizer that cannot be used, too little text for a block, or an output
            that exists and holds something else.
    """
    _check_options(sources, validation, vocab_size, block_size, validation_fraction, num_proc)
    job = _Job(
        sources=[resolve_source(name) for name in sources],
        validation=[resolve_source(name) for name in validation],
        text_field=text_field,
        given_tokenizer=tokenizer,
        vocab_size=vocab_size,
        validation_fraction=None if validation else validation_fraction,
        block_size=block_size,
        seed=seed,
        num_proc=num_proc,
        progress=progress,
    )
    loaded = None if tokenizer is None else load_tokenizer(tokenizer)
    fingerprint = job.fingerprint(loaded)
    folder = Path(output).expanduser().resolve()
    if (ready := _already_prepared(folder, fingerprint)) is not None:
        say(f"{folder} is already prepared from the same sources with the same options: nothing to do", progress)
        return ready
    _check_output(folder, overwrite)
    with _work_folder(folder) as work:
        manifest = job.run(work, loaded, fingerprint)
        _publish(work, folder)
    return manifest


def _check_options(
    sources: Sequence[str],
    validation: Sequence[str],
    vocab_size: int,
    block_size: int,
    validation_fraction: float,
    num_proc: int,
) -> None:
    for name, value in (("sources", sources), ("validation", validation)):
        if isinstance(value, str):
            raise DataError(f"{name} is the string {value!r}: expected a list of names")
    if not sources:
        raise DataError("sources is empty: expected at least one name")
    if vocab_size < MIN_VOCAB_SIZE:
        raise DataError(f"vocab_size is {vocab_size}: expected at least {MIN_VOCAB_SIZE} (bytes and end of text)")
    if block_size < 2:
        raise DataError(f"block_size is {block_size}: expected at least 2, a token and the next")
    if not 0 < validation_fraction < 1:
        raise DataError(f"validation_fraction is {validation_fraction}: expected more than 0 and less than 1")
    if num_proc < 1:
        raise DataError(f"num_proc is {num_proc}: expected at least 1")


@dataclass(frozen=True)
class _Survey:
    """What a first reading of the sources found.

    Attributes:
        records: one a source, those of validation after the others.
        digests: of each document's text, in reading order.
        sizes: bytes of each document in UTF-8.
    """

    records: list[SourceRecord]
    digests: list[bytes]
    sizes: list[int]

    def bytes(self, documents: Iterable[int]) -> int:
        return sum(self.sizes[index] for index in documents)


@dataclass(frozen=True)
class _Split:
    """The documents of each split, in the order in which they are packed."""

    train: list[int]
    validation: list[int]


@dataclass(frozen=True)
class _Job:
    """The options of one preparation, and its steps."""

    sources: list[Source]
    validation: list[Source]
    text_field: str
    given_tokenizer: str | None
    vocab_size: int
    validation_fraction: float | None
    block_size: int
    seed: int
    num_proc: int
    progress: bool

    def fingerprint(self, tokenizer: "PreTrainedTokenizerFast | None") -> str:
        """Sha256 of all that the result depends on; files by path, size and time of change."""
        facts = {
            "format_version": FORMAT_VERSION,
            "sources": [_files(source) for source in self.sources],
            "validation": [_files(source) for source in self.validation],
            "text_field": self.text_field,
            "tokenizer": (
                {"trained": self.vocab_size}
                if tokenizer is None
                else {"given": tokenizer.backend_tokenizer.to_str(), "eos": tokenizer.eos_token_id}
            ),
            "validation_fraction": self.validation_fraction,
            "block_size": self.block_size,
            "seed": self.seed,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def run(self, work: Path, tokenizer: "PreTrainedTokenizerFast | None", fingerprint: str) -> Manifest:
        """Write everything into the work folder."""
        survey = self._survey()
        split = self._split(survey)
        sample = None
        if tokenizer is None:
            sample = _first_bytes(split.train, survey.sizes, TOKENIZER_TRAINING_BYTES)
            tokenizer = self._train_tokenizer(survey, sample)
        save_tokenizer(tokenizer, work / "tokenizer")
        store = self._tokenise(survey, split, tokenizer, work / "tokens.partial")
        records = {
            name: self._pack(name, order, store, tokenizer, work, survey, fingerprint)
            for name, order in (("train", split.train), ("validation", split.validation))
        }
        (work / "tokens.partial").unlink()
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            fingerprint=fingerprint,
            sources=tuple(survey.records[: len(self.sources)]),
            validation_sources=tuple(survey.records[len(self.sources) :]),
            text_field=self.text_field,
            block_size=self.block_size,
            validation_fraction=self.validation_fraction,
            seed=self.seed,
            vocab_size=vocabulary_size(tokenizer),
            excluded_documents=len(survey.digests) - len(split.train) - len(split.validation),
            packing=PACKING,
            tokenizer=self._tokenizer_record(survey, sample, tokenizer, work / "tokenizer"),
            train=records["train"],
            validation=records["validation"],
            versions={"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
        )
        manifest.write(work)
        return manifest

    def _tokenizer_record(
        self, survey: _Survey, sample: list[int] | None, tokenizer: "PreTrainedTokenizerFast", folder: Path
    ) -> TokenizerRecord:
        return TokenizerRecord(
            name="trained" if self.given_tokenizer is None else self.given_tokenizer,
            sha256=tokenizer_hash(folder),
            eos_token=tokenizer.eos_token,
            eos_token_id=tokenizer.eos_token_id,
            trained_documents=None if sample is None else len(sample),
            trained_bytes=None if sample is None else survey.bytes(sample),
        )

    def _survey(self) -> _Survey:
        """Read every document once, to know how many there are and which are equal."""
        survey = _Survey([], [], [])
        with stage("Reading documents", None, self.progress) as bar:
            for source in (*self.sources, *self.validation):
                survey.records.append(self._survey_source(source, survey, bar))
            bar.show(f"{len(survey.digests):,} documents, {sum(survey.sizes) / 1e6:,.1f} MB")
        return survey

    def _survey_source(self, source: Source, survey: _Survey, bar: Stage) -> SourceRecord:
        first, skipped = len(survey.digests), 0
        for text in read_documents(source, self.text_field):
            if text is None:
                skipped += 1
                continue
            data = text.encode()
            survey.digests.append(_digest(data))
            survey.sizes.append(len(data))
            bar.advance(1, f"{len(survey.digests):,} documents")
        documents = range(first, len(survey.digests))
        if not documents:
            raise DataError(
                f"source {source.name!r} has no documents: {skipped} were skipped because they are empty or not UTF-8"
            )
        size = survey.bytes(documents)
        return SourceRecord(source.name, source.kind, len(source.files), len(documents), size, skipped)

    def _split(self, survey: _Survey) -> _Split:
        everything = range(len(survey.digests))
        ours = everything[: sum(record.documents for record in survey.records[: len(self.sources)])]
        if self.validation_fraction is None:
            validation = list(everything[len(ours) :])
        else:
            validation = hold_out(survey.digests, self.validation_fraction, self.seed)
        held_out = {survey.digests[index] for index in validation}
        train = [i for i in ours if survey.digests[i] not in held_out]
        if not train:
            different = len(set(survey.digests))
            raise DataError(
                f"no documents are left to train on: the sources hold {different} different documents and "
                f"{len(held_out)} are held out for validation, expected more or other sources in `validation`"
            )
        return _Split(shuffled(train, self.seed), validation)

    def _train_tokenizer(self, survey: _Survey, sample: list[int]) -> "PreTrainedTokenizerFast":
        with stage("Training the tokenizer", survey.bytes(sample), self.progress) as bar:

            def texts() -> Iterator[str]:
                for index, text in self._reread(survey, set(sample)):
                    yield text
                    bar.advance(survey.sizes[index], "")

            tokenizer = train_tokenizer(texts(), self.vocab_size)
            bar.show(f"{vocabulary_size(tokenizer):,} tokens in the vocabulary")
        return tokenizer

    def _tokenise(self, survey: _Survey, split: _Split, tokenizer: "PreTrainedTokenizerFast", path: Path) -> TokenStore:
        wanted = {*split.train, *split.validation}
        store = TokenStore(path, len(survey.digests), token_type(vocabulary_size(tokenizer)))
        tokens = 0
        with stage("Tokenising", survey.bytes(wanted), self.progress) as bar, store:
            pieces = Encoder(tokenizer, self.num_proc).encode(self._reread(survey, wanted))
            with closing(pieces):
                for piece in pieces:
                    store.append(piece.document, piece.tokens)
                    tokens += len(piece.tokens)
                    bar.advance(piece.bytes, f"{tokens:,} tokens")
            bar.show(f"{tokens:,} tokens")
        return store

    def _pack(
        self,
        name: str,
        order: list[int],
        store: TokenStore,
        tokenizer: "PreTrainedTokenizerFast",
        work: Path,
        survey: _Survey,
        fingerprint: str,
    ) -> SplitRecord:
        path = work / f"{name}.partial"
        separator = int(tokenizer.eos_token_id)
        with stage(f"Packing {name}", 1, self.progress) as bar:
            packed = pack(store, order, separator, self.block_size, path, name)
            _save_blocks(packed, work / name, f"{fingerprint}-{name}")
            bar.advance(1, "")
            bar.show(f"{len(packed.blocks):,} blocks of {self.block_size}")
        path.unlink()
        return SplitRecord(len(order), survey.bytes(order), packed.tokens, len(packed.blocks), packed.dropped)

    def _reread(self, survey: _Survey, wanted: set[int]) -> Iterator[tuple[int, str]]:
        """The wanted documents again, with their indices.

        Raises:
            DataError: they are not the documents of the survey.
        """
        changed = DataError("a source changed while it was read: prepare again")
        index = 0
        for source in (*self.sources, *self.validation):
            for text in read_documents(source, self.text_field):
                if text is None:
                    continue
                if index >= len(survey.digests) or _digest(text.encode()) != survey.digests[index]:
                    raise changed
                if index in wanted:
                    yield index, text
                index += 1
        if index < len(survey.digests):
            raise changed


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def _files(source: Source) -> list[tuple[str, int, int]]:
    facts = [(str(file), file.stat()) for file in source.files]
    return [(name, fact.st_size, fact.st_mtime_ns) for name, fact in facts]


def _first_bytes(order: list[int], sizes: list[int], limit: int) -> list[int]:
    """The documents at the start of a random order that hold `limit` bytes, or all of them."""
    total = 0
    for count, index in enumerate(order):
        if total >= limit:
            return order[:count]
        total += sizes[index]
    return order


def _save_blocks(packed: Packed, folder: Path, fingerprint: str) -> None:
    import pyarrow
    from datasets import Dataset

    # Built on the file's own memory: nothing is copied before it is written.
    flat = pyarrow.array(packed.blocks.reshape(-1))
    table = pyarrow.table({"input_ids": pyarrow.FixedSizeListArray.from_arrays(flat, packed.blocks.shape[1])})
    with _without_bars_of_datasets():
        Dataset(table, fingerprint=fingerprint).save_to_disk(str(folder))


@contextmanager
def _without_bars_of_datasets() -> Iterator[None]:
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    disabled = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not disabled:
            enable_progress_bars()


def _already_prepared(folder: Path, fingerprint: str) -> Manifest | None:
    try:
        manifest = Manifest.read(folder)
        check_complete(folder, manifest)
    except DataError:
        return None
    return manifest if manifest.fingerprint == fingerprint else None


def _check_output(folder: Path, overwrite: bool) -> None:
    if not folder.exists():
        return
    if not _is_prepared(folder):
        raise DataError(f"output {folder} exists and is not a prepared folder: expected a new path")
    if not overwrite:
        raise DataError(
            f"output {folder} was prepared from other sources or with other options, or is incomplete: "
            "expected a new path, or overwrite"
        )


def _is_prepared(folder: Path) -> bool:
    """Whether a manifest of ours is there, of whatever format version: what may be replaced."""
    try:
        values = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and {"format_version", "fingerprint"} <= values.keys()


@contextmanager
def _work_folder(output: Path) -> Iterator[Path]:
    """A new folder beside the output, removed if it is still there in the end."""
    work = _sibling(output, "partial")
    try:
        work.mkdir(parents=True)
    except OSError as error:
        raise DataError(f"output {output} cannot be written: {error.strerror}") from error
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _publish(work: Path, output: Path) -> None:
    """Give the work folder its name; what had that name is removed last, and comes back if the renaming fails."""
    old = _sibling(output, "old")
    replaces = output.exists()
    if replaces:
        output.rename(old)
    try:
        work.rename(output)
    except BaseException:
        if replaces:
            old.rename(output)
        raise
    if replaces:
        shutil.rmtree(old, ignore_errors=True)


def _sibling(output: Path, suffix: str) -> Path:
    return output.with_name(f".{output.name}.{os.getpid()}-{secrets.token_hex(4)}.{suffix}")
