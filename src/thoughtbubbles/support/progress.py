"""Progress bars of long work: on standard error, plain lines when that is not a terminal."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

REFRESH_SECONDS = 0.1


class Stage:
    """One bar. `advance` is cheap enough to call for every document."""

    def __init__(self, bars: Progress, task: TaskID) -> None:
        self._bars = bars
        self._task = task
        self._done = 0
        self._shown_at = 0.0

    def advance(self, steps: int, note: str) -> None:
        """Move on by `steps`, and say where it stands."""
        self._done += steps
        if (now := time.monotonic()) - self._shown_at > REFRESH_SECONDS:
            self.show(note)
            self._shown_at = now

    def show(self, note: str) -> None:
        """Bring the bar up to date."""
        self._bars.update(self._task, completed=self._done, note=note)


def make_bars(enabled: bool, time_left: bool = False) -> Progress:
    """Bars on standard error, which `start` or a `with` shows; each task has a note.

    Args:
        time_left: also show how long they will take yet.
    """
    columns = (
        TextColumn("{task.description:<24}", markup=False),
        BarColumn(bar_width=30),
        TaskProgressColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        TimeElapsedColumn(),
        *((TextColumn("left"), TimeRemainingColumn()) if time_left else ()),
    )
    return Progress(*columns, console=Console(stderr=True, soft_wrap=True), disable=not enabled)


@contextmanager
def stage(description: str, total: int | None, enabled: bool) -> Iterator[Stage]:
    """A bar with a description and a total, if that is known beforehand."""
    with make_bars(enabled) as bars:
        yield Stage(bars, bars.add_task(description, total=total, note=""))


def is_terminal() -> bool:
    """Whether bars are seen: elsewhere, as in the file of a log, lines are better."""
    return Console(stderr=True).is_terminal


def say(text: str, enabled: bool) -> None:
    """A line beside the bars."""
    if enabled:
        Console(stderr=True, soft_wrap=True).print(text, markup=False, highlight=False)
