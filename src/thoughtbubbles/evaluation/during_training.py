"""Benchmark scores at the evaluations of a training run: `training.eval_tasks` of a recipe."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from thoughtbubbles.evaluation.benchmarks import Benchmark, LoadedBenchmark, check_files, load_benchmark, parse_tasks
from thoughtbubbles.evaluation.harness import adapter, require_harness
from thoughtbubbles.evaluation.scoring import quiet_harness, run_task
from thoughtbubbles.recipes.training import Recipe
from thoughtbubbles.training.callbacks import MetricsWriter
from thoughtbubbles.training.session import MetricsRow, Session

TASKS_NAME = "tasks.jsonl"


class TaskScores(MetricsWriter):
    """Appends a JSON object a line to tasks.jsonl at each evaluation of a run.

    It has `step` and, named TASK/PROTOCOL/METRIC, the scores at the model's own budget; with `_stderr` behind the name
    their standard errors.

    A fine-tuned model is asked as it was taught, without worked examples.

    Args:
        path: of tasks.jsonl.
        benchmarks: what to score.
        data_dir: folder of their files; None takes them from the hub.
        limit: documents of each.
        taught: whether the run fine-tunes on prompts and completions.
    """

    def __init__(
        self, path: Path, benchmarks: Sequence[Benchmark], data_dir: Path | None, limit: int, taught: bool
    ) -> None:
        super().__init__(path)
        self.benchmarks = benchmarks
        self.data_dir = data_dir
        self.limit = limit
        self.taught = taught
        self._loaded: list[LoadedBenchmark] = []

    def on_begin(self, session: Session) -> None:
        """Drop rows as `MetricsWriter` does, and open the benchmarks."""
        if not session.state.is_main_process:
            return
        super().on_begin(session)
        shots = 0 if self.taught else None
        with quiet_harness(progress=False):
            self._loaded = [load_benchmark(each, self.data_dir, shots) for each in self.benchmarks]

    def on_row(self, session: Session, row: MetricsRow) -> None:
        """What the run logs is in metrics.jsonl."""

    def on_evaluate(self, session: Session) -> None:
        """Score the model as it is, and write a row."""
        if not session.state.is_main_process:
            return
        row: dict[str, float | None] = {"step": session.step}
        session.model.eval()
        # Of a compiled model too: rows of all lengths and caches would each want a graph.
        with quiet_harness(progress=False), torch.compiler.set_stance("force_eager"):
            lm = adapter()(
                session.model,
                tokenizer=session.data.tokenizer,
                batch_size=session.micro_batch_size,
                mixed_precision_dtype="bfloat16" if session.precision == "bfloat16" else None,
            )
            for benchmark in self._loaded:
                record = run_task(lm, benchmark, session.model.config.exact_budget(), self.limit)
                for metric in record.metrics:
                    name, scores = f"{record.task}/{metric.protocol}/{metric.metric}", record.scores(metric)
                    error = scores.standard_error
                    row |= {name: scores.estimate, f"{name}_stderr": None if math.isnan(error) else error}
        self.append(row)


def task_scores(recipe: Recipe) -> list[TaskScores]:
    """The callback that a recipe asks for, if it does.

    Raises:
        InputError: no harness, unknown tasks, or files that are missing.
    """
    settings = recipe.training
    if settings.eval_tasks is None:
        return []
    require_harness()
    benchmarks = parse_tasks(",".join(settings.eval_tasks))
    folder = None if settings.eval_tasks_dir is None else Path(settings.eval_tasks_dir)
    if folder is not None:
        check_files(benchmarks, folder)
    output, taught = Path(settings.output), recipe.task == "sft"
    return [TaskScores(output / TASKS_NAME, benchmarks, folder, settings.eval_tasks_documents, taught)]
