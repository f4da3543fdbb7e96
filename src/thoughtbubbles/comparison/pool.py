"""Trains and measures the runs of a comparison, several at a time, each in a process of its own."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from pathlib import Path

from rich.progress import Progress, TaskID

from thoughtbubbles.comparison.measuring import Measurements, measure_run, measurement_settings
from thoughtbubbles.comparison.runs import Run
from thoughtbubbles.data.feed.loading import load_run_data
from thoughtbubbles.recipes.comparison import EvaluationSection
from thoughtbubbles.support.errors import InputError, RunError, RunInterrupted, is_out_of_memory
from thoughtbubbles.support.files import LOCK_NAME, sole_user, write_text
from thoughtbubbles.support.machine import keep_freed_memory
from thoughtbubbles.support.metrics import last_metrics
from thoughtbubbles.support.progress import is_terminal, make_bars, say
from thoughtbubbles.support.signals import stop_on_signals
from thoughtbubbles.training.folder import DIVERGED_NAME, METRICS_NAME, SUMMARY_NAME, read_facts

POLL_SECONDS = 0.5
# How long the process of a comparison that was killed may take to save its run.
PATIENCE_SECONDS = 120.0
SECONDS_BETWEEN_LINES = 60.0
FAILED = 1


def run_all(runs: Sequence[Run], evaluation: EvaluationSection | None, jobs: int, display: "Display") -> dict[str, str]:
    """Train what is not trained, and measure what is not measured.

    Returns:
        The label of each run that cannot go on, and why.

    Args:
        evaluation: how to measure the trained models; None only trains.
        jobs: processes at a time; on GPUs each has one of them, in turn.

    Raises:
        RunInterrupted: after a signal, when every run is saved.
    """
    waiting = [run for run in runs if not is_done(run, evaluation) and not has_diverged(run)]
    display.begin(runs, done=len(runs) - len(waiting))
    failed = {run.label: _reason(run) for run in runs if has_diverged(run)}
    working: dict[SpawnProcess, tuple[Run, int]] = {}
    with stop_on_signals() as stop:
        while working or (waiting and not stop.requested):
            while waiting and len(working) < jobs and not stop.requested:
                slot = min(set(range(jobs)) - {slot for _, slot in working.values()})
                run = waiting.pop(0)
                working[_start(run, evaluation, jobs, slot)] = run, slot
                display.started(run)
            wait([process.sentinel for process in working], timeout=POLL_SECONDS)
            if stop.requested:
                _ask_to_stop(working)
            for process in [process for process in working if not process.is_alive()]:
                run, _ = working.pop(process)
                if process.exitcode and not stop.requested:
                    failed[run.label] = _reason(run)
                display.ended(run, failed.get(run.label))
            display.update([run for run, _ in working.values()])
    if stop.requested:
        code = 130 if stop.signal == "SIGINT" else 0
        raise RunInterrupted(f"stopped by {stop.signal}, every run is saved; start again to go on", exit_code=code)
    return failed


def is_done(run: Run, evaluation: EvaluationSection | None) -> bool:
    """Whether a run is trained, and measured as `evaluation` says."""
    if not (run.folder / SUMMARY_NAME).exists():
        return False
    if evaluation is None:
        return True
    identity = read_facts(run.folder)["data"]
    found = Measurements.read(run.folder)
    return found is not None and found.settings == measurement_settings(evaluation, identity)


def has_diverged(run: Run) -> bool:
    """Whether the loss of a run overflowed: the same steps would lead there again."""
    return (run.folder / DIVERGED_NAME).exists() and not (run.folder / SUMMARY_NAME).exists()


def _reason(run: Run) -> str:
    """Why a run cannot go on, in one line."""
    path = _log(run, "error")
    return path.read_text(encoding="utf-8").strip() if path.exists() else f"its process died; see {_log(run, 'log')}"


def _log(run: Run, kind: str) -> Path:
    """Beside the folder of a run, which holds nothing but the run."""
    return run.folder.with_name(f"{run.folder.name}.{kind}")


def _start(run: Run, evaluation: EvaluationSection | None, jobs: int, slot: int) -> SpawnProcess:
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    _log(run, "error").unlink(missing_ok=True)
    process = multiprocessing.get_context("spawn").Process(target=_work, args=(run, evaluation))
    with _environment(jobs, slot):
        process.start()
    return process


@contextmanager
def _environment(jobs: int, slot: int) -> Iterator[None]:
    """The environment of a new process: its share of the cores, and its GPU; both are read when it imports torch."""
    import torch

    values = {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // jobs))}
    if gpus := torch.cuda.device_count():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(index) for index in range(gpus)]
        values["CUDA_VISIBLE_DEVICES"] = names[slot % len(names)]
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _ask_to_stop(working: Iterable[SpawnProcess]) -> None:
    """Have the runs saved; those that do not train yet, or no longer, end at once."""
    for process in working:
        process.terminate()


def _work(run: Run, evaluation: EvaluationSection | None) -> None:
    """What a process of the pool does."""
    from thoughtbubbles.training.run import train

    with _log(run, "log").open("a", encoding="utf-8", buffering=1) as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
        _stop_with_parent()
        _wait_until_free(run.folder)
        keep_freed_memory()
        try:
            train(run.recipe)
            if evaluation is not None and not is_done(run, evaluation):
                _measure(run, evaluation)
        except RunInterrupted:
            return
        except (InputError, RunError) as error:
            write_text(_log(run, "error"), f"{error}\n")
            sys.exit(FAILED)


def _measure(run: Run, evaluation: EvaluationSection) -> None:
    try:
        measure_run(run.folder, load_run_data(run.recipe, progress=False), evaluation)
    except Exception as error:
        if is_out_of_memory(error):
            raise RunError(
                f"out of memory when measuring: evaluation.batch_size={evaluation.batch_size}, expected a smaller one"
            ) from error
        raise


def _stop_with_parent() -> None:
    """Save and stop when the comparison itself was killed, which no signal tells its processes."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    sentinel = parent.sentinel

    def watch() -> None:
        wait([sentinel])
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _wait_until_free(folder: Path) -> None:
    """Wait for the process of a comparison that was killed to save this run."""
    end = time.monotonic() + PATIENCE_SECONDS
    while folder.exists() and time.monotonic() < end:
        # A run that never began takes its folder with it.
        with suppress(FileNotFoundError), sole_user(folder / LOCK_NAME) as alone:
            if alone:
                return
        time.sleep(POLL_SECONDS)


class Display:
    """Shows the runs of a phase: bars on a terminal, a line for each run that starts or ends elsewhere."""

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
            say(text, enabled=True)


@contextmanager
def showing(phase: str, enabled: bool) -> Iterator[Display]:
    """A display while the block runs."""
    terminal = is_terminal()
    with make_bars(enabled and terminal) as bars:
        yield Display(bars, phase, lines=enabled and not terminal)
