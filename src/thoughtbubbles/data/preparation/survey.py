"""Survey: a first reading of the sources, from which the tokenizer is trained before the documents are tokenised."""

import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np
import numpy.typing as npt

from thoughtbubbles.data.sources.corpora import Source
from thoughtbubbles.data.sources.reading import Reader
from thoughtbubbles.data.splitting import Digests, Indices, Mask
from thoughtbubbles.data.tokenizer import save_tokenizer, train_tokenizer, vocabulary_size
from thoughtbubbles.support.errors import DataError
from thoughtbubbles.support.files import replacing, write_text
from thoughtbubbles.support.progress import Stage, stage
from thoughtbubbles.support.sampling import DIGEST_BYTES, digest

# Twelve seconds of training on two cores; more text changes a byte-level BPE of usual size little.
TOKENIZER_TRAINING_BYTES = 100_000_000


@dataclass(frozen=True)
class Survey:
    """What a first reading of the sources found.

    Attributes:
        digests: of each document's text, in reading order.
        sizes: bytes of each document in UTF-8.
        counts: documents of each source.
    """

    digests: Digests
    sizes: npt.NDArray[np.int64]
    counts: list[int]

    @cached_property
    def _starts(self) -> list[int]:
        return [0, *accumulate(self.counts)]

    def holds(self, source: int, number: int, text_digest: bytes) -> bool:
        """Whether document `number` of a source is the one with this digest."""
        index = self._starts[source] + number
        return number < self.counts[source] and self.digests[index].tobytes() == text_digest

    def write(self, folder: Path) -> None:
        """Write the survey as a folder, whole or not at all."""
        with replacing(folder) as partial:
            partial.mkdir()
            np.save(partial / "digests.npy", self.digests)
            np.save(partial / "sizes.npy", self.sizes)
            write_text(partial / "counts.json", json.dumps(self.counts))

    @classmethod
    def read(cls, folder: Path) -> "Survey | None":
        """Read what `write` wrote; None if it is not there."""
        with suppress(OSError, ValueError, EOFError):
            counts = json.loads((folder / "counts.json").read_text(encoding="utf-8"))
            return cls(np.load(folder / "digests.npy"), np.load(folder / "sizes.npy"), counts)
        return None


def survey_sources(sources: Sequence[Source], readers: Mapping[int, Reader], progress: bool) -> Survey:
    """Read every document once, to know how many there are and which are equal.

    Raises:
        DataError: a source that cannot be read, or without documents.
    """
    digests, sizes = bytearray(), array("q")
    counts = []
    with stage("Reading documents", None, progress) as bar:
        for number, source in enumerate(sources):
            before = len(sizes)
            skipped = _survey_source(readers[number], digests, sizes, bar)
            counts.append(len(sizes) - before)
            check_not_empty(source, counts[-1], skipped)
        bar.show(f"{len(sizes):,} documents, {sum(sizes) / 1e6:,.1f} MB")
    found = np.frombuffer(bytes(digests), dtype=f"V{DIGEST_BYTES}")
    return Survey(found, np.array(sizes, dtype=np.int64), counts)


def _survey_source(reader: Reader, digests: bytearray, sizes: "array[int]", bar: Stage) -> int:
    skipped = 0
    for text in reader.documents():
        if text is None:
            skipped += 1
            continue
        data = text.encode()
        digests += digest(data)
        sizes.append(len(data))
        bar.advance(1, f"{len(sizes):,} documents")
    return skipped


@dataclass(frozen=True)
class Sample:
    """What a tokenizer was trained on.

    Attributes:
        documents: how many.
        bytes: of their text in UTF-8.
    """

    documents: int
    bytes: int


def train_on_sample(
    survey: Survey, order: Indices, readers: Mapping[int, Reader], vocab_size: int, folder: Path, progress: bool
) -> Sample:
    """Train a tokenizer on the first documents of a random order, and save it with the sample's size.

    Args:
        survey: of the documents.
        order: those that may be used; the first `TOKENIZER_TRAINING_BYTES` of them are.
        readers: of all sources, by number.
        vocab_size: tokens at most.
        folder: to write, whole or not at all.
        progress: show a bar.

    Raises:
        DataError: the sources are not those of the survey.
    """
    chosen = _first_bytes(order, survey.sizes)
    wanted = np.zeros(len(survey.sizes), dtype=bool)
    wanted[chosen] = True
    total = int(survey.sizes[chosen].sum())
    with stage("Training the tokenizer", total, progress) as bar:
        tokenizer = train_tokenizer(_reread(survey, readers, wanted, bar), vocab_size)
        bar.show(f"{vocabulary_size(tokenizer):,} tokens in the vocabulary")
    sample = Sample(len(chosen), total)
    with replacing(folder) as partial:
        save_tokenizer(tokenizer, partial / "tokenizer")
        write_text(partial / "sample.json", json.dumps(asdict(sample)))
    return sample


def read_sample(folder: Path) -> Sample | None:
    """The size of the sample that a tokenizer saved in `folder` was trained on; None if there is none yet."""
    with suppress(OSError, ValueError, TypeError):
        return Sample(**json.loads((folder / "sample.json").read_text(encoding="utf-8")))
    return None


def check_not_empty(source: Source, documents: int, skipped: int) -> None:
    """Check that a source had documents.

    Raises:
        DataError: it had none.
    """
    if not documents:
        raise DataError(
            f"source {source.name!r} has no documents: {skipped} were skipped because they are empty or not UTF-8"
        )


def changed() -> DataError:
    """The error for sources that a second reading finds other than the first did."""
    return DataError("a source changed while it was read: prepare again")


def _first_bytes(order: Indices, sizes: npt.NDArray[np.int64]) -> Indices:
    """The documents at the start of an order that hold `TOKENIZER_TRAINING_BYTES`, or all of them."""
    return order[: int(np.searchsorted(np.cumsum(sizes[order]), TOKENIZER_TRAINING_BYTES)) + 1]


def _reread(survey: Survey, readers: Mapping[int, Reader], wanted: Mask, bar: Stage) -> Iterator[str]:
    index = 0
    for number, count in enumerate(survey.counts):
        first = index
        for text in readers[number].documents():
            if text is None:
                continue
            if not survey.holds(number, index - first, digest(text.encode())):
                raise changed()
            if wanted[index]:
                yield text
                bar.advance(int(survey.sizes[index]), "")
            index += 1
        if index - first != count:
            raise changed()
