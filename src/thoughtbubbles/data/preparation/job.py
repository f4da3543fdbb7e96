"""A job: the options of one preparation, checked, and what its result depends on."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thoughtbubbles.data.preparation.manifest import FORMAT_VERSION, PACKINGS
from thoughtbubbles.data.preparation.packing import token_type
from thoughtbubbles.data.sources.corpora import FileSource, Source, check_different, resolve_source
from thoughtbubbles.data.sources.identity import stat_facts
from thoughtbubbles.data.tokenizer import check_vocab_size, load_data_tokenizer, vocabulary_size
from thoughtbubbles.recipes.options import Preparation, SourceName
from thoughtbubbles.recipes.values import check_seed
from thoughtbubbles.support.errors import DataError
from thoughtbubbles.support.text import document_separator

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Longer rows no budget is exact for.
MAX_TOKENS = 2**24


@dataclass(frozen=True)
class Job:
    """What to prepare.

    Attributes:
        options: as they were given.
        sources: that their names stand for.
        validation: the same of the validation sources.
        tokenizer: that they name; None where one is trained.
    """

    options: Preparation
    sources: tuple[Source, ...]
    validation: tuple[Source, ...]
    tokenizer: "PreTrainedTokenizerFast | None"

    @property
    def validation_fraction(self) -> float | None:
        """Share of the documents held out; None given validation sources."""
        return None if self.validation else self.options.validation_fraction

    @property
    def everything(self) -> tuple[Source, ...]:
        """The sources, then the validation sources: the order in which all is read and numbered."""
        return (*self.sources, *self.validation)

    @property
    def limits(self) -> list[int | None]:
        """The limit of tokens of each; validation sources have none."""
        return [self.options.limit_tokens] * len(self.sources) + [None] * len(self.validation)

    def fingerprint(self) -> str:
        """Sha256 of all that the result depends on; files by path, size and time of change."""
        options = self.options
        return _hash(
            {
                "format_version": FORMAT_VERSION,
                "sources": [source_facts(source) for source in self.sources],
                "validation": [source_facts(source) for source in self.validation],
                "text_field": options.text_field,
                "tokenizer": (
                    {"trained": options.vocab_size}
                    if self.tokenizer is None
                    else {
                        "given": self.tokenizer.backend_tokenizer.to_str(),
                        "separator": document_separator(self.tokenizer),
                    }
                ),
                "validation_fraction": self.validation_fraction,
                "block_size": options.block_size,
                "packing": options.packing,
                "limit_tokens": options.limit_tokens,
                "seed": options.seed,
            }
        )

    def work_fingerprint(self) -> str:
        """Sha256 of what a work folder depends on: also how datasets are read, for the positions in them."""
        ways = [None if isinstance(source, FileSource) else source.streaming for source in self.everything]
        return _hash({"job": self.fingerprint(), "streaming": ways, "datasets": version("datasets")})


def make_job(options: Preparation) -> Job:
    """Check the options of `prepare`, find its sources and load its tokenizer.

    Raises:
        DataError: an option, source or tokenizer that cannot be used.
    """
    _check_options(options)
    sources, validation = _resolve(options.sources), _resolve(options.validation)
    for source in sources + validation:
        if options.tokenizer is None and not isinstance(source, FileSource) and source.streaming:
            raise DataError(
                f"source {source.name!r} is streamed and would be read twice to train a tokenizer: "
                "expected --tokenizer, or streaming=false"
            )
    tokenizer = None if options.tokenizer is None else load_data_tokenizer(options.tokenizer)
    if tokenizer is not None:
        token_type(vocabulary_size(tokenizer))
    return Job(options, sources, validation, tokenizer)


def _check_options(options: Preparation) -> None:
    for name, value in (("sources", options.sources), ("validation", options.validation)):
        if isinstance(value, str | Mapping):
            raise DataError(f"{name} is {value!r}: expected a list of names")
    check_vocab_size(options.vocab_size)
    if not 2 <= options.block_size <= MAX_TOKENS:
        raise DataError(
            f"block_size is {options.block_size}: expected at least 2, a token and the next, at most {MAX_TOKENS}"
        )
    if not 0 < options.validation_fraction < 1:
        raise DataError(f"validation_fraction is {options.validation_fraction}: expected more than 0 and less than 1")
    if options.packing not in PACKINGS:
        raise DataError(f"packing is {options.packing!r}: expected {' or '.join(PACKINGS)}")
    if options.limit_tokens is not None and options.limit_tokens < 1:
        raise DataError(f"limit_tokens is {options.limit_tokens}: expected at least 1")
    check_seed("seed", options.seed, DataError)
    if not options.sources:
        raise DataError("sources is empty: expected at least one name")


def _resolve(names: Iterable[SourceName]) -> tuple[Source, ...]:
    sources = tuple(resolve_source(name) for name in names)
    check_different(sources)
    return sources


def source_facts(source: Source, files: Callable[[Sequence[Path]], Any] = stat_facts) -> Any:
    """What tells a source from another one, or from itself after its files have changed, as JSON can hold it.

    Args:
        files: tells the files of one from those of another.
    """
    # Left out where there is none, so that what was prepared before there were templates counts as the same.
    template = {} if source.template is None else {"template": source.template}
    if isinstance(source, FileSource):
        return {"files": files(source.files), "field": source.field, **template}
    return {
        **template,
        "hub": str(source.folder or source.dataset),
        "config": source.config,
        "split": source.split,
        "field": source.field,
        "revision": source.revision,
        "data_files": source.data_files,
        "files": files(source.files()),
    }


def _hash(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
