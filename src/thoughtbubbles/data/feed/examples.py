"""Fine-tuning on conversations or on prompts and completions: rows of a source, or of two."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from thoughtbubbles.data.feed.chat import ChatTemplate
from thoughtbubbles.data.feed.joining import JoinedExamples
from thoughtbubbles.data.feed.mixture import BlockMixture
from thoughtbubbles.data.feed.rundata import Batch, RunData, Validation
from thoughtbubbles.data.feed.sft import Example, Examples, Template, holds_field, read_conversations, read_examples
from thoughtbubbles.data.tokenizer import load_data_tokenizer, vocabulary_size
from thoughtbubbles.model.loading import load_tokenizer, recorded_start_of
from thoughtbubbles.model.loss import IGNORE_INDEX
from thoughtbubbles.recipes.training import FineTuningSection, Recipe, RecipeError
from thoughtbubbles.support.errors import DataError, os_reason
from thoughtbubbles.support.progress import say
from thoughtbubbles.support.text import record_start

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Of the choice of held-out rows: the same for every training seed, so that runs can be compared.
HOLD_OUT_SEED = 0
# The field of conversations, where the recipe names none.
MESSAGES = "messages"


class _Examples(BlockMixture):
    """Examples in the order of training."""

    def __init__(self, examples: Examples | JoinedExamples, seed: int, length: int) -> None:
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
    chats = _conversations(section)
    train, validation = _read_splits(section, _reader(section, tokenizer, chats, progress), progress)
    rows = JoinedExamples(train, section.max_length) if section.packing == "packed" else train
    settings = recipe.training
    if settings.batch_size > len(rows):
        raise RecipeError(
            f"training.batch_size={settings.batch_size}: expected at most the {len(rows)} rows of {section.source} "
            f"to train on{', packed' if rows is not train else ''}"
        )
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    end = tokenizer.eos_token_id if chats is None else ChatTemplate(tokenizer).end
    if end is None:
        text = "the chat template ends answers with no special token: only the last of a row has one behind it, eos"
        say(f"{section.source}: {text}", progress)
    return RunData(
        samples=_Examples(rows, settings.seed, settings.steps * settings.batch_size),
        validation={"validation": Validation(validation, 1.0)},
        eval_rows=section.eval_rows,
        final_eval_rows=section.final_eval_rows,
        collate=partial(collate_examples, pad=pad),
        tokenizer=tokenizer,
        vocab_size=vocabulary_size(tokenizer),
        longest=max(rows.longest, validation.longest),
        source=section.source,
        identity=f"{train.fingerprint()} {validation.fingerprint()}",
        answer_end=None if end == tokenizer.eos_token_id else end,
    )


def _fine_tuning_tokenizer(recipe: Recipe, section: FineTuningSection) -> "PreTrainedTokenizerFast":
    """The tokenizer that the recipe names, or that of the model to start from, with the recipe's chat template."""
    tokenizer = _plain_tokenizer(recipe, section)
    if section.chat_template is not None:
        try:
            tokenizer.chat_template = Path(section.chat_template).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            reason = os_reason(error) if isinstance(error, OSError) else f"not UTF-8: {error}"
            raise DataError(f"data.chat_template={section.chat_template}: cannot be read: {reason}") from error
    return tokenizer


def _plain_tokenizer(recipe: Recipe, section: FineTuningSection) -> "PreTrainedTokenizerFast":
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


def _conversations(section: FineTuningSection) -> str | None:
    """The field of conversations; None where the rows are prompts and completions."""
    if section.messages is None and section.prompt is None and section.completion is None:
        return MESSAGES if holds_field(section.source, MESSAGES) else None
    return section.messages


def _reader(
    section: FineTuningSection, tokenizer: "PreTrainedTokenizerFast", chats: str | None, progress: bool
) -> Callable[[str], Examples]:
    """What reads the examples of a source."""

    def read(source: str) -> Examples:
        limit, templates = section.max_length, _templates(section)
        if chats is not None:
            found = read_conversations(source, chats, tokenizer, limit, progress)
        else:
            found = read_examples(source, *templates, tokenizer, limit, progress)
        if found.too_long:
            rows = len(found) + found.too_long
            say(f"{source}: {found.too_long:,} of {rows:,} rows left out, longer than max_length={limit}", progress)
        return found

    return read


def _templates(section: FineTuningSection) -> tuple[Template, Template]:
    prompt, completion = (
        "{prompt}" if section.prompt is None else section.prompt,
        "{completion}" if section.completion is None else section.completion,
    )
    return Template("data.prompt", prompt), Template("data.completion", completion)


def _read_splits(
    section: FineTuningSection, read: Callable[[str], Examples], progress: bool
) -> tuple[Examples, Examples]:
    """The examples to train on and those to evaluate on; no text is in both."""
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

    T is the longest example's length. The labels are IGNORE_INDEX but where an example is to be learnt.

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
        labels[row, : len(tokens)] = tokens.where(torch.tensor(example.targets), IGNORE_INDEX)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
