"""What happens beside the steps of a run: callbacks, metrics.jsonl, the progress display, trackers, thresholds."""

import json
import os
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import Progress
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from thoughtbubbles.model.threshold import update_thresholds
from thoughtbubbles.support.files import write_text
from thoughtbubbles.support.metrics import read_metric_rows
from thoughtbubbles.support.progress import is_terminal, make_bars, say
from thoughtbubbles.training.session import Callback, MetricsRow, Session

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

__all__ = ["ThresholdCallback"]

SECONDS_BETWEEN_LINES = 10.0
MOST_SHOWN = 10
SHOWN = {
    "loss": "loss {:.3f}",
    "eval_loss": "validation {:.3f}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "mfu": "MFU {:.0%}",
}


class ThresholdCallback(TrainerCallback):
    """Lets the thresholds of routing `threshold` follow the scores, in any Trainer of transformers."""

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called after each step of the optimizer."""
        update_thresholds(kwargs["model"])


class MetricsWriter(Callback):
    """Appends one JSON object a line, each on the disk before anything later is: training rows and evaluation rows.

    Every row has `step`, `tokens` (seen so far) and `flops` (spent on training so far). A training row adds `loss`
    (nats per token, mean since the last row) and `perplexity`, `learning_rate`, `grad_norm` (before clipping),
    `tokens_per_second` (evaluations and checkpoints left out) and `mfu`, `peak_memory` (bytes) and, of the last step,
    `gate_grad_norm` and the figures of `ForkStatistics`; an evaluation row what `validation.measure` gives.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_begin(self, session: Session) -> None:
        """Drop the rows of steps that an interrupted run took after its last checkpoint, and what is no row."""
        if not self.path.exists():
            return
        rows, dropped = read_metric_rows(self.path)
        kept = [row for row in rows if row["step"] <= session.step]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        if dropped:
            lines = ", ".join(map(str, dropped[:MOST_SHOWN])) + ", ..." * (len(dropped) > MOST_SHOWN)
            say(f"{self.path}: dropped line {lines}: expected rows of numbers, of each step one", enabled=True)

    def on_row(self, session: Session, row: MetricsRow) -> None:
        """Write it."""
        self.append(row)

    def append(self, row: MetricsRow) -> None:
        """Write a row; when this returns it is on the disk, so that no checkpoint is there without the rows before."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())


class ProgressDisplay(Callback):
    """A bar on a terminal; elsewhere now and then a line, so that a log file stays readable."""

    def __init__(self, description: str) -> None:
        self.description = description
        self._notes: dict[str, str] = {}
        self._bar: Progress | None = None
        self._task: Any = None
        self._first = (0, 0.0)
        self._printed = float("-inf")

    def on_begin(self, session: Session) -> None:
        """Open the bar."""
        self._first = (session.step, time.monotonic())
        if is_terminal():
            self._bar = make_bars(enabled=True, time_left=True)
            self._task = self._bar.add_task(self.description, total=session.steps, completed=session.step, note="")
            self._bar.start()

    def on_step_end(self, session: Session) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=session.step, note="  ".join(self._notes.values()))

    def on_row(self, session: Session, row: MetricsRow) -> None:
        """Note the losses, and print them where there is no bar."""
        self._notes |= {name: text.format(row[name]) for name, text in SHOWN.items() if name in row}
        due = time.monotonic() - self._printed > SECONDS_BETWEEN_LINES or "eval_loss" in row
        if self._bar is None and due:
            self._printed = time.monotonic()
            place = f"{self.description}: step {session.step}/{session.steps}"
            say("  ".join([place, *self._notes.values(), self._time_left(session)]), enabled=True)

    def _time_left(self, session: Session) -> str:
        first, start = self._first
        if session.step <= first:
            return ""
        each = (time.monotonic() - start) / (session.step - first)
        return f"left {timedelta(seconds=round(each * (session.steps - session.step)))}"

    def on_end(self, session: Session) -> None:
        """Close the bar: left open it would garble an error message."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class Trackers(Callback):
    """Reports every row to trackers of accelerate, which open with the first.

    Args:
        names: tensorboard, wandb, trackio.
        output: folder of the run, whose path names it.
    """

    def __init__(self, names: Sequence[str], output: Path) -> None:
        self._names = names
        self._output = output
        self._open: list[GeneralTracker] = []
        self._first = 0

    def on_begin(self, session: Session) -> None:
        """Note from which step on what an interrupted run reported is not shown."""
        self._first = session.step + (session.step > 0)

    def on_row(self, session: Session, row: MetricsRow) -> None:
        """Report it, evaluations apart from training."""
        if not self._open:
            self._open = [_start_tracker(name, self._output, self._first, session) for name in self._names]
        values = {_tag(name): value for name, value in row.items() if name != "step"}
        for tracker in self._open:
            tracker.log(values, step=session.step)

    def on_end(self, session: Session) -> None:
        """Close them."""
        for tracker in self._open:
            tracker.finish()
        self._open = []


def _tag(name: str) -> str:
    return f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"


def _start_tracker(name: str, output: Path, first: int, session: Session) -> "GeneralTracker":
    from accelerate.tracking import TensorBoardTracker, TrackioTracker, WandBTracker

    project = os.environ.get(f"{name.upper()}_PROJECT", "thoughtbubbles")
    tracker: GeneralTracker
    if name == "tensorboard":
        tracker = TensorBoardTracker(name, output, purge_step=first)
    elif name == "wandb":
        tracker = WandBTracker(project, name=str(output), dir=str(output))
    else:
        tracker = TrackioTracker(project, name=str(output), resume="allow")
    tracker.start()
    if name != "tensorboard":
        tracker.store_init_configuration(session.recipe.to_dict())
    return tracker
