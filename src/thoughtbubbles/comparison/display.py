"""How far a comparison is: bars on a terminal, a line for each run that starts or ends elsewhere."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

from thoughtbubbles.comparison.runs import Run
from thoughtbubbles.support.metrics import last_metrics
from thoughtbubbles.training.folder import METRICS_NAME

SECONDS_BETWEEN_LINES = 60.0


class Display:
    """Shows the runs of a phase."""

    def __init__(self, bars: Progress, phase: str, lines: bool) -> None:
        self._bars = bars
        self._lines = lines
        self._phase = phase
        self._count = self._done = 0
        self._whole: TaskID | None = None
        self._tasks: dict[Path, TaskID] = {}
        self._printed = time.monotonic()

    def begin(self, runs: Sequence[Run], done: int) -> None:
        """So many runs there are, of which some are done."""
        self._count, self._done = len(runs), done
        self._whole = self._bars.add_task(self._phase, total=len(runs), completed=done, note=f"{done}/{len(runs)} runs")
        self._say(f"{self._phase}: {len(runs)} runs, {done} of them finished")

    def started(self, run: Run) -> None:
        """A run began or goes on."""
        self._tasks[run.folder] = self._bars.add_task(f"  {run.label}", total=run.recipe.training.steps, note="")
        self._say(f"{run.label}: started")

    def update(self, runs: Sequence[Run]) -> None:
        """Look how far the runs are that are at work."""
        places = [f"{run.label} {self._look(run)}" for run in runs]
        if time.monotonic() - self._printed > SECONDS_BETWEEN_LINES:
            self._say("; ".join(places))

    def ended(self, run: Run, reason: str | None) -> None:
        """A run finished, or cannot go on for a reason."""
        self._bars.remove_task(self._tasks.pop(run.folder))
        self._done += reason is None
        if self._whole is not None:
            self._bars.update(self._whole, completed=self._done, note=f"{self._done}/{self._count} runs")
        if reason is not None:
            self._bars.console.print(f"{run.label}: {reason}", markup=False, highlight=False)
        else:
            self._say(f"{run.label}: ended ({self._done}/{self._count})")

    def _look(self, run: Run) -> str:
        row, steps = last_metrics(run.folder / METRICS_NAME), run.recipe.training.steps
        step = row.get("step", 0)
        note = "measuring" if step == steps else f"step {step}/{steps}"
        self._bars.update(self._tasks[run.folder], completed=step, note=note)
        return note

    def _say(self, text: str) -> None:
        if self._lines and text:
            self._printed = time.monotonic()
            self._bars.console.print(text, markup=False, highlight=False)


@contextmanager
def display(phase: str, enabled: bool) -> Iterator[Display]:
    """A display while the block runs."""
    console = Console(stderr=True, soft_wrap=True)
    columns = (
        TextColumn("{task.description:<32}", markup=False),
        BarColumn(bar_width=30),
        TaskProgressColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=not enabled or not console.is_terminal) as bars:
        yield Display(bars, phase, lines=enabled and not console.is_terminal)
