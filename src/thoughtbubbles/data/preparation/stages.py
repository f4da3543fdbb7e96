"""The run of a preparation: survey, training of a tokenizer, tokenising, packing, one step after another."""

import json
import platform
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from thoughtbubbles.data.preparation.cutting import CutReader, find_cut
from thoughtbubbles.data.preparation.job import Job
from thoughtbubbles.data.preparation.manifest import (
    FORMAT_VERSION,
    PADDED,
    Cut,
    Manifest,
    SourceRecord,
    SplitRecord,
    TokenizerRecord,
)
from thoughtbubbles.data.preparation.packing import Packed, pack, pad, token_type
from thoughtbubbles.data.preparation.shards import Reading, ShardStore
from thoughtbubbles.data.preparation.survey import Sample, Survey, read_sample, survey_sources, train_on_sample
from thoughtbubbles.data.preparation.tokenising import Tokeniser
from thoughtbubbles.data.preparation.verification import hash_folder
from thoughtbubbles.data.preparation.workfolder import RESULT, SHARDS, SURVEY, fresh, has_work
from thoughtbubbles.data.sources.corpora import FileSource, Source
from thoughtbubbles.data.sources.hub import HubSource, newest_commit, quiet_datasets
from thoughtbubbles.data.sources.reading import Reader, open_documents
from thoughtbubbles.data.splitting import Digests, DocumentArray, Indices, Split, split_documents
from thoughtbubbles.data.tokenizer import Encoder, load_data_tokenizer, save_tokenizer, tokenizer_hash, vocabulary_size
from thoughtbubbles.recipes.options import PYTHON_STDLIB
from thoughtbubbles.support.files import write_text
from thoughtbubbles.support.progress import say, stage
from thoughtbubbles.support.text import document_separator, record_start

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Whose versions the manifest names, beside python's.
LIBRARIES = ("datasets", "tokenizers", "transformers")
TRAINED = "trained"


@dataclass(frozen=True)
class Stages:
    """A job at work in its folder, where every step that is done is found and not done again.

    Attributes:
        job: what to do.
        fingerprint: for the manifest.
        work: the work folder.
        threads: that tokenise.
        progress: show bars and lines.
    """

    job: Job
    fingerprint: str
    work: Path
    threads: int
    progress: bool
    _opened: dict[int, Reader] = field(default_factory=dict)

    def manifest(self) -> Manifest:
        """Take all steps; the result is in the work folder, and its manifest is returned.

        Raises:
            DataError: what the sources hold cannot be used.
            UnfinishedError: a source cannot be read now.
        """
        if has_work(self.work):
            say(f"{self.work} holds an earlier start: going on", self.progress)
        cut = self._cut
        survey, sample = self._survey(), None
        if survey is not None:
            sample = self._train_tokenizer(survey)
        result = fresh(self.work / RESULT)
        tokenizer = self._save_tokenizer(result / "tokenizer")
        store = ShardStore(self.work / SHARDS, token_type(vocabulary_size(tokenizer)))
        self._tokenise(store, tokenizer, survey)
        manifest = self._pack(store, tokenizer, survey, sample, cut)
        manifest.write(result)
        return manifest

    def _readers(self, first: int = 0) -> dict[int, Reader]:
        """The sources from number `first` on, opened before any is read: a wrong name shows at once."""
        commits = self._commits()

        def pinned(source: Source) -> Source:
            commit = commits.get(source.name)
            return replace(source, revision=commit) if isinstance(source, HubSource) and commit else source

        for number, source in enumerate(self.job.everything):
            if number >= first and number not in self._opened:
                self._opened[number] = open_documents(pinned(source), self.job.options.text_field, self.progress)
        return self._opened

    @cached_property
    def _cut(self) -> Cut | None:
        """How the only document is cut; None where there are several, or validation sources."""
        job = self.job
        (source, *others) = job.everything
        streamed = isinstance(source, HubSource) and source.streaming
        if others or job.validation_fraction is None or streamed:
            return None
        reader = self._readers()[0]
        cut = find_cut(reader, job.validation_fraction, job.options.block_size)
        if cut is not None:
            say(str(cut), self.progress)
            self._opened[0] = CutReader(reader, job.validation_fraction, job.options.block_size)
        return cut

    def _split(self, digests: Digests, count: int, among: Digests | None = None) -> Split:
        """Divide the documents, of which `count` are of the sources and the rest of the validation sources."""
        if self._cut is not None:
            return Split(train=np.array([0]), validation=np.array([1]))
        return split_documents(digests, count, self.job.validation_fraction, self.job.options.seed, among)

    def _commits(self) -> dict[str, str | None]:
        """The commits of the hub's datasets at the first start: a later one would go on in another text."""
        path = self.work / "commits.json"
        with suppress(OSError, ValueError):
            commits: dict[str, str | None] = json.loads(path.read_text(encoding="utf-8"))
            return commits
        hub = [source for source in self.job.everything if isinstance(source, HubSource)]
        commits = {source.name: newest_commit(source) for source in hub}
        write_text(path, json.dumps(commits))
        return commits

    def _survey(self) -> Survey | None:
        """The survey that the training of a tokenizer needs; None if one is given."""
        if self.job.tokenizer is not None:
            return None
        survey = Survey.read(self.work / SURVEY)
        if survey is None:
            survey = survey_sources(self.job.everything, self._readers(), self.progress)
            survey.write(self.work / SURVEY)
        return survey

    def _train_tokenizer(self, survey: Survey) -> Sample:
        folder = self.work / TRAINED
        sample = read_sample(folder)
        if sample is None:
            job = self.job
            split = self._split(survey.digests, sum(survey.counts[: len(job.sources)]))
            sample = train_on_sample(
                survey, split.train, self._readers(), job.options.vocab_size, folder, self.progress
            )
        return sample

    def _save_tokenizer(self, folder: Path) -> "PreTrainedTokenizerFast":
        given = self.job.tokenizer
        tokenizer = load_data_tokenizer(self.work / TRAINED / "tokenizer") if given is None else given
        record_start(tokenizer, document_separator(tokenizer))
        save_tokenizer(tokenizer, folder)
        return tokenizer

    def _tokenise(self, store: ShardStore, tokenizer: "PreTrainedTokenizerFast", survey: Survey | None) -> None:
        sources = self.job.everything
        found = sum(store.readings(len(sources)), Reading())
        if found.documents:
            say(f"found {found.documents:,} documents and {found.tokens:,} tokens of an earlier start", self.progress)
        total = None if survey is None or self.job.options.limit_tokens else int(survey.sizes.sum())
        readers = self._readers(store.place.source)
        encoder = Encoder(tokenizer, self.threads)
        with stage("Tokenising", total, self.progress) as bar:
            bar.advance(found.bytes, "")
            # The document that reaches a limit is the last, and is read whole: so is the only one.
            limits = [None] if self._cut is not None else self.job.limits
            Tokeniser(store, sources, readers, encoder, limits, survey).run(bar)
            found = sum(store.readings(len(sources)), Reading())
            bar.show(f"{found.documents:,} documents, {found.tokens:,} tokens")

    def _pack(
        self,
        store: ShardStore,
        tokenizer: "PreTrainedTokenizerFast",
        survey: Survey | None,
        sample: Sample | None,
        cut: Cut | None,
    ) -> Manifest:
        job, documents, readings = self.job, store.documents(), store.readings(len(self.job.everything))
        commits = self._commits()
        records = tuple(
            _source_record(source, reading, limit, job.options.text_field, commits.get(source.name))
            for source, reading, limit in zip(job.everything, readings, job.limits, strict=True)
        )
        split = self._split(
            documents["digest"],
            sum(reading.documents for reading in readings[: len(job.sources)]),
            among=survey.digests if survey is not None and job.options.limit_tokens else None,
        )
        marks = document_separator(tokenizer), int(tokenizer.eos_token_id)
        train = self._pack_split("train", split.train, store, documents, *marks)
        validation = self._pack_split("validation", split.validation, store, documents, *marks)
        if cut is not None:
            records = (replace(records[0], documents=1),)
        return Manifest(
            format_version=FORMAT_VERSION,
            fingerprint=self.fingerprint,
            sources=records[: len(job.sources)],
            validation_sources=records[len(job.sources) :],
            text_field=job.options.text_field,
            block_size=job.options.block_size,
            validation_fraction=job.validation_fraction,
            seed=job.options.seed,
            vocab_size=vocabulary_size(tokenizer),
            cut=cut,
            excluded_documents=len(documents) - len(split.train) - len(split.validation),
            packing=job.options.packing,
            tokenizer=_tokenizer_record(job.options.tokenizer, tokenizer, sample, self.work / RESULT / "tokenizer"),
            train=train,
            validation=validation,
            versions={"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
            files=hash_folder(self.work / RESULT),
        )

    def _pack_split(
        self, name: str, order: Indices, store: ShardStore, documents: DocumentArray, separator: int, end: int
    ) -> SplitRecord:
        path = self.work / f"{name}.tokens"
        block_size, dtype = self.job.options.block_size, store.dtype
        tokens, lengths = store.tokens(), documents["tokens"]
        with stage(f"Packing {name}", 1, self.progress) as bar:
            if self.job.options.packing == PADDED:
                packed = pad(tokens, lengths, order, separator, end, dtype, block_size, path, name)
            else:
                packed = pack(tokens, lengths, order, separator, dtype, block_size, path, name)
            _save_blocks(packed, self.work / RESULT / name, f"{self.fingerprint}-{name}")
            bar.advance(1, "")
            bar.show(f"{len(packed.blocks):,} blocks of {block_size}")
        path.unlink()
        size = int(documents["bytes"][order].sum())
        return SplitRecord(len(order), size, packed.tokens, len(packed.blocks), packed.dropped)


def _source_record(
    source: Source, reading: Reading, limit: int | None, text_field: str, commit: str | None
) -> SourceRecord:
    hub = source if isinstance(source, HubSource) else None
    has_rows = not set(source.kind.split("+")) <= {PYTHON_STDLIB, "text"}
    return SourceRecord(
        name=source.name,
        kind=source.kind,
        files=len(source.files) if isinstance(source, FileSource) else None,
        field=(source.field or text_field) if has_rows and source.template is None else None,
        config=hub.config if hub else None,
        split=hub.split if hub else None,
        revision=hub.revision if hub else None,
        commit=commit,
        streaming=hub.streaming if hub else None,
        documents=reading.documents,
        bytes=reading.bytes,
        tokens=reading.tokens,
        skipped=reading.skipped,
        limit_tokens=limit,
        reached_limit=reading.limited,
        template=source.template,
        undecodable=reading.undecodable,
        undecodable_named=reading.named,
        unread_files=dict(source.left_out) if isinstance(source, FileSource) else {},
    )


def _tokenizer_record(
    name: str | None, tokenizer: "PreTrainedTokenizerFast", sample: Sample | None, folder: Path
) -> TokenizerRecord:
    return TokenizerRecord(
        name=TRAINED if name is None else name,
        sha256=tokenizer_hash(folder),
        eos_token=tokenizer.eos_token,
        eos_token_id=tokenizer.eos_token_id,
        separator=str(tokenizer.convert_ids_to_tokens(document_separator(tokenizer))),
        separator_id=document_separator(tokenizer),
        trained_documents=None if sample is None else sample.documents,
        trained_bytes=None if sample is None else sample.bytes,
    )


def _save_blocks(packed: Packed, folder: Path, fingerprint: str) -> None:
    import pyarrow
    from datasets import Dataset

    # Built on the file's own memory: nothing is copied before it is written.
    flat = pyarrow.array(packed.blocks.reshape(-1))
    table = pyarrow.table({"input_ids": pyarrow.FixedSizeListArray.from_arrays(flat, packed.blocks.shape[1])})
    with quiet_datasets():
        Dataset(table, fingerprint=fingerprint).save_to_disk(str(folder))
