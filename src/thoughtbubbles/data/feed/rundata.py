"""What a run trains on and is evaluated on, whatever its task; `loading` opens it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor

from thoughtbubbles.recipes.training import Recipe, RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Batch = dict[str, Tensor]


class Rows(Protocol):
    """A map-style dataset of examples."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


class RowLengths(Protocol):
    """How long the training examples of a run are."""

    @property
    def uniform_length(self) -> int | None:
        """Tokens of every sample; None where they differ."""

    def length(self, index: int) -> int:
        """Tokens of sample `index`."""


class Samples(Rows, RowLengths, Protocol):
    """The training examples of a whole run in their order."""

    def describe(self, index: int) -> str:
        """Where sample `index` comes from, for a person who wants to look at it."""

    def close(self) -> None:
        """Stop what reads ahead."""


@runtime_checkable
class Streamed(Protocol):
    """Training examples that are read once, in order; explained where they are made, in `lanes`."""

    def shared(self, samples: range, batch: int, processes: int, micro: int) -> Iterator[int]:
        """The samples in the order in which processes take them."""

    def save(self, folder: Path, samples: int, main: bool) -> None:
        """Note in a checkpoint's folder where to go on."""

    def load(self, folder: Path) -> None:
        """Go on where a checkpoint says."""


@dataclass(frozen=True)
class Validation:
    """A set to evaluate on.

    Attributes:
        rows: all of it.
        weight: its share in `eval_loss`.
        tokens_per_byte: of its text in UTF-8, special tokens counted; None where that is not known.
    """

    rows: Rows
    weight: float
    tokens_per_byte: float | None = None


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
        answer_end: the token that ends an assistant's answer, where generation stops as at the end of a document; None
            where there are no answers or eos ends them.
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
    answer_end: int | None = None

    def close(self) -> None:
        """Stop what reads ahead of the training."""
        self.samples.close()


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
