"""A job: the options of one preparation, checked, and what its result depends on."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thoughtbubbles.data.preparation.manifest import FORMAT_VERSION
from thoughtbubbles.data.preparation.packing import token_type
from thoughtbubbles.data.sources.corpora import FileSource, Source, check_different, resolve_source
from thoughtbubbles.data.sources.identity import stat_facts
from thoughtbubbles.data.tokenizer import check_vocab_size, load_tokenizer, vocabulary_size
from thoughtbubbles.recipes.values import check_seed
from thoughtbubbles.support.errors import DataError
from thoughtbubbles.support.text import document_separator

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SourceName = str | Mapping[str, Any]
# Longer rows no budget is exact for.
MAX_TOKENS = 2**24


@dataclass(frozen=True)
class Job:
    """What to prepare; the arguments of `prepare` explain the options."""

    sources: tuple[Source, ...]
    validation: tuple[Source, ...]
    text_field: str
    tokenizer_name: str | None
    tokenizer: "PreTrainedTokenizerFast | None"
    vocab_size: int
    block_size: int
    validation_fraction: float | None
    limit_tokens: int | None
    seed: int

    @property
    def everything(self) -> tuple[Source, ...]:
        """The sources, then the validation sources: the order in which all is read and numbered."""
        return (*self.sources, *self.validation)

    @property
    def limits(self) -> list[int | None]:
        """The limit of tokens of each; validation sources have none."""
        return [self.limit_tokens] * len(self.sources) + [None] * len(self.validation)

    def fingerprint(self) -> str:
        """Sha256 of all that the result depends on; files by path, size and time of change."""
        return _hash(
            {
                "format_version": FORMAT_VERSION,
                "sources": [source_facts(source) for source in self.sources],
                "validation": [source_facts(source) for source in self.validation],
                "text_field": self.text_field,
                "tokenizer": (
                    {"trained": self.vocab_size}
                    if self.tokenizer is None
                    else {
                        "given": self.tokenizer.backend_tokenizer.to_str(),
                        "separator": document_separator(self.tokenizer),
                    }
                ),
                "validation_fraction": self.validation_fraction,
                "block_size": self.block_size,
                "limit_tokens": self.limit_tokens,
                "seed": self.seed,
            }
        )

    def work_fingerprint(self) -> str:
        """Sha256 of what a work folder depends on: also how datasets are read, for the positions in them."""
        ways = [None if isinstance(source, FileSource) else source.streaming for source in self.everything]
        return _hash({"job": self.fingerprint(), "streaming": ways, "datasets": version("datasets")})


def make_job(
    sources: Sequence[SourceName],
    validation: Sequence[SourceName],
    *,
    text_field: str,
    tokenizer: str | None,
    vocab_size: int,
    block_size: int,
    validation_fraction: float,
    limit_tokens: int | None,
    seed: int,
) -> Job:
    """Check the options of `prepare`, find its sources and load its tokenizer.

    Raises:
        DataError: an option, source or tokenizer that cannot be used.
    """
    for name, value in (("sources", sources), ("validation", validation)):
        if isinstance(value, str | Mapping):
            raise DataError(f"{name} is {value!r}: expected a list of names")
    _check_numbers(vocab_size, block_size, validation_fraction, limit_tokens)
    check_seed("seed", seed, DataError)
    if not sources:
        raise DataError("sources is empty: expected at least one name")
    found, held_out = _resolve(sources), _resolve(validation)
    for source in found + held_out:
        if tokenizer is None and not isinstance(source, FileSource) and source.streaming:
            raise DataError(
                f"source {source.name!r} is streamed and would be read twice to train a tokenizer: "
                "expected --tokenizer, or streaming=false"
            )
    loaded = None if tokenizer is None else load_tokenizer(tokenizer)
    if loaded is not None:
        token_type(vocabulary_size(loaded))
    return Job(
        sources=found,
        validation=held_out,
        text_field=text_field,
        tokenizer_name=tokenizer,
        tokenizer=loaded,
        vocab_size=vocab_size,
        block_size=block_size,
        validation_fraction=None if validation else validation_fraction,
        limit_tokens=limit_tokens,
        seed=seed,
    )


def _check_numbers(vocab_size: int, block_size: int, validation_fraction: float, limit_tokens: int | None) -> None:
    check_vocab_size(vocab_size)
    if not 2 <= block_size <= MAX_TOKENS:
        raise DataError(f"block_size is {block_size}: expected at least 2, a token and the next, at most {MAX_TOKENS}")
    if not 0 < validation_fraction < 1:
        raise DataError(f"validation_fraction is {validation_fraction}: expected more than 0 and less than 1")
    if limit_tokens is not None and limit_tokens < 1:
        raise DataError(f"limit_tokens is {limit_tokens}: expected at least 1")


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
