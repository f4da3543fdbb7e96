"""Training on blocks of prepared folders, and evaluating on theirs."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from thoughtbubbles.data.feed.mixture import BlockMixture
from thoughtbubbles.data.feed.rundata import Batch, RunData, Validation
from thoughtbubbles.data.preparation.prepared import PreparedData, load_prepared
from thoughtbubbles.model.loss import IGNORE_INDEX
from thoughtbubbles.recipes.training import DataSection, Recipe, RecipeError
from thoughtbubbles.support.errors import DataError


class _Blocks(BlockMixture):
    """Blocks of prepared corpora."""

    def __init__(self, corpora: Sequence[PreparedData], weights: Sequence[float], seed: int, length: int) -> None:
        super().__init__([corpus.train for corpus in corpora], weights, seed, length)
        self._paths = [corpus.path for corpus in corpora]
        padded = any(corpus.manifest.is_padded for corpus in corpora)
        self.uniform_length = None if padded else corpora[0].manifest.block_size
        self._lengths = [corpus.train_lengths() for corpus in corpora] if padded else []

    def describe(self, index: int) -> str:
        """The folder and the block."""
        place = self.place(index)
        return f"{self._paths[place.corpus]}/train[{place.block}]"

    def length(self, index: int) -> int:
        """Tokens of a block."""
        if self.uniform_length is not None:
            return self.uniform_length
        place = self.place(index)
        return int(self._lengths[place.corpus][place.block])


def load_blocks(recipe: Recipe, section: DataSection, verify: bool, progress: bool) -> RunData:
    """Open them, as `loading.load_run_data` does."""
    weights = section.mixture or {str(section.path): 1.0}
    corpora = load_corpora("mixture", weights, verify, progress)
    first = corpora[0].manifest
    blocks = sum(len(corpus.train) for corpus in corpora)
    if recipe.training.batch_size > blocks:
        raise RecipeError(
            f"training.batch_size={recipe.training.batch_size}: expected at most the {blocks} train blocks of "
            f"{', '.join(weights)}"
        )
    if recipe.training.compile != "none":
        for corpus in corpora:
            corpus.check_packed(f"training.compile={recipe.training.compile}: {corpus.path}")
    samples = recipe.training.steps * recipe.training.batch_size
    validation = validation_of(corpora, weights)
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


def load_corpora(key: str, paths: Iterable[str], verify: bool, progress: bool) -> list[PreparedData]:
    """Prepared folders of one tokenizer and block size, which the recipe names in data.`key`."""
    corpora = [load_prepared(path, verify, progress) for path in paths]
    for corpus in corpora[1:]:
        _check_alike(key, corpora[0], corpus)
    return corpora


def validation_of(corpora: Sequence[PreparedData], weights: Mapping[str, float]) -> dict[str, Validation]:
    """The validation splits, weighed as the corpora are."""
    total = sum(weights.values())
    names = _short_names([corpus.path for corpus in corpora])
    return {
        name: Validation(corpus.validation, weight / total, corpus.manifest.validation.tokens_per_byte)
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

    The first token of a block is nobody's target: marked as such, it is not counted in the loss's denominator. Rows of
    several lengths are padded on the right, and there is an "attention_mask" [B, T] too.
    """
    rows = [block["input_ids"] for block in blocks]
    input_ids = pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(input_ids.shape[1]) < lengths[:, None]
    labels = input_ids.where(mask, IGNORE_INDEX)
    labels[:, 0] = IGNORE_INDEX
    batch = {"input_ids": input_ids, "labels": labels}
    return batch if mask.all() else {**batch, "attention_mask": mask.long()}
