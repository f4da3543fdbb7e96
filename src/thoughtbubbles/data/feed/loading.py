"""Opening the data of a recipe, whatever its task; what the other tasks need is not imported."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from thoughtbubbles.data.feed.rundata import Batch, RunData
from thoughtbubbles.recipes.training import FineTuningSection, Recipe, StreamSection
from thoughtbubbles.support.errors import DataError


def load_run_data(recipe: Recipe, progress: bool = True, verify: bool = False) -> RunData:
    """Open the data of a recipe.

    Args:
        progress: show how far the checking or tokenising is, and say which rows are not used.
        verify: read prepared folders whole and check them, whatever their size and however often it was done.

    Raises:
        InputError: for data that cannot be used.
    """
    if isinstance(recipe.data, FineTuningSection):
        from thoughtbubbles.data.feed.examples import load_examples

        data = load_examples(recipe, recipe.data, progress)
    elif isinstance(recipe.data, StreamSection):
        from thoughtbubbles.data.feed.lanes import load_stream

        data = load_stream(recipe, recipe.data, verify, progress)
    else:
        from thoughtbubbles.data.feed.blocks import load_blocks

        data = load_blocks(recipe, recipe.data, verify, progress)
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
