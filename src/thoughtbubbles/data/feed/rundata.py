"""What a run trains on and is evaluated on, whatever its task."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from thoughtbubbles.data.feed.heldout import HeldOut
from thoughtbubbles.data.feed.lanes import StreamedBlocks
from thoughtbubbles.data.feed.mixture import BlockMixture
from thoughtbubbles.data.feed.sft import Example, Examples, Template, read_examples
from thoughtbubbles.data.feed.stream import Packing, StreamMixture, check_readable
from thoughtbubbles.data.preparation.job import source_facts
from thoughtbubbles.data.preparation.packing import token_type
from thoughtbubbles.data.preparation.prepared import PreparedData, load_prepared
from thoughtbubbles.data.sources.corpora import check_different, resolve_source
from thoughtbubbles.data.sources.identity import content_facts
from thoughtbubbles.data.sources.reading import open_shards
from thoughtbubbles.data.tokenizer import Encoder, load_data_tokenizer, vocabulary_size
from thoughtbubbles.model.loading import load_tokenizer, recorded_start_of
from thoughtbubbles.model.loss import IGNORE_INDEX
from thoughtbubbles.recipes.training import (
    DataSection,
    FineTuningSection,
    Recipe,
    RecipeError,
    StreamSection,
    stream_lanes,
)
from thoughtbubbles.support.errors import DataError
from thoughtbubbles.support.progress import say
from thoughtbubbles.support.text import record_start

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Batch = dict[str, Tensor]
# Of the choice of held-out rows: the same for every training seed, so that runs can be compared.
HOLD_OUT_SEED = 0


class Rows(Protocol):
    """A map-style dataset of examples."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


class Samples(Rows, Protocol):
    """The training examples of a whole run in their order.

    Attributes:
        uniform_length: tokens of every sample; None where they differ.
    """

    uniform_length: int | None

    def describe(self, index: int) -> str:
        """Where sample `index` comes from, for a person who wants to look at it."""

    def length(self, index: int) -> int:
        """Tokens of sample `index`."""


@dataclass(frozen=True)
class Validation:
    """A set to evaluate on.

    Attributes:
        rows: all of it.
        weight: its share in `eval_loss`.
    """

    rows: Rows
    weight: float


@dataclass(frozen=True)
class RunData:
    """The data of a run.

    Attributes:
        samples: of training; sample i is the same whatever the number of processes.
        validation: the sets to evaluate on, by name.
        eval_rows: rows of each set in the evaluations on the way; None is all.
        final_eval_rows: the same, at the end.
        collate: makes a batch of rows.
        tokenizer: to save with the model.
        vocab_size: rows that an embedding needs.
        longest: tokens of the longest row.
        source: names the data in messages.
        identity: of the data's content: a run is resumed on the same data only.
    """

    samples: Samples
    validation: Mapping[str, Validation]
    eval_rows: int | None
    final_eval_rows: int | None
    collate: Callable[[list[Any]], Batch]
    tokenizer: "PreTrainedTokenizerFast"
    vocab_size: int
    longest: int
    source: str
    identity: str

    def close(self) -> None:
        """Stop what reads ahead of the training."""
        if isinstance(self.samples, StreamedBlocks):
            self.samples.close()


def load_run_data(recipe: Recipe, progress: bool = True, verify: bool = False) -> RunData:
    """Open the data of a recipe.

    Args:
        progress: show how far the checking or tokenising is, and say which rows are not used.
        verify: read prepared folders whole and check them, whatever their size and however often it was done.

    Raises:
        InputError: for data that cannot be used.
    """
    if isinstance(recipe.data, FineTuningSection):
        data = _load_examples(recipe, recipe.data, progress)
    elif isinstance(recipe.data, StreamSection):
        data = _load_stream(recipe, recipe.data, verify, progress)
    else:
        data = _load_blocks(recipe, recipe.data, verify, progress)
    return replace(data, collate=partial(_collate_known, collate=data.collate, data=data))


def _collate_known(rows: list[Any], collate: Callable[[list[Any]], Batch], data: RunData) -> Batch:
    """A batch of rows; all its ids, which are inputs and labels, are in the vocabulary, or else a DataError says so."""
    batch = collate(rows)
    lowest, highest = (int(bound) for bound in batch["input_ids"].aminmax())
    if lowest < 0 or highest >= data.vocab_size:
        raise DataError(
            f"{data.source}: token id {lowest if lowest < 0 else highest}, expected ids from 0 to "
            f"{data.vocab_size - 1}, those of its tokenizer"
        )
    return batch


class _Blocks(BlockMixture):
    """Blocks of prepared corpora."""

    def __init__(self, corpora: Sequence[PreparedData], weights: Sequence[float], seed: int, length: int) -> None:
        super().__init__([corpus.train for corpus in corpora], weights, seed, length)
        self._paths = [corpus.path for corpus in corpora]
        self.uniform_length: int | None = corpora[0].manifest.block_size

    def describe(self, index: int) -> str:
        """The folder and the block."""
        place = self.place(index)
        return f"{self._paths[place.corpus]}/train[{place.block}]"

    def length(self, index: int) -> int:
        """Tokens of a block."""
        assert self.uniform_length is not None
        return self.uniform_length


def _load_blocks(recipe: Recipe, section: DataSection, verify: bool, progress: bool) -> RunData:
    weights = section.mixture or {str(section.path): 1.0}
    corpora = _load_corpora("mixture", weights, verify, progress)
    first = corpora[0].manifest
    blocks = sum(len(corpus.train) for corpus in corpora)
    if recipe.training.batch_size > blocks:
        raise RecipeError(
            f"training.batch_size={recipe.training.batch_size}: expected at most the {blocks} train blocks of "
            f"{', '.join(weights)}"
        )
    samples = recipe.training.steps * recipe.training.batch_size
    validation = _validation(corpora, weights)
    shares = [each.weight for each in validation.values()]
    return RunData(
        samples=_Blocks(corpora, shares, recipe.training.seed, samples),
        validation=validation,
        eval_rows=section.eval_blocks,
        final_eval_rows=section.final_eval_blocks,
        collate=collate_blocks,
        tokenizer=corpora[0].tokenizer(),
        vocab_size=first.vocab_size,
        longest=first.block_size,
        source=", ".join(weights),
        identity=" ".join(corpus.manifest.content for corpus in corpora),
    )


def _load_stream(recipe: Recipe, section: StreamSection, verify: bool, progress: bool) -> RunData:
    corpora = _load_corpora("validation", section.validation, verify, progress)
    manifest, tokenizer = corpora[0].manifest, corpora[0].tokenizer()
    sources = [resolve_source(name) for name in section.stream]
    check_different(sources)
    shards = [open_shards(source, section.text_field) for source in sources]
    check_readable(shards)
    settings = recipe.training
    lanes = stream_lanes(section, settings.batch_size)
    separator = manifest.tokenizer.separator_id
    packing = Packing(
        encoder=Encoder(tokenizer, threads=1),
        separator=separator,
        dtype=token_type(manifest.vocab_size),
        block_size=manifest.block_size,
        held_out=HeldOut(corpora, separator),
        seed=settings.seed,
        lanes=lanes,
        window=max(1, section.shuffle_blocks // lanes),
    )
    blocks = StreamMixture(shards, list(section.stream.values()), packing, settings.steps * settings.batch_size)
    facts = json.dumps([source_facts(source, content_facts) for source in sources], sort_keys=True)
    fingerprints = [corpus.manifest.content for corpus in corpora]
    return RunData(
        samples=StreamedBlocks(blocks, lanes, manifest.block_size),
        validation=_validation(corpora, section.validation),
        eval_rows=section.eval_blocks,
        final_eval_rows=section.final_eval_blocks,
        collate=collate_blocks,
        tokenizer=tokenizer,
        vocab_size=manifest.vocab_size,
        longest=manifest.block_size,
        source=", ".join(section.stream),
        identity=" ".join([hashlib.sha256(facts.encode()).hexdigest(), *fingerprints]),
    )


def _load_corpora(key: str, paths: Iterable[str], verify: bool, progress: bool) -> list[PreparedData]:
    """Prepared folders of one tokenizer and block size, which the recipe names in data.`key`."""
    corpora = [load_prepared(path, verify, progress) for path in paths]
    for corpus in corpora[1:]:
        _check_alike(key, corpora[0], corpus)
    return corpora


def _validation(corpora: Sequence[PreparedData], weights: Mapping[str, float]) -> dict[str, Validation]:
    total = sum(weights.values())
    names = _short_names([corpus.path for corpus in corpora])
    return {
        name: Validation(corpus.validation, weight / total)
        for name, corpus, weight in zip(names, corpora, weights.values(), strict=True)
    }


def _check_alike(key: str, first: PreparedData, other: PreparedData) -> None:
    ours, theirs = first.manifest, other.manifest
    if ours.tokenizer.sha256 != theirs.tokenizer.sha256:
        raise DataError(
            f"data.{key}: {other.path} was prepared with another tokenizer than {first.path}: expected the same one"
        )
    if ours.block_size != theirs.block_size:
        raise DataError(
            f"data.{key}: {other.path} has blocks of {theirs.block_size} tokens, {first.path} of {ours.block_size}: "
            "expected the same size"
        )


def _short_names(paths: Sequence[Path]) -> list[str]:
    """The folders' own names, or their whole paths where two of them are the same."""
    names = [path.name for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def collate_blocks(blocks: list[dict[str, Tensor]]) -> Batch:
    """Stack blocks into a batch {"input_ids", "labels"}, both [B, T] int64.

    The first token of a block is nobody's target: marked as such, it is not counted in the loss's denominator.
    """
    input_ids = torch.stack([block["input_ids"] for block in blocks])
    labels = input_ids.clone()
    labels[:, 0] = IGNORE_INDEX
    return {"input_ids": input_ids, "labels": labels}


class _Examples(BlockMixture):
    """Examples of prompts and completions."""

    def __init__(self, examples: Examples, seed: int, length: int) -> None:
        super().__init__([examples], [1.0], seed, length)
        self._examples = examples
        self.uniform_length: int | None = None

    def describe(self, index: int) -> str:
        """The source and the row."""
        return self._examples.describe(self.place(index).block)

    def length(self, index: int) -> int:
        """Tokens of an example."""
        return self._examples.length(self.place(index).block)


def _load_examples(recipe: Recipe, section: FineTuningSection, progress: bool) -> RunData:
    tokenizer = _fine_tuning_tokenizer(recipe, section)
    train, validation = _read_splits(section, tokenizer, progress)
    settings = recipe.training
    if settings.batch_size > len(train):
        raise RecipeError(
            f"training.batch_size={settings.batch_size}: expected at most the {len(train)} rows of {section.source} "
            "to train on"
        )
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return RunData(
        samples=_Examples(train, settings.seed, settings.steps * settings.batch_size),
        validation={"validation": Validation(validation, 1.0)},
        eval_rows=section.eval_rows,
        final_eval_rows=section.final_eval_rows,
        collate=partial(collate_examples, pad=pad),
        tokenizer=tokenizer,
        vocab_size=vocabulary_size(tokenizer),
        longest=max(train.longest, validation.longest),
        source=section.source,
        identity=f"{train.fingerprint()} {validation.fingerprint()}",
    )


def _fine_tuning_tokenizer(recipe: Recipe, section: FineTuningSection) -> "PreTrainedTokenizerFast":
    """The tokenizer that the recipe names, or that of the model to start from."""
    pretrained = recipe.model.get("pretrained")
    if section.tokenizer is not None:
        named = load_data_tokenizer(section.tokenizer)
        if pretrained is not None and (start := recorded_start_of(pretrained, named)) is not None:
            record_start(named, start)
        return named
    if pretrained is None:
        raise RecipeError(
            "data.tokenizer is missing: expected a tokenizer's folder or hub name, or model.pretrained, whose own is "
            "taken"
        )
    tokenizer = load_tokenizer(pretrained)
    if tokenizer.eos_token_id is None:
        raise DataError(f"model {pretrained}: expected a tokenizer with an eos token beside it")
    return tokenizer


def _read_splits(
    section: FineTuningSection, tokenizer: "PreTrainedTokenizerFast", progress: bool
) -> tuple[Examples, Examples]:
    """The examples to train on and those to evaluate on; no text is in both."""
    prompt, completion = Template("data.prompt", section.prompt), Template("data.completion", section.completion)

    def read(source: str) -> Examples:
        found = read_examples(source, prompt, completion, tokenizer, section.max_length, progress)
        if found.too_long:
            rows = len(found) + found.too_long
            limit = f"max_length={section.max_length}"
            say(f"{source}: {found.too_long:,} of {rows:,} rows left out, longer than {limit}", progress)
        return found

    everything = read(section.source)
    if section.validation_source is None:
        return everything.split(section.validation_fraction, HOLD_OUT_SEED)
    validation = read(section.validation_source)
    train = everything.without(validation)
    if common := len(everything) - len(train):
        say(f"{section.source}: {common:,} rows left out, also in {section.validation_source}", progress)
    return train, validation


def collate_examples(examples: list[Example], pad: int) -> Batch:
    """Pad examples on the right into a batch {"input_ids", "attention_mask", "labels"}, all [B, T] int64.

    T is the longest example's length. The labels are IGNORE_INDEX on separators, prompts and padding.

    Args:
        pad: the token id that stands at padding.
    """
    shape = len(examples), max(len(example.tokens) for example in examples)
    input_ids, labels = torch.full(shape, pad), torch.full(shape, IGNORE_INDEX)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    for row, example in enumerate(examples):
        tokens = torch.from_numpy(example.tokens.astype("int64"))
        input_ids[row, : len(tokens)] = tokens
        attention_mask[row, : len(tokens)] = 1
        labels[row, example.border : len(tokens)] = tokens[example.border :]
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def check_batch(recipe: Recipe, processes: int) -> tuple[int, int]:
    """Rows of one forward pass on one device, and passes to accumulate for an optimizer step.

    Raises:
        RecipeError: if the batch cannot be split so.
    """
    batch, micro = recipe.training.batch_size, recipe.training.micro_batch_size
    if batch % processes:
        raise RecipeError(f"training.batch_size={batch}: expected a multiple of the number of processes, {processes}")
    share = batch // processes
    micro = min(micro or share, share)
    if share % micro:
        raise RecipeError(
            f"training.micro_batch_size={micro}: expected a divisor of {share}, the rows of batch_size={batch} that "
            f"each of {processes} process(es) gets"
        )
    return micro, share // micro
