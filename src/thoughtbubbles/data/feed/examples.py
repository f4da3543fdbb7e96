"""Fine-tuning on prompts and completions: rows of a source, or of two."""

from functools import partial
from typing import TYPE_CHECKING

import torch

from thoughtbubbles.data.feed.mixture import BlockMixture
from thoughtbubbles.data.feed.rundata import Batch, RunData, Validation
from thoughtbubbles.data.feed.sft import Example, Examples, Template, read_examples
from thoughtbubbles.data.tokenizer import load_data_tokenizer, vocabulary_size
from thoughtbubbles.model.loading import load_tokenizer, recorded_start_of
from thoughtbubbles.model.loss import IGNORE_INDEX
from thoughtbubbles.recipes.training import FineTuningSection, Recipe, RecipeError
from thoughtbubbles.support.errors import DataError
from thoughtbubbles.support.progress import say
from thoughtbubbles.support.text import record_start

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Of the choice of held-out rows: the same for every training seed, so that runs can be compared.
HOLD_OUT_SEED = 0


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


def load_examples(recipe: Recipe, section: FineTuningSection, progress: bool) -> RunData:
    """Open them, as `loading.load_run_data` does."""
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
