"""What happens beside the steps of a run: metrics.jsonl, the progress display, thresholds."""

import json
import os
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.progress import Progress
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from thoughtbubbles.model.threshold import update_thresholds
from thoughtbubbles.support.files import write_text
from thoughtbubbles.support.metrics import read_metric_rows
from thoughtbubbles.support.progress import is_terminal, make_bars, say

__all__ = ["ThresholdCallback"]

SECONDS_BETWEEN_LINES = 10.0
MOST_SHOWN = 10


class ThresholdCallback(TrainerCallback):
    """Lets the thresholds of routing `threshold` follow the scores, in any Trainer of transformers."""

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called after each step of the optimizer."""
        update_thresholds(kwargs["model"])


class MetricsWriter(TrainerCallback):
    """Appends one JSON object a line, each on the disk before anything later is: training rows and evaluation rows.

    Every row has `step`, `tokens` (seen so far) and `flops` (spent on training so far). A training row adds `loss`
    (nats per token, mean since the last row) and `perplexity`, `learning_rate`, `grad_norm` (before clipping),
    `tokens_per_second` (evaluations and checkpoints left out), `peak_memory` (bytes) and, of the last step,
    `gate_grad_norm` and the figures of `ForkStatistics`; an evaluation row what `BubbleTrainer.measure` gives.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Drop the rows of steps that an interrupted run took after its last checkpoint, and what is no row."""
        if not (state.is_world_process_zero and self.path.exists()):
            return
        rows, dropped = read_metric_rows(self.path)
        kept = [row for row in rows if row["step"] <= state.global_step]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        if dropped:
            lines = ", ".join(map(str, dropped[:MOST_SHOWN])) + ", ..." * (len(dropped) > MOST_SHOWN)
            say(f"{self.path}: dropped line {lines}: expected rows of numbers, of each step one", enabled=True)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write a row."""
        if state.is_world_process_zero:
            row = {"step": state.global_step, **(logs or {})}
            row.pop("epoch", None)
            self.append(row)

    def append(self, row: Mapping[str, Any]) -> None:
        """Write a row; when this returns it is on the disk, so that no checkpoint is there without the rows before."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())


class ProgressDisplay(TrainerCallback):
    """A bar on a terminal; elsewhere now and then a line, so that a log file stays readable."""

    def __init__(self, description: str) -> None:
        self.description = description
        self._notes: dict[str, str] = {}
        self._bar: Progress | None = None
        self._task: Any = None
        self._first = (0, 0.0)
        self._printed = float("-inf")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar."""
        self._first = (state.global_step, time.monotonic())
        if not (state.is_world_process_zero and is_terminal()):
            return
        self._bar = make_bars(enabled=True, time_left=True)
        self._task = self._bar.add_task(self.description, total=state.max_steps, completed=state.global_step, note="")
        self._bar.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step, note="  ".join(self._notes.values()))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Note the losses, and print them where there is no bar."""
        shown = {"loss": "loss {:.3f}", "eval_loss": "validation {:.3f}", "tokens_per_second": "{:,.0f} tokens/s"}
        self._notes |= {name: text.format(logs[name]) for name, text in shown.items() if logs and name in logs}
        due = time.monotonic() - self._printed > SECONDS_BETWEEN_LINES or "eval_loss" in (logs or {})
        if self._bar is None and state.is_world_process_zero and due:
            self._printed = time.monotonic()
            place = f"{self.description}: step {state.global_step}/{state.max_steps}"
            say("  ".join([place, *self._notes.values(), self._time_left(state)]), enabled=True)

    def _time_left(self, state: TrainerState) -> str:
        steps, start = self._first
        if state.global_step <= steps:
            return ""
        each = (time.monotonic() - start) / (state.global_step - steps)
        return f"left {timedelta(seconds=round(each * (state.max_steps - state.global_step)))}"

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar."""
        self.close()

    def close(self) -> None:
        """Stop drawing; a bar left open would garble an error message."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
