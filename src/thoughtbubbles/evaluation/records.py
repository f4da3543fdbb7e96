"""The folder of an evaluation: what every document scored, and what the call was about."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from thoughtbubbles.errors import InputError
from thoughtbubbles.evaluation.statistics import Scores
from thoughtbubbles.files import write_text
from thoughtbubbles.machine import describe_machine

SETTINGS_NAME = "settings.json"
DOCUMENTS_NAME = "documents"


@dataclass(frozen=True)
class MetricRecord:
    """A metric, document by document.

    Attributes:
        protocol: `harness`, `authors` or `gold`.
        metric: its name; with a comma and the filter where the harness has several.
        kind: how documents are aggregated, one of `statistics.KINDS`.
        higher_is_better: whether more is better.
        leaks: whether the scores saw later tokens (routing `topk` in one forward).
        values: of each document.
        weights: what they are divided by; None is 1.
    """

    protocol: str
    metric: str
    kind: str
    higher_is_better: bool
    leaks: bool
    values: list[float]
    weights: list[float] | None = None


@dataclass(frozen=True)
class TaskRecord:
    """A task at a budget: a file of its own, so that an interrupted call does not do it again.

    Attributes:
        task: name of the benchmark.
        budget: streams per token, as text.
        version: the harness's, of the task.
        data: identity of the files of its documents; `hub` where they are the harness's own.
        num_fewshot: worked examples before each document.
        documents: names of the documents, in their order.
        clusters: of which group of alike documents each is; None where there are no groups.
        metrics: what was measured.
        generations: what the model wrote for each document, if it did.
        truncated: texts whose left end did not fit the model.
        made_with: versions, commit, batch size.
    """

    task: str
    budget: str
    version: str
    data: str
    num_fewshot: int
    documents: list[str]
    clusters: list[str] | None
    metrics: list[MetricRecord]
    generations: list[str] | None
    truncated: int
    made_with: dict[str, str]

    def scores(self, metric: MetricRecord) -> Scores:
        """A metric as statistics take it."""
        weights = metric.weights or [1.0] * len(metric.values)
        return Scores.of(metric.kind, list(zip(metric.values, weights, strict=True)), self.clusters)

    def find(self, protocol: str, metric: str) -> MetricRecord | None:
        """The metric of a name, if it was measured."""
        return next((each for each in self.metrics if (each.protocol, each.metric) == (protocol, metric)), None)


@dataclass(frozen=True)
class EvaluationFolder:
    """The folder of an evaluation: settings.json and documents/TASK-budget-B.json.

    Attributes:
        path: the folder.
    """

    path: Path

    def open(self, settings: Mapping[str, Any]) -> None:
        """Begin an evaluation, or go on with one of the same settings.

        Raises:
            InputError: the folder holds something else, or an evaluation of other settings; saying what differs.
        """
        if not (self.path / SETTINGS_NAME).is_file():
            if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
                raise InputError(f"--output {self.path}: expected a new or empty folder, or that of an evaluation")
            self.path.mkdir(parents=True, exist_ok=True)
            write_text(self.path / SETTINGS_NAME, json.dumps(dict(settings), indent=2) + "\n")
            return
        changed = [
            f"{name}: {self.settings.get(name)} is now {value}"
            for name, value in settings.items()
            if name != "model" and self.settings.get(name) != value  # a model may be moved
        ]
        if changed:
            raise InputError(f"--output {self.path} holds an evaluation of other settings: {'; '.join(changed)}")

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What the evaluation is about.

        Raises:
            InputError: it is not the folder of an evaluation.
        """
        try:
            found: dict[str, Any] = json.loads((self.path / SETTINGS_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise InputError(
                f"{self.path}: expected the folder of an evaluation, which `thoughtbubbles evaluate --output` wrote"
            ) from None
        return found

    def file(self, task: str, budget: str) -> Path:
        """Where a task at a budget is kept."""
        return self.path / DOCUMENTS_NAME / f"{task}-budget-{budget.replace('/', '_')}.json"

    def write(self, record: TaskRecord) -> None:
        """Keep a task's record, whole or not at all."""
        path = self.file(record.task, record.budget)
        path.parent.mkdir(exist_ok=True)
        write_text(path, json.dumps(asdict(record)) + "\n")

    def read(self, path: Path) -> TaskRecord:
        """A task's record."""
        content = json.loads(path.read_text(encoding="utf-8"))
        return TaskRecord(**{**content, "metrics": [MetricRecord(**each) for each in content["metrics"]]})

    def records(self, tasks: Sequence[str]) -> list[TaskRecord]:
        """All that there are, in the order of `tasks` and of budgets."""
        found = [self.read(path) for path in sorted((self.path / DOCUMENTS_NAME).glob("*.json"))]
        return sorted(found, key=lambda each: (tasks.index(each.task), Fraction(each.budget)))


def hash_files(paths: Sequence[Path]) -> str:
    """SHA-256 of files' contents, in the order of their names."""
    content = hashlib.sha256()
    for path in sorted(paths):
        with path.open("rb") as file:
            content.update(hashlib.file_digest(file, "sha256").digest())
    return content.hexdigest()


def provenance() -> dict[str, str]:
    """Commit of the source, where it is a checkout, the machine and versions."""
    return {**describe_machine(), "lm_eval": version("lm_eval")}
