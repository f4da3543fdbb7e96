"""Carries a comparison out: tune, train, measure, report."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from thoughtbubbles.comparison.pool import has_diverged, is_done, run_all, showing
from thoughtbubbles.comparison.runs import Run, RunPlanner
from thoughtbubbles.data.feed.rundata import RunData
from thoughtbubbles.recipes.comparison import Comparison
from thoughtbubbles.support.errors import InputError, RunError, one_line
from thoughtbubbles.support.files import LOCK_NAME, claimed
from thoughtbubbles.training.folder import RECIPE_NAME, SUMMARY_NAME, RunSummary, check_same_run

__all__ = ["carry_out"]


@dataclass(frozen=True)
class Tuned:
    """The learning rate of a variant.

    Attributes:
        losses: validation loss at each rate that was tried; infinite where it overflowed.
        rate: the best of them.
    """

    losses: dict[float, float]
    rate: float

    @property
    def at_edge(self) -> bool:
        """Whether a rate outside of those tried might be better."""
        return len(self.losses) > 1 and self.rate in (min(self.losses), max(self.losses))


@dataclass(frozen=True)
class Progress:
    """How far a comparison is.

    Attributes:
        tuned: by variant; empty where nothing is tuned.
        finished: runs that are trained and measured.
        missing: runs that are not.
        failed: the label of each run that cannot go on, and why.
    """

    tuned: dict[str, Tuned]
    finished: list[Run]
    missing: list[Run]
    failed: dict[str, str]


def carry_out(planner: RunPlanner, jobs: int = 1, progress: bool = True) -> Progress:
    """Tune, train and measure whatever is not done yet.

    Args:
        jobs: runs at a time.
        progress: show progress on standard error.

    Raises:
        InputError: if the folder cannot be written, is in use by another comparison, or holds runs of other recipes or
            on other data, or something else.
        RunError: if the disk is full or fails.
        RunInterrupted: after a signal, when every run is saved.
    """
    comparison = planner.comparison
    _check_output(comparison.output)
    with _claimed(comparison.output):
        tuning = planner.tuning_runs()
        _check_unchanged(tuning, planner.tuning_data)
        with showing("tuning", progress and bool(tuning)) as shown:
            failed = run_all(tuning, None, jobs, shown)
        tuned = _choose(tuning, failed)
        runs = planner.runs({name: each.rate for name, each in tuned.items()})
        _check_unchanged(runs, planner.data)
        with showing("training", progress) as shown:
            failed = run_all(runs, comparison.evaluation, jobs, shown)
    return _progress(tuned, runs, comparison, failed)


def _check_output(folder: Path) -> None:
    if folder.is_dir() and not (folder / LOCK_NAME).exists() and any(folder.iterdir()):
        raise InputError(f"output={folder}: expected a new or empty folder, or that of a comparison to go on with")


@contextmanager
def _claimed(output: Path) -> Iterator[None]:
    """The folder of a comparison, made if it is not there and locked while the block runs."""
    with claimed(output, "output", "comparison", InputError):
        try:
            yield
        except OSError as error:
            raise RunError(f"{output}: {one_line(error)}; start again to go on") from error


def look(planner: RunPlanner) -> Progress:
    """How far a comparison is, without doing anything.

    Raises:
        InputError: if the folder holds runs of other recipes or on other data, or the tuning is not finished.
    """
    tuning = planner.tuning_runs()
    _check_unchanged(tuning, planner.tuning_data)
    tuned = _choose(tuning, {})
    runs = planner.runs({name: each.rate for name, each in tuned.items()})
    _check_unchanged(runs, planner.data)
    return _progress(tuned, runs, planner.comparison, {})


def _progress(tuned: dict[str, Tuned], runs: list[Run], comparison: Comparison, failed: dict[str, str]) -> Progress:
    finished = [run for run in runs if is_done(run, comparison.evaluation)]
    return Progress(tuned, finished, [run for run in runs if run not in finished], failed)


def _check_unchanged(runs: Sequence[Run], data: RunData | None) -> None:
    for run in runs:
        if data is not None and (run.folder / RECIPE_NAME).exists():
            check_same_run(run.recipe, data, run.folder)


def _choose(runs: Sequence[Run], failed: dict[str, str]) -> dict[str, Tuned]:
    """The best rate of each variant.

    Raises:
        InputError: if a variant has an unfinished run, or none whose loss stayed finite.
    """
    losses: dict[str, dict[float, float]] = {}
    for run in runs:
        of_variant = losses.setdefault(run.variant, {})
        if has_diverged(run):
            of_variant[run.recipe.training.learning_rate] = float("inf")
        elif (run.folder / SUMMARY_NAME).exists():
            of_variant[run.recipe.training.learning_rate] = RunSummary.read(run.folder).eval_loss
        else:
            reason = failed.get(run.label, "not finished")
            raise InputError(f"tuning run {run.folder}: {reason}")
    for name, found in losses.items():
        if min(found.values()) == float("inf"):
            raise InputError(f"tuning of {name}: the loss overflowed at every rate, {', '.join(map(str, found))}")
    return {name: Tuned(found, min(found, key=lambda rate: found[rate])) for name, found in losses.items()}
