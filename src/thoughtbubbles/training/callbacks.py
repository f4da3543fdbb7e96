"""What a run reports while it trains: metrics.jsonl and the progress display."""

import json
import math
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from thoughtbubbles.files import write_text


class MetricsWriter(TrainerCallback):
    """Appends one JSON object a line: training rows and evaluation rows.

    Every row has `step`, `tokens` (seen so far) and `flops` (spent on training so far). A training row adds `loss`
    (nats per token, mean since the last row), `learning_rate`, `grad_norm` and `tokens_per_second`; an evaluation
    row `eval_loss` and `eval_perplexity`. Time spent in evaluations and checkpoints is not in the rate.
    """

    def __init__(self, path: Path, tokens_per_step: int, flops_per_step: int) -> None:
        self.path = path
        self.tokens_per_step = tokens_per_step
        self.flops_per_step = flops_per_step
        self.first_step = 0
        self.train_seconds = 0.0
        self._mark = 0.0
        self._window = (0, 0.0)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Drop the rows of steps that an interrupted run took after its last checkpoint."""
        kept = [row for row in read_metrics(self.path) if row["step"] <= state.global_step]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self.first_step = state.global_step
        self._mark = time.perf_counter()
        self._window = (state.global_step, 0.0)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count the time since the last step, evaluation or checkpoint ended."""
        now = time.perf_counter()
        self.train_seconds += now - self._mark
        self._mark = now

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Leave the evaluation's time out."""
        self._mark = time.perf_counter()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Leave the checkpoint's time out."""
        self._mark = time.perf_counter()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write a row."""
        logs = logs or {}
        row: dict[str, float] = {"step": state.global_step, "tokens": state.global_step * self.tokens_per_step}
        row["flops"] = state.global_step * self.flops_per_step
        if "loss" in logs:
            row |= {name: logs[name] for name in ("loss", "learning_rate", "grad_norm") if name in logs}
            row["tokens_per_second"] = self._rate(state.global_step)
        elif "eval_loss" in logs:
            row |= {"eval_loss": logs["eval_loss"], "eval_perplexity": math.exp(min(logs["eval_loss"], 700.0))}
        else:
            return
        if state.is_world_process_zero:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def _rate(self, step: int) -> float:
        steps, seconds = step - self._window[0], self.train_seconds - self._window[1]
        self._window = (step, self.train_seconds)
        return steps * self.tokens_per_step / seconds if seconds > 0 else 0.0


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; none if it is absent. A last line cut short by a kill is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


class ProgressDisplay(TrainerCallback):
    """A bar on a terminal; elsewhere a line at each logging step, so that a log file stays readable."""

    def __init__(self, description: str) -> None:
        self.console = Console(stderr=True, soft_wrap=True)
        self.description = description
        self._notes: dict[str, str] = {}
        self._bar: Progress | None = None
        self._task: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar."""
        if not (state.is_world_process_zero and self.console.is_terminal):
            return
        columns = [TextColumn("{task.description}"), BarColumn(bar_width=24), TaskProgressColumn()]
        times = [TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()]
        self._bar = Progress(*columns, TextColumn("{task.fields[note]}"), *times, console=self.console)
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
        for name, label in (("loss", "loss"), ("eval_loss", "validation")):
            if logs and name in logs:
                self._notes[label] = f"{label} {logs[name]:.3f}"
                if self._bar is None and state.is_world_process_zero:
                    line = f"{self.description}: step {state.global_step}/{state.max_steps}  {self._notes[label]}"
                    self.console.print(line, markup=False, highlight=False)

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
