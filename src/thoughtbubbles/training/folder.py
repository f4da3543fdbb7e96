"""The folder of a run: whose it is, who is at it, and when the run has begun for good."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from thoughtbubbles.data.feed.rundata import RunData
from thoughtbubbles.recipes.training import Recipe, RecipeError, differences, load_recipe
from thoughtbubbles.support.errors import InputError, os_reason
from thoughtbubbles.support.files import LOCK_NAME, claimed, damaged, partial_path, read_as, read_record, write_text
from thoughtbubbles.support.machine import describe_machine

SUMMARY_NAME = "summary.json"
RECIPE_NAME = "recipe.yaml"
METRICS_NAME = "metrics.jsonl"
RUN_NAME = "run.json"
CHECKPOINTS_NAME = "checkpoints"
DIVERGED_NAME = "diverged.json"
LIBRARIES = ("accelerate", "datasets", "numpy")
# Change neither what is trained nor on what: a run may be moved, shared otherwise, and made to need less memory.
FREE = ("output", "sharding", "micro_batch_size", "gradient_checkpointing", "peak_flops", "report_to")
# Of a run that was killed before it had begun.
LEAVINGS = (LOCK_NAME, *(partial_path(Path(name)).name for name in (RUN_NAME, RECIPE_NAME)))


@dataclass(frozen=True)
class RunSummary:
    """What a finished run came to; summary.json in its folder.

    Attributes:
        parameters: of the model, a tied embedding counted once.
        steps: optimizer steps.
        tokens: seen in training.
        training_flops: by `thoughtbubbles.model.accounting`.
        tokens_per_second: in training, evaluations and checkpoints left out, since the last start.
        eval_loss: nats per token, one forward a row, over all validation rows or as many as the recipe says.
        eval_perplexity: exp of it.
        eval_losses: of each corpus and at each further budget, named as in metrics.jsonl.
        eval_leaks: whether these losses are not the likelihood of a left-to-right model (routing `topk`).
        routing: of the model.
        budget: of the model.
    """

    parameters: int
    steps: int
    tokens: int
    training_flops: int
    tokens_per_second: float
    eval_loss: float
    eval_perplexity: float
    eval_losses: dict[str, float]
    eval_leaks: bool
    routing: str
    budget: str

    def write(self, folder: Path) -> None:
        """Write summary.json, whole or not at all."""
        write_text(folder / SUMMARY_NAME, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "RunSummary":
        """Read the summary of a finished run.

        Raises:
            InputError: if it is not as it was written; removed, it is made again by the next start.
        """
        return read_as(cls, folder / SUMMARY_NAME)


@contextmanager
def opened(recipe: Recipe, data: RunData, path: Path, precision: str, device: str) -> Iterator[Callable[[], None]]:
    """The folder of a run, made if it is not there and locked while the block runs.

    The block gets what to call when the first step is taken, after all that a wrong recipe makes fail: it writes
    run.json and recipe.yaml, and from then on the folder is that of this run. Before that nothing stays.

    Args:
        precision: what the run computes in.
        device: the type of device that it trains on.

    Raises:
        InputError: for a folder that cannot be written, that holds something else, a run of another recipe or on other
            data, or one that another process is at.
    """
    from thoughtbubbles.training.checkpoints import clear_leavings

    if path.exists() and not (path / RECIPE_NAME).exists() and _holds_something(path):
        raise RecipeError(f"training.output={path}: expected an empty or new folder, or that of a run to go on with")
    with claimed(path, "training.output", "run", RecipeError):
        begun = (path / RECIPE_NAME).exists()
        if begun:
            check_same_run(recipe, data, path)
            clear_leavings(path / CHECKPOINTS_NAME)
        versions = {library: version(library) for library in LIBRARIES}
        facts = {"data": data.identity, "precision": precision, **describe_machine(device), **versions}

        def begin() -> None:
            nonlocal begun
            if not begun:
                write_text(path / RUN_NAME, json.dumps(facts, indent=2) + "\n")
                write_text(path / RECIPE_NAME, recipe.to_yaml())
            begun = True

        try:
            yield begin
        finally:
            if not begun:
                _leave_nothing(path)


def read_facts(path: Path) -> dict[str, Any]:
    """What run.json says of the run in a folder: at least its data's identity and its precision.

    Raises:
        InputError: if it is not as it was written.
    """
    facts = read_record(path / RUN_NAME)
    for name in ("data", "precision"):
        if not isinstance(facts.get(name), str):
            raise damaged(path / RUN_NAME, f"{name} is missing or no text")
    return facts


def check_same_run(recipe: Recipe, data: RunData, path: Path) -> None:
    """Refuse to go on with the run in a folder if it is of another recipe or on other data.

    Raises:
        InputError: saying what differs, or that a record of the run is damaged.
    """
    facts = read_facts(path)
    # Read as a recipe, so that a key that came into being since has its default.
    stored, ours = (yaml.safe_load(each.to_yaml()) for each in (load_recipe(path / RECIPE_NAME), recipe))
    for key in FREE:
        ours["training"][key] = stored["training"][key]
    for each in (stored, ours):
        if each["training"]["precision"] == "auto":
            each["training"]["precision"] = facts["precision"]
    if changed := list(differences(stored, ours)):
        raise RecipeError(f"training.output={path} holds a run of another recipe: {'; '.join(changed)}")
    if facts["data"] != data.identity:
        raise RecipeError(
            f"training.output={path} holds a run on other data: {data.source} has changed since, expected another "
            "output"
        )


def _holds_something(path: Path) -> bool:
    """Whether a folder holds more than a run leaves that was killed before it had begun.

    Raises:
        RecipeError: if it is no folder, or cannot be read.
    """
    leavings = [*LEAVINGS]
    with suppress(InputError):
        read_facts(path)
        leavings.append(RUN_NAME)
    try:
        others = [entry for entry in path.iterdir() if entry.name not in leavings]
        return any(entry.name != CHECKPOINTS_NAME or any(entry.iterdir()) for entry in others)
    except OSError as error:
        raise RecipeError(f"training.output={path}: {os_reason(error)}, expected a folder") from None


def _leave_nothing(path: Path) -> None:
    """Remove what a run that never began has made in its folder."""
    for name in (RUN_NAME, *LEAVINGS):
        with suppress(OSError):
            (path / name).unlink()
    with suppress(OSError):
        (path / CHECKPOINTS_NAME).rmdir()
